"""`tilewise.explain_ranks`: what it says of several GPUs, against counts by hand and the steps of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import tilewise
from harness import planner_table
from harness.explained import ALL_CASES, meta
from harness.ranks import run
from tilewise.distributed.blocks import blocks_of, ring
from tilewise.distributed.order import order_of
from tilewise.distributed.rows import Rows as JoinedRows
from tilewise.parts.shape import Shape
from tilewise.plan.request import make_request
from tilewise.tools.chips import find_chip
from tilewise.tools.explain import command as explain_command
from tilewise.tools.explain.as_workload import as_workload
from tilewise.tools.explain.command import call_of
from tilewise.tools.explain.coverage import Rows
from tilewise.tools.explain.parts import Part, Parts
from tilewise.tools.explain.ranks import pieces
from tilewise.tools.explain.ranks.chunks import chunks_of
from tilewise.tools.explain.ranks.link import link_rate
from tilewise.tools.explain.ranks.waiting import ring_seconds
from tilewise.tools.explain.ranks.whole import ADDED, JOINED, Whole
from tilewise_reference import CACHED_CASES, PACKED_CASES

LONG = ALL_CASES["llama3-70b-prefill-128k"]
FAST = dict(link="450GB/s", gpu="H200")


def call(length: int = 48, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (4, 3), batch: int = 2,
         kv_length: int | None = None) -> list[torch.Tensor]:  # fmt: skip
    keys = (batch, heads[1], length if kv_length is None else kv_length)
    return [meta(batch, heads[0], length, dims[0]), meta(*keys, dims[0]), meta(*keys, dims[1])]


def ids(length: int) -> torch.Tensor:
    """Documents of many lengths, other ones in each sequence of the batch."""
    return torch.stack([(torch.arange(length) ** 2) // 97, torch.arange(length) // 11])


MASKS: dict[str, Any] = {
    "none": lambda n: None,
    "causal": lambda n: tilewise.Causal(),
    "window": lambda n: tilewise.Causal() & tilewise.Window(n // 6, 0),
    "both sides": lambda n: tilewise.Window(2, 3),
    "documents": lambda n: tilewise.Documents(ids(n)),
    "causal documents": lambda n: tilewise.Causal() & tilewise.Documents(ids(n)),
    "scattered documents": lambda n: tilewise.Documents(torch.arange(n) % 5),
    "prefix": lambda n: tilewise.Prefix(torch.tensor([n // 5, 0])),
    "padding": lambda n: tilewise.Padding(torch.tensor([n // 3, n])),
    "bool": lambda n: torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 0.5,
    "ragged": lambda n: tilewise.Intervals(torch.arange(n) * 7 % 61 * n // 200, torch.full((n,), n)),
    "nothing": lambda n: tilewise.Padding(torch.zeros(2, dtype=torch.int64)),
}


def planned(*qkv: torch.Tensor, **arguments: Any) -> Any:
    return tilewise.explain_ranks(*qkv, **FAST, **arguments)


# ---- Bytes


def test_two_ranks_by_hand():
    """Chunks of 2 rows; rank 0 holds 0 and 3, rank 1 holds 1 and 2. Chunk 3 sees 1 and 2; of rank 0's keys
    rank 1 sees chunk 0 alone. A chunk is 2 rows of 4 + 3 numbers of a head, in bf16, its gradient in fp32."""
    q, k, v = call(8, (2, 1), batch=1)
    found = planned(q, k, v, ranks=2, mask=tilewise.Causal(), work="training")
    chunk = 2 * 7 * 2
    for name in ("ring", "all_gather"):
        method = found[name]
        assert method.forward.received == (2 * chunk, chunk) and method.forward.sent == (chunk, 2 * chunk)
        # Gradients go the other way, and are twice as wide.
        assert method.backward.received == (2 * chunk + 2 * chunk, chunk + 4 * chunk)
        assert method.backward.sent == (chunk + 4 * chunk, 2 * chunk + 2 * chunk)
        # Rows 0, 1, 6, 7 see 1 + 2 + 7 + 8 keys, rows 2 to 5 see 3 + 4 + 5 + 6: 18 each, of 2 heads.
        assert method.pairs == (36, 36) and method.balance == 1.0


def test_divided_heads_by_hand():
    """12 heads of q and 4 of k over 6 ranks: 2 of q, of two groups of 3, and so 2 of k."""
    q, k, v = call(12, (12, 4), batch=1)
    found = planned(q, k, v, ranks=6, work="training", return_lse=True)["heads"]
    rows = 2
    to_one = (2 * rows * 4 + 2 * rows * 7) * 2  # q, then k and v
    back = 2 * rows * 3 * 2  # out
    assert found.forward.sent == found.forward.received == (5 * (to_one + back + 2 * rows * 4),) * 6


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("name", MASKS)
def test_bytes_are_those_of_the_steps_of_a_run(name, order):
    """For each rank, over what `blocks.ring` tells it to send; forward, and backward with fp32 gradients."""
    q, k, v = call(48)
    mask = MASKS[name](48)
    for ranks in (1, 3, 4):
        where = order_of(48, ranks, order)
        masks = make_request(q, k, v, mask=mask).masks
        seen = blocks_of(masks, Shape(2, 4, 2, 48, 48, 4, 3), where, where).seen
        found = planned(q, k, v, ranks=ranks, order=order, mask=mask, work="training")["ring"]
        number = 2 * 2 * where.chunk * 7  # of two sequences, of two heads of k and v
        for rank in range(ranks):
            steps = ring(rank, seen, where, where)[1:]
            sent, received = (number * sum(len(getattr(s, x)) for s in steps) for x in ("sent", "received"))
            forward, backward = found.forward, found.backward
            assert (forward.sent[rank], forward.received[rank]) == (2 * sent, 2 * received)
            assert backward.sent[rank] == 2 * sent + 4 * received
            assert backward.received[rank] == 2 * received + 4 * sent


def test_a_window_skips_ranks():
    """In contiguous order a window no longer than a chunk reaches the rank before, and nobody else."""
    q, k, v = call(64, batch=1)
    mask = tilewise.Causal() & tilewise.Window(8, 0)
    found = planned(q, k, v, ranks=8, order="contiguous", mask=mask)["ring"]
    chunk = 2 * 8 * 7 * 2
    assert found.forward.received == (0, *[chunk] * 7) and found.forward.sent == (*[chunk] * 7, 0)


# ---- Work


@pytest.mark.parametrize("name", MASKS)
def test_the_ranks_share_what_one_device_would_do(name):
    """By every method, with other lengths of keys than of queries, and one more head of both."""
    q, k, v = call(48, kv_length=24 if name in ("none", "causal", "window", "both sides") else None)
    mask = MASKS[name](48)
    one = tilewise.explain(q, k, v, mask=mask, gpu="H200")
    for order in ("zigzag", "contiguous"):
        found = planned(q, k, v, ranks=4, order=order, mask=mask)
        assert found.pairs_that_count == one.pairs_that_count
        assert [m.name for m in found.methods if not m.why_not] == [
            "ring",
            "all_gather",
            "heads",
            "ring, heads",
        ]
        for method in found.methods:
            assert len(method.pairs) == 4 and sum(method.pairs) == one.pairs_that_count, method.name


@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_the_zigzag_balances_a_causal_mask_exactly(ranks):
    q, k, v = call(640, batch=1)
    found = planned(q, k, v, ranks=ranks, mask=tilewise.Causal())
    assert found["ring"].balance == 1.0 and len(set(found["ring"].pairs)) == 1
    # The last of R equal parts has (2R - 1) / R of the mean, up to the diagonal.
    last = planned(q, k, v, ranks=ranks, order="contiguous", mask=tilewise.Causal())["ring"]
    rows = 640 // ranks
    assert last.pairs[-1] == 4 * (rows * (rows + 1) // 2 + rows * rows * (ranks - 1))
    assert last.balance == last.pairs[-1] * ranks / (4 * 640 * 641 // 2)


def test_masks_that_tell_heads_apart_give_ranks_different_work():
    """Every head a window of its own: who has which heads has so many pairs."""
    starts = (torch.arange(48) - torch.arange(4)[:, None] * 5).clamp(min=0)
    mask = tilewise.Intervals(starts[None].expand(2, 4, 48), (torch.arange(48) + 1).expand(2, 4, 48))
    q, k, v = call(48)
    found = planned(q, k, v, ranks=4, mask=mask)
    of_heads = 2 * (torch.arange(48) + 1 - starts).sum(1)
    assert list(found["heads"].pairs) == of_heads.tolist()
    two_levels = planned(q, k, v, ranks=(2, 2), mask=mask)["ring, heads"].pairs
    assert two_levels[0] + two_levels[2] == of_heads[:2].sum()
    assert two_levels[1] + two_levels[3] == of_heads[2:].sum()


def answers(parts: Parts) -> list[tuple[tuple[Any, ...], list[int]]]:
    """All that the model asks of parts, and what they say."""
    found: list[Any] = [((count,), [parts.counted(count)]) for count in pieces.COUNTS]
    for walk in pieces.VISITS:
        tile = (32,) if walk is pieces.walk_of_a_parameter else (32, 16)
        covered = parts.covered(walk, *tile)
        found.append(((walk, *tile), [covered.visited, covered.full]))
    return found


@pytest.mark.parametrize("name", ["causal", "documents", "ragged", "prefix", "bool", "nothing"])
def test_blocks_that_are_counted_together_are_counted_as_each_alone(name):
    """Against the model of one call at a time, on the rows of each block."""
    q, k, v = call(512, (4, 2), (64, 64))
    request = make_request(q.requires_grad_(), k, v, mask=MASKS[name](512))
    chip = find_chip("H200")
    whole = Whole(request, as_workload(request, chip, True, False, False), chip, False)
    where = order_of(512, 2)
    chunks = chunks_of(whole, where, where, (4, 2))
    shape = whole.shape._replace(q_len=128, kv_len=128)
    joining = whole.joining(shape)
    for i in range(4):
        for j in range(4):
            at = int(chunks.classes[i, j])
            lo, hi = (
                (x[:, :, 128 * i :][:, :, :128] - 128 * j).clamp(0, 128)
                for x in (whole.rows.lo, whole.rows.hi)
            )
            rows = Rows(lo, hi, whole.rows.whole[:, :, 128 * i :][:, :, :128])
            alone = Parts([Part(shape, rows)])
            for question, answer in answers(alone):
                assert pieces.Pieces(shape, rows, 1).asked(*question)[0].tolist() == answer, question
            times = chunks.times[at]
            assert int(times.pairs) == alone.counted(pieces.pairs_that_count)
            if chunks.seen[i, j]:
                expected = pieces.seconds_of(whole.part(shape), alone)
                found = float(times.forward) - joining[0], float(times.backward) - joining[1]
                assert found == pytest.approx(expected, rel=1e-9), (i, j)
            else:
                assert float(times.forward) == float(times.backward) == 0


def test_full_blocks_are_called_together_where_the_run_does():
    """Unmasked, a rank's two chunks of rows against both of another's keys are one call: as many programs,
    and a result that is joined once. Scores that depend on positions forbid it, and so do bool masks."""
    sizes = (4, 2), (64, 64), 1
    joined = 12 * 4 * 1024 * 64 / find_chip("H200").memory_bytes
    allowed = torch.ones(4096, 4096, dtype=torch.bool)
    for features, of_block, calls, rows in (
        ({}, {}, 4, 1024),
        (dict(score=tilewise.Softcap(5.0)), dict(score=tilewise.Softcap(5.0)), 16, 512),
        (dict(mask=allowed), dict(mask=allowed[:512, :512]), 16, 512),
    ):
        found = planned(*call(4096, *sizes), ranks=4, **features)
        one = tilewise.explain(*call(rows, *sizes), gpu="H200", return_lse=True, **of_block)
        expected = calls * (one.seconds + joined * rows / 1024)
        assert found["ring"].forward.busiest == pytest.approx(expected), features


def test_thousands_of_ranks_are_a_few_different_calls(monkeypatch):
    """A causal mask over 1024 ranks: two million blocks are seen, of three kinds."""
    looked_at = []
    one = pieces.seconds_of
    monkeypatch.setattr(pieces, "seconds_of", lambda work, parts: looked_at.append(parts) or one(work, parts))
    arguments = call_of(replace(LONG, batch=1), training=False)
    found = tilewise.explain_ranks(**arguments, ranks=1024, **FAST)
    assert found["ring"].balance == 1.0 and sum(found["ring"].pairs) == LONG.q_heads * LONG.pairs()
    assert len(looked_at) < 3000
    assert found["heads"].why_not == "q has 64 heads, which 1024 ranks cannot share evenly"


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write of tensors with so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.bytes = numbers, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            moved = [x for x in (*args, found) if isinstance(x, torch.Tensor) and x.numel() == self.numbers]
            self.bytes += sum(x.nbytes for x in moved)
        return found


def test_joining_moves_as_many_bytes_as_it_is_charged_for():
    q, piece, numbers = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16), 1 * 2 * 8 * 16
    rows = JoinedRows(q, 16, None, 1.0)
    for add, charged in (
        (lambda: rows.take(slice(0, 8), piece, torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)), JOINED),
        (lambda: rows.out.add_(piece), ADDED),
    ):
        with Traffic(numbers) as traffic:
            add()
        assert traffic.bytes == charged * numbers


# ---- Waiting


def bytes_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


SECOND = bytes_of([1, 1], [1, 1])
NONE = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("keys", "gradients", "done"),
    [
        ([0, 0], [0, 0], [2, 2]),
        ([1, 1], [0, 0], [2, 2]),  # hidden under the step before
        ([1.5, 1], [0, 0], [2.5, 2.5]),  # rank 0 waits for its keys, and rank 1 until they are sent
        ([0, 0], [0.5, 1], [3, 3]),  # what rank 1 has computed comes last
        ([3, 1], [1, 1], [5, 5]),  # both begin at 3, and send what they have computed at 4
    ],
)
def test_two_ranks_wait(keys, gradients, done):
    """A second for each step: keys[r] travel to rank r, gradients[r] from there, at a byte a second."""
    to = bytes_of([0, keys[0]], [keys[1], 0])
    back = bytes_of([0, gradients[0]], [gradients[1], 0])
    assert ring_seconds(SECOND, to, back, 1.0).tolist() == done


def test_gradients_come_home_before_the_step_after_the_next_one():
    """Four ranks; the steps take 1, 1, 1 and 10 seconds. Gradients of step 1 are under way from 2 to 4, so
    that the last step, which could begin at 3, begins at 4; its own then take from 14 to 16."""
    rank = torch.arange(4)
    is_last = (rank[:, None] - rank) % 4 == 3
    back = 2.0 * (torch.ones(4, 4) - torch.eye(4))
    found = ring_seconds(1 + 9.0 * is_last, torch.zeros(4, 4), back, 1.0)
    assert found.tolist() == [16.0] * 4


def of_ranks(count: int, **entries: float) -> torch.Tensor:
    """Nothing, but r12=3.0: 3 for the queries of rank 1 and the keys of rank 2."""
    found = torch.zeros(count, count)
    for name, value in entries.items():
        found[int(name[1]), int(name[2])] = value
    return found


@pytest.mark.parametrize(
    ("ranks", "keys", "gradients", "done"),
    [
        (3, {}, {}, [3, 3, 3]),
        # Posted when step 1 begins, at 1: there at 2.5, when step 1 is done since 2.
        (3, dict(r01=1.5), {}, [3.5, 3.5, 3]),
        # What rank 0 sends, first to rank 1 and then to rank 2: from 0 to 4, and from 4 to 8.
        (3, dict(r10=4.0, r20=4.0), {}, [9, 6, 9]),
        # Rank 0 gets keys of rank 2 from 1 to 4, so that gradients of rank 1, ready at 2, come from 4 to 7.
        (4, dict(r02=3.0), dict(r10=3.0), [8, 8, 6, 4]),
        # Rank 1 sends keys to rank 3 from 1 to 4, so that its gradients go from 4 to 7.
        (4, dict(r31=3.0), dict(r10=3.0), [8, 8, 4, 6]),
    ],
)
def test_a_link_carries_one_message_after_another(ranks, keys, gradients, done):
    """A second for each step, at a byte a second."""
    found = ring_seconds(torch.ones(ranks, ranks), of_ranks(ranks, **keys), of_ranks(ranks, **gradients), 1.0)
    assert found.tolist() == done


def test_twice_the_rate_is_half_the_time():
    to = torch.ones(3, 3) - torch.eye(3)
    assert ring_seconds(torch.zeros(3, 3), to, torch.zeros(3, 3), 1.0).tolist() == [2, 2, 2]
    assert ring_seconds(torch.zeros(3, 3), to, torch.zeros(3, 3), 2.0).tolist() == [1, 1, 1]


def test_a_faster_link_exposes_less_and_all_gather_hides_nothing():
    arguments = call_of(LONG, training=True)
    slow, fast = (
        tilewise.explain_ranks(**arguments, ranks=8, link=link, gpu="H200") for link in (5e9, 450e9)
    )
    assert fast["ring"].forward.exposed == 0 < slow["ring"].forward.exposed
    for found in (slow, fast):
        for x in (found["heads"].forward, found["all_gather"].forward):
            assert (
                x.seconds == pytest.approx(x.busiest + x.on_link) and x.on_link == max(x.sent) / found.link[0]
            )
        assert found["ring"].forward.sent == found["all_gather"].forward.sent


def test_the_steps_of_a_ring_are_said():
    """Of 8 ranks: the keys of one chunk of two are seen by both chunks of an earlier rank's, or both by the
    later one: half of a rank's rows times all its keys, either way. A message has both chunks at most."""
    found = tilewise.explain_ranks(**call_of(LONG, training=True), ranks=8, **FAST)
    steps = found["ring"].forward.steps
    assert steps.message == 131072 // 8 * 8 * 256 * 2 / 450e9
    kernels = 4 * 128 * 64 * (131072 // 8) ** 2 / 2 / 989.4e12
    assert kernels < steps.shortest < steps.longest < 1.3 * kernels  # what they give is joined, too
    assert found["ring"].backward.steps.message == 2 * steps.message
    assert found["heads"].forward.steps is None is planned(*call(48), ranks=1)["ring"].forward.steps
    assert "ring, a step: kernels of" in " ".join(str(found).split())


def test_of_a_mesh_each_dimension_has_its_link():
    """Heads travel within and keys across: the slower of both for whoever talks to all."""
    arguments = call_of(LONG, training=False)
    found = tilewise.explain_ranks(**arguments, ranks=(2, 4), link=("50GB/s", "450GB/s"), gpu="H200")
    both = found["ring, heads"]
    assert both.mesh == (2, 4) and found["ring"].forward.on_link == max(found["ring"].forward.sent) / 50e9
    rows = 131072 // 8
    within = 3 * rows * 128 * 2 * (16 + 16 + 2 + 2)
    across = 2 * rows * 4 * 128 * 2 * 2  # one of the two: all of its chunks of 2 heads of k and v
    assert max(both.forward.sent) == within + across
    assert both.forward.on_link == pytest.approx(within / 450e9 + across / 50e9)


# ---- Memory


def test_memory_of_a_ring_shrinks_with_the_ranks():
    arguments = call_of(LONG, training=True)
    few, many = (tilewise.explain_ranks(**arguments, ranks=ranks, **FAST) for ranks in (8, 64))
    assert many["ring"].bytes * 8 == few["ring"].bytes
    assert many["all_gather"].bytes * 4 > few["all_gather"].bytes
    gathered = {x.name: x.bytes for x in many["all_gather"].memory}["keys gathered"]
    assert gathered == 131072 * 8 * 256 * 2  # all of k and v, by whoever has the last row


def test_memory_is_that_of_the_pass_that_needs_more():
    ring_method = tilewise.explain_ranks(**call_of(LONG, training=True), ranks=8, **FAST)["ring"]
    of = {kept: sum(x.bytes for x in ring_method.memory if x.kept == kept) for kept in
          ("argument", "result", "kept", "gradient", "forward", "backward")}  # fmt: skip
    rest = of["argument"] + of["result"] + of["kept"]
    assert ring_method.bytes == rest + max(of["forward"], of["gradient"] + of["backward"])


# ---- What is said


def test_everything_is_json_and_plain_text():
    found = tilewise.explain_ranks(**call_of(LONG, training=True), ranks=8, **FAST)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["best"] == found.best and read["ranks"] == 8 and read["link"] == [450e9]
    ring_method = read["methods"][0]
    assert ring_method["forward"]["exposed"] == found["ring"].forward.exposed
    assert ring_method["bytes"] == found["ring"].bytes and ring_method["balance"] == 1.0
    text = " ".join(str(found).split())
    for words in (
        "shared by 8 ranks", f"Take {found.best}", "Counted, not measured", "Forward on an H200, with links",
        "450 GB/s", "Backward on an H200", "Memory of a rank", "most / mean", "chunks r and 2R - 1 - r",
    ):  # fmt: skip
        assert words in text, words


def test_fake_tensors_are_planned_as_meta_ones():
    arguments = dict(ranks=2, mask=tilewise.Causal(), work="training")
    with FakeTensorMode():
        fake = planned(*(torch.empty(x.shape, dtype=x.dtype) for x in call(48)), **arguments)
    assert fake.to_dict() == planned(*call(48), **arguments).to_dict()


def test_what_is_no_faster_than_one_gpu_is_said():
    short, long = (planned(*call(length, (4, 2), (64, 64)), ranks=2) for length in (64, 65536))
    words = "No faster than one H200 alone"
    assert words in str(short) and words not in str(long)


def test_every_dense_named_case_is_planned():
    """With all that they ask for: biases, learned scores, sinks, dropout, cross-attention."""
    count = 0
    for case in ALL_CASES.values():
        if case.sequences is None and case.q_len % 2 == 0 and not case.name.startswith("paper"):
            arguments, count = call_of(case, training=True), count + 1
            found = tilewise.explain_ranks(**arguments, ranks=2, order="contiguous", **FAST)
            able = [method for method in found.methods if not method.why_not]
            assert (
                len(able) >= 2
                and found["ring, heads"].why_not == "ranks=2 does not divide into groups of several"
            )
            for method in able:
                assert sum(method.pairs) == found.pairs_that_count, case.name
                assert min(x.busiest for x in method.passes) > 0, case.name
    assert count > 35


def test_dropout_is_not_cut_between_four_keys():
    found = planned(*call(24), ranks=4, dropout_p=0.1)  # chunks of 3
    why = "dropout is drawn for four keys at once, and a chunk has 3"
    assert [m.why_not for m in found.methods] == [why, why, "", why] and found.best == "heads"


def test_the_method_with_the_least_time_is_taken_and_of_like_ones_that_with_less_memory():
    found = tilewise.explain_ranks(**call_of(LONG, training=False), ranks=8, **FAST)
    least = min(m.seconds for m in found.methods)
    assert found[found.best].seconds <= 1.02 * least
    alike = [m for m in found.methods if m.seconds <= 1.02 * least]
    assert found[found.best].bytes == min(m.bytes for m in alike)
    # A link so slow that what is sent decides.
    slow = tilewise.explain_ranks(**call_of(LONG, training=False), ranks=8, link="1MB/s", gpu="H200")
    assert max(slow[slow.best].forward.sent) == min(max(m.forward.sent) for m in slow.methods)


def test_the_figures_of_the_page_are_those_of_the_planner():
    command = "PYTHONPATH=kernels:reference:tests python -m harness.planner_table"
    assert planner_table.page() == planner_table.PAGE.read_text(encoding="utf-8"), command


# ---- What is refused


@pytest.mark.parametrize(
    ("given", "rate"),
    [("450GB/s", 450e9), ("400Gbit/s", 50e9), ("1.5 TB/s", 1.5e12), ("7B/s", 7.0), (450e9, 450e9), (3, 3.0)],
)
def test_a_rate_is_read(given, rate):
    assert link_rate(given) == rate


@pytest.mark.parametrize(
    "given",
    ["450", "fast", "450GB", "450Gb/s", "450 gb/s", "-1GB/s", "0GB/s", "1.2.3GB/s", "", 0, -1.0, float("inf"),
     float("nan"), True, None],
)  # fmt: skip
def test_what_is_no_rate_is_refused(given):
    with pytest.raises(ValueError, match="link="):
        link_rate(given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(ranks=0), "ranks=0 must be a number from 1 to 4096"),
        (dict(ranks=-2), "ranks=-2 must be"),
        (dict(ranks=2.0), "ranks=2.0 must be"),
        (dict(ranks=True), "ranks=True must be"),
        (dict(ranks=(2, 2, 2)), "must be a number"),
        (dict(ranks=4097), "from 1 to 4096"),
        (dict(ranks=(65, 64)), "from 1 to 4096"),
        (dict(ranks=5), "pad the sequence to 50"),
        (dict(link="450"), "link='450' must be a number and a unit"),
        (dict(link=("1GB/s", "2GB/s")), "one for each dimension of the mesh"),
        (dict(order="striped"), "order='striped' must be one of"),
        (dict(work="backward"), "work='backward'"),
        (dict(gpu="Voodoo2"), "gpu='Voodoo2'"),
        (dict(impl="hopper"), "impl='hopper' must be None or 'portable'"),
        (dict(q_offsets=torch.tensor([0, 48])), "mask=tilewise.Documents"),
        (dict(kv_lens=torch.tensor([3, 4])), "do not share a cache"),
        (dict(mask=tilewise.Documents(torch.arange(7))), "must broadcast"),
    ],
)
def test_mistakes_are_named(changed, said):
    q, k, v = call(48)
    with pytest.raises(ValueError) as raised:
        tilewise.explain_ranks(q, k, v, **{**FAST, "ranks": 4, **changed})
    assert said in str(raised.value)


def test_what_has_nothing_to_share_and_unknown_names_are_refused():
    q, k, v = call(48)
    with pytest.raises(ValueError, match="nothing to share"):
        planned(q, k[:, :, :0], v[:, :, :0], ranks=2)
    with pytest.raises(TypeError, match="causal="):
        planned(q, k, v, ranks=2, causal=True)
    with pytest.raises(ValueError, match="float64"):
        planned(*(x.double() for x in (q, k, v)), ranks=2)


def test_masks_without_contents_count_as_seen_and_a_note_says_so():
    q, k, v = call(48)
    found = planned(q, k, v, ranks=4, mask=tilewise.Documents(ids(48).to("meta")))
    assert not found.exact and any("Documents" in note for note in found.notes)
    assert found["ring"].forward.received == (3 * 2 * 2 * 12 * 7 * 2,) * 4


def test_one_rank_sends_nothing():
    found = planned(*call(48), ranks=1, work="training")
    for method in found.methods[:3]:
        assert method.forward.sent == method.backward.sent == (0,) and method.forward.exposed == 0
    assert found["ring, heads"].why_not == "ranks=1 does not divide into groups of several"


# ---- The command


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(explain_command.explain)
    return lambda words: CliRunner().invoke(app, words.split())


def test_the_command_plans_a_named_case(command, nothing_runs):
    words = "--ranks 8 --case llama3-70b-prefill-128k --gpu H200 --link 450GB/s"
    ran = command(words)
    assert ran.exit_code == 0, ran.output
    for said in ("Llama 3.1 70B", "shared by 8 ranks", "Which method", "ring, heads", "450 GB/s"):
        assert said in ran.output
    read = json.loads(command(words + " --json --training").output)
    assert read["case"] == "llama3-70b-prefill-128k" and len(read["methods"]) == 4
    planned = tilewise.explain_ranks(**call_of(LONG, training=True), ranks=8, **FAST)
    assert read["methods"] == json.loads(json.dumps(planned.to_dict()))["methods"]


def test_the_command_plans_sizes_on_a_mesh(command, nothing_runs):
    sizes = "--q 2,8,64,32 --kv 2,4,64,32 --causal --documents 4 --gpu H200 --json"
    read = json.loads(command(f"{sizes} --ranks 2x4 --link 50GB/s,400Gbit/s --order contiguous").output)
    assert (read["ranks"], read["order"], read["link"]) == (8, "contiguous", [50e9, 50e9])
    assert read["methods"][-1]["mesh"] == [2, 4] and read["pairs_that_count"] == 2 * 8 * 4 * 16 * 17 // 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ranks 8", "--ranks needs --link"),
        ("--ranks 8 --link 450", "--link='450' must be a number and a unit"),
        ("--ranks 8 --link fast", "--link='fast' must be"),
        ("--ranks 8 --link 1GB/s,2GB/s", "one for each dimension"),
        ("--ranks 0 --link 1GB/s", "ranks=0 must be"),
        ("--ranks x --link 1GB/s", "--ranks x must be a number, or two of a mesh"),
        ("--ranks 2x --link 1GB/s", "--ranks 2x must be"),
        ("--ranks 7 --link 1GB/s", "must be a multiple of 14"),
        ("--link 1GB/s", "go with --ranks"),
        ("--order zigzag", "go with --ranks"),
        ("--ranks 8 --link 1GB/s --order up", "order='up' must be one of"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, said, command):
    ran = command(f"--q 1,8,64,32 {words}")
    assert ran.exit_code == 2 and said in " ".join(ran.output.split()) and "Traceback" not in ran.output


@pytest.mark.parametrize("case", [CACHED_CASES[0].name, PACKED_CASES[0].name])
def test_what_ranks_do_not_share_is_said(case, command):
    ran = command(f"--ranks 2 --link 1GB/s --case {case}")
    assert ran.exit_code == 2 and "share" in ran.output


# ---- Against a run


def bytes_of_a_run(
    mesh: Any, method: Any, order: str, name: str, heads: tuple[int, int], return_lse: bool
) -> list[tuple[int, int]]:
    """(sent, received) by a rank that runs it, in the forward and in the backward."""
    from tilewise.distributed import context_parallel_attention, split
    from tilewise.distributed.exchange import Channel

    made: list[Any] = []
    begin = Channel.__init__
    Channel.__init__ = lambda self, *args: made.append(self) or begin(self, *args)
    try:
        q, k, v = (torch.randn(x.shape, dtype=x.dtype) for x in call(48, heads))
        own = [split(x, mesh, order=order).requires_grad_() for x in (q, k, v)]
        found = context_parallel_attention(
            *own,
            mesh=mesh,
            method=method,
            order=order,
            mask=MASKS[name](48),
            impl="torch",
            return_lse=return_lse,
        )
        forward = [sum(getattr(x, way) for x in made) for way in ("sent", "received")]
        results = found if return_lse else (found,)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        both = [sum(getattr(x, way) for x in made) for way in ("sent", "received")]
    finally:
        Channel.__init__ = begin
    return [tuple(forward), tuple(all_of - before for all_of, before in zip(both, forward, strict=True))]


RUNS = [
    ("ring", "zigzag", "causal", (4, 2), False),
    ("ring", "contiguous", "window", (4, 2), True),
    ("ring", "zigzag", "causal documents", (4, 4), False),
    ("ring", "zigzag", "padding", (4, 1), False),
    ("ring", "contiguous", "bool", (4, 2), False),
    ("ring", "zigzag", "nothing", (4, 2), False),
    ("all_gather", "zigzag", "prefix", (4, 2), False),
    ("all_gather", "contiguous", "documents", (4, 2), True),
    ("heads", "zigzag", "causal", (12, 4), False),
    ("heads", "contiguous", "both sides", (8, 1), True),
    (("ring", "heads"), "zigzag", "causal", (4, 2), False),
    (("ring", "heads"), "contiguous", "causal documents", (4, 1), True),
    (("ring", "heads"), "zigzag", "window", (6, 3), False),
]


@pytest.mark.parametrize(("method", "order", "name", "heads", "return_lse"), RUNS, ids=str)
def test_four_ranks_send_what_was_planned(method, order, name, heads, return_lse):
    mesh = (4,) if isinstance(method, str) else (2, 2)
    counted = run(mesh, bytes_of_a_run, method, order, name, heads, return_lse)
    found = planned(
        *call(48, heads), ranks=4 if mesh == (4,) else mesh, order=order, mask=MASKS[name](48),
        return_lse=return_lse, work="training",
    )[method if mesh == (4,) else ", ".join(method)]  # fmt: skip
    for each, of_run in ((found.forward, [x[0] for x in counted]), (found.backward, [x[1] for x in counted])):
        assert [*zip(each.sent, each.received, strict=True)] == of_run


def messages_alive(mesh: Any, method: str, name: str) -> tuple[int, int]:
    """The most bytes of messages, coming and going, that a rank has at one time, in each pass."""
    from tilewise.distributed import context_parallel_attention, split
    from tilewise.distributed.walk import Keys

    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def noted(make: Any, message: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal most
            made = make(*args)
            storage = message(made).untyped_storage()
            alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
            alive.append((StorageWeakRef(storage), storage.nbytes()))
            most = max(most, sum(size for _, size in alive))
            return made

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keys, "room", noted(Keys.room, lambda made: made[0]))
        patch.setattr(Keys, "message", noted(Keys.message, lambda made: made))
        own = [split(torch.randn(x.shape, dtype=x.dtype), mesh).requires_grad_() for x in call(48)]
        out = context_parallel_attention(*own, mesh=mesh, method=method, mask=MASKS[name](48), impl="torch")
        forward, most = most, 0
        out.backward(torch.ones_like(out))
    return forward, most


@pytest.mark.parametrize("name", ["none", "causal"])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_messages_take_the_memory_that_was_planned(method, name):
    counted = run((4,), messages_alive, method, name)
    found = planned(*call(48), ranks=4, mask=MASKS[name](48), work="training")[method]
    of = {x.name: x.bytes for x in found.memory}
    forward = of["keys under way"]
    backward = of["keys and gradients under way" if method == "ring" else "gradients under way"]
    if (method, name) == ("ring", "causal"):  # the longest message of any rank stands for all
        assert all(x <= forward and y <= backward for x, y in counted)
        assert max(x for x, _ in counted) == forward
    else:
        assert counted == [(forward, backward)] * 4
