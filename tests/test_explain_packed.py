"""`tilewise.explain` of packed sequences: what it counts is what they take one by one."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from harness.calls import even_keys
from harness.counted import Counted
from harness.explained import TRAINING_KERNELS, launched_grids, leave_interpreter, meta, prose
from tilewise.kernels import prepare
from tilewise.kernels.tile import Tile
from tilewise.parts.shape import Packing, Shape, ceil_div
from tilewise.plan import passes
from tilewise.plan.passes import run_backward, run_forward
from tilewise.plan.request import request_of
from tilewise.tools.explain.coverage import Coverage, evaluate
from tilewise.tools.explain.parts import parts_of

Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8
LENGTHS, KV_LENGTHS = (37, 0, 5, 37, 1), (50, 3, 0, 50, 20)
LONGEST, KV_LONGEST = max(LENGTHS), max(KV_LENGTHS)
BATCH = len(LENGTHS)


def offsets(lengths: tuple[int, ...], before: int = 0) -> torch.Tensor:
    return torch.tensor([before, *lengths]).cumsum(0)


def tensors(make=torch.randn, q_rows: int = sum(LENGTHS) + 3, kv_rows: int = sum(KV_LENGTHS) + 5) -> list:
    """q, k and v that have more rows than the sequences."""
    sizes = ((q_rows, Q_HEADS, DIM), (kv_rows, KV_HEADS, DIM), (kv_rows, KV_HEADS, VALUE_DIM))
    return [make(*size) for size in sizes]


def packing(before: int = 0) -> dict[str, torch.Tensor]:
    return dict(q_offsets=offsets(LENGTHS, before), kv_offsets=offsets(KV_LENGTHS, before))


# A mask for all sequences, and the same for one of them alone.
MASKS = {
    "no mask": lambda b: None,
    "causal": lambda b: tilewise.Causal(),
    "top left": lambda b: tilewise.Causal("top_left"),
    "window": lambda b: tilewise.Window(20, 3),
    "padding of each": lambda b: tilewise.Padding(of(b, torch.tensor([50, 3, 0, 33, 7]))),
    "padding on the left": lambda b: tilewise.Padding(12, side="left"),
    "intervals": lambda b: tilewise.Intervals(
        torch.arange(of_length(b, LENGTHS, LONGEST)) - 5, torch.arange(of_length(b, LENGTHS, LONGEST)) + 9
    ),
    "intervals of heads": lambda b: tilewise.Intervals(torch.tensor([0, 3, 6, 9])[:, None], torch.tensor(17)),
    "documents": lambda b: tilewise.Documents(
        (torch.arange(LONGEST) // 11)[: of_length(b, LENGTHS, LONGEST)],
        (torch.arange(KV_LONGEST) // 17)[: of_length(b, KV_LENGTHS, KV_LONGEST)],
    ),
    "a bool mask": lambda b: torch.ones(
        of_length(b, LENGTHS, LONGEST), of_length(b, KV_LENGTHS, KV_LONGEST), dtype=torch.bool
    ),
}


def of(b: int | None, each: torch.Tensor) -> torch.Tensor:
    return each if b is None else each[b]


def of_length(b: int | None, lengths: tuple[int, ...], longest: int) -> int:
    return longest if b is None else lengths[b]


def alone(given: list, mask: str, **arguments) -> list:
    """An explanation of each sequence as a call of its own."""
    pieces = zip(*(x.split([*lengths, x.shape[0] - sum(lengths)])[:-1] for x, lengths in zip(
        given, (LENGTHS, KV_LENGTHS, KV_LENGTHS), strict=True
    )), strict=True)  # fmt: skip
    return [
        tilewise.explain(
            *(x.transpose(0, 1)[None] for x in each), mask=MASKS[mask](b), gpu="H200", **arguments
        )
        for b, each in enumerate(pieces)
    ]


@pytest.mark.parametrize("name", MASKS)
def test_counts_are_those_of_all_sequences_alone(name, nothing_runs):
    given = tensors()
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(*given, **packing(), mask=MASKS[name](None), gpu="H200", work="training")
        each = alone(given, name, work="training")
    assert found.exact and found.pairs == sum(e.pairs for e in each)
    assert found.pairs_that_count == sum(e.pairs_that_count for e in each)
    assert found.flops == sum(e.flops for e in each)
    assert [kernel.name for kernel in found.kernels] == ["forward", "prepare", "dq", "dkv"]
    for i, kernel in enumerate(found.kernels):
        for count in ("flops", "executed_flops", "exponentials"):
            assert getattr(kernel, count) == sum(getattr(e.kernels[i], count) for e in each), count
        assert kernel.busy == sum(e.kernels[i].programs for e in each)
        if kernel.tiles is not None:
            assert kernel.tiles == sum((e.kernels[i].tiles for e in each), Coverage(0, 0, 0, 0))


@pytest.mark.parametrize("name", ["no mask", "causal", "window", "padding on the left"])
def test_bytes_are_those_of_all_sequences_of_rows_of_none_and_of_the_offsets(name):
    given = tensors()
    found = tilewise.explain(*given, **packing(), mask=MASKS[name](None), gpu="H200", return_lse=True)
    in_sequences = sum(e.kernels[0].bytes for e in alone(given, name, return_lse=True))
    rows_of_none = 3 * Q_HEADS * 4 * (DIM + VALUE_DIM + 1)  # of q, out and lse
    assert found.kernels[0].bytes == in_sequences + rows_of_none + 2 * 8 * (BATCH + 1)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("before", [0, 2])
def test_rows_are_those_of_the_device_function(name, before, device):
    """Of masks whose tensors are too short for the longest sequence, or longer, too."""
    rng = random.Random(name)
    with device:
        given = packing(before)
        shape = Shape(BATCH, Q_HEADS, KV_HEADS, 90, 140, DIM, VALUE_DIM, Packing(*given.values()))
        masks = [MASKS[name](None), tilewise.Intervals(random_ends(rng, 0), random_ends(rng, 30))]
        masks += [tilewise.Documents(torch.randint(0, 3, sizes)) for sizes in ((9,), (BATCH, 60), (1, 1))]
    for mask in masks:
        if not isinstance(mask, tilewise.Mask):
            continue
        for part in parts_of([mask], shape):
            asked = evaluate(mask.bind(shape), part.shape, device, part.sequences)
            lo, hi = asked.lo.clamp(min=0), asked.hi.clamp(max=part.shape.kv_len)
            sees = (lo < hi).expand(part.shape.scores[:3])
            assert torch.equal(sees, (part.rows.lo < part.rows.hi).expand(sees.shape))
            for ours, theirs in ((part.rows.lo, lo), (part.rows.hi, hi), (part.rows.whole, asked.whole)):
                assert torch.equal(ours.expand(sees.shape)[sees], theirs.expand(sees.shape)[sees]), mask


def random_ends(rng: random.Random, least: int) -> torch.Tensor:
    """Broadcasts to [batch, q_heads, any length]."""
    sizes = [rng.choice((1, size)) for size in (BATCH, Q_HEADS)]
    return torch.randint(least, least + 20, (*sizes, rng.choice((1, 20, 70))))


@pytest.mark.parametrize(
    "name, tile",
    [
        ("no mask", Tile(16, 32)),
        ("causal", Tile(32, 16)),
        ("window", Tile(16, 16)),
        ("padding of each", Tile(16, 32)),
        ("documents", Tile(16, 16)),
    ],
)
def test_counts_are_the_steps_of_the_kernels(name, tile, device):
    is_square = tile.tile_q == tile.tile_kv  # as the tiles of a parameter's gradient are
    with device:
        q, k, _ = tensors()
        bias = torch.randn(Q_HEADS, 1, KV_LONGEST, requires_grad=is_square)
        call = Counted(tile, MASKS[name](None), q, k, bias=bias, **packing())
        with tilewise.tiles.use(tile):
            explained = tilewise.explain(q, k, k, **call.arguments, work="training", gpu="H200")
            found = call.found()
    pairs = zip(LENGTHS, KV_LENGTHS, strict=True)
    total = Q_HEADS * sum(ceil_div(n, tile.tile_q) * ceil_div(kv, tile.tile_kv) for n, kv in pairs)
    assert explained.exact and len(found) == 3 + is_square
    for kernel in explained.kernels:
        if kernel.tiles is not None:
            assert (kernel.tiles.visited, kernel.tiles.masked) == found.pop(kernel.name), kernel.name
            assert kernel.tiles.visited + kernel.tiles.skipped == kernel.tiles.total == total
    assert not found


def test_programs_are_the_grids_of_the_launches(device, monkeypatch):
    q, k, v = (x.to(device) for x in tensors())
    table = torch.randn(Q_HEADS, 32, device=device, requires_grad=True)
    arguments = {name: x.to(device) for name, x in packing().items()}
    arguments |= dict(mask=tilewise.Causal(), score=tilewise.RelativePosition(table))
    grids = launched_grids(monkeypatch, TRAINING_KERNELS)
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(q, k, v, **arguments, work="training", gpu="H200")
        request = request_of(q, k, v, **arguments, impl="portable")
        out, _, statistics = run_forward(request, True, True)
        needs = [True, True, True, *(t.requires_grad for _, t in request.other_tensors)]
        run_backward(request, out, statistics, out, None, needs)
    assert {kernel.name: kernel.programs for kernel in found.kernels} == grids
    tiles = sum(ceil_div(n, 16) for n in LENGTHS)
    assert found.kernels[0].busy == Q_HEADS * tiles < found.kernels[0].programs
    assert found.kernels[0].waves == found.kernels[0].busy / 132


def test_memory_is_what_the_launchers_allocate(device, monkeypatch):
    q, k, v = (x.to(device) for x in tensors())
    slopes = torch.rand(Q_HEADS, device=device, requires_grad=True)
    arguments = {name: x.to(device) for name, x in packing().items()} | dict(score=tilewise.ALiBi(slopes))
    prepared: list[prepare.BackwardCall] = []
    monkeypatch.setattr(
        passes, "prepare", lambda *args: prepared.append(prepare.prepare(*args)) or prepared[-1]
    )
    with tilewise.tiles.use(Tile(32, 32)):
        found = tilewise.explain(q, k, v, **arguments, work="training", gpu="H200")
        request = request_of(q, k, v, **arguments, impl="portable")
        out, lse, statistics = run_forward(request, True, True)
        needs = [True, True, True, *(t.requires_grad for _, t in request.other_tensors)]
        dq, dk, dv, dslopes = run_backward(request, out, statistics, out, None, needs)
    memory = {x.name: x.bytes for x in found.memory}
    assert memory.pop("sums of ALiBi.slopes") == 4 * prepared[0].ranges[..., 0].numel()
    assert memory == {
        "out": out.nbytes, "lse": lse.nbytes, "row statistics": statistics.nbytes,
        "delta": prepared[0].delta.nbytes, "ranges": prepared[0].ranges.nbytes,
        "dq": dq.nbytes, "dk and dv": dk.nbytes + dv.nbytes, "gradient of ALiBi.slopes": dslopes.nbytes,
    }  # fmt: skip


def test_cosine_computes_a_number_a_token():
    found = tilewise.explain(*tensors(), **packing(), similarity="cosine", gpu="H200")
    (factors,) = [x for x in found.memory if x.name == "1 / |q| and 1 / |k|"]
    assert factors.bytes == 4 * ((sum(LENGTHS) + 3) * Q_HEADS + (sum(KV_LENGTHS) + 5) * KV_HEADS)


def test_sequences_of_equal_length_are_counted_together():
    starts = torch.arange(0, 4001) * 16
    shape = Shape(4000, 8, 8, 64000, 64000, 64, 64, Packing(starts, None))
    (part,) = parts_of([tilewise.Causal()], shape)
    assert part.shape.batch == 4000 and part.rows.lo.shape == (1, 1, 16)


# ---- What is said of the sequences


@pytest.mark.parametrize("work", ["forward", "training"])
def test_nested_tensors_are_explained_as_what_they_pack(work):
    values, starts = torch.randn(128, 2, 64), torch.tensor([0, 100, 128])
    nested = torch.nested.nested_tensor_from_jagged(values, starts).transpose(1, 2)
    given = dict(mask=tilewise.Causal(), gpu="H200", work=work)
    found = tilewise.explain(nested, nested, nested, **given)
    assert found == tilewise.explain(values, values, values, q_offsets=starts, **given)
    assert (found.packed.sequences, found.packed.tokens, found.packed.longest) == (2, (128, 128), (100, 100))


def test_the_text_says_how_long_sequences_are_and_what_their_ends_cost():
    starts = torch.tensor([0, 100, 128, 300])
    q = meta(300, 2, 64)
    with tilewise.tiles.use(Tile(64, 64)):
        said = prose(tilewise.explain(q, q, q, q_offsets=starts, mask=tilewise.Causal(), gpu="H200"))
    assert said.startswith(
        "attention, forward: 3 packed sequences, q [300, 2, 64], k, v [300, 2, 64], bfloat16"
    )
    assert "3 packed sequences of 28 to 172 tokens each, 300 in all." in said
    assert "forward have 384 rows a head for 300 tokens, 21.9 % of them padding." in said
    # 300 // 64 + 3 + 2 numbers of tiles a head, of which 2 + 1 + 3 are a tile's
    assert "6 of 18 programs of forward have no tile" in said
    cross = prose(tilewise.explain(*tensors(meta), **packing(), gpu="H200"))
    assert (
        "5 packed sequences of 0 to 37 queries each, 80 in all, and 0 to 50 keys each, 123 in all." in cross
    )


def test_everything_is_json():
    found = tilewise.explain(*tensors(), **packing(), mask=tilewise.Causal(), work="training", gpu="H200")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["sizes"] == dict(
        batch=5, q_heads=4, kv_heads=2, q_len=83, kv_len=128, head_dim=16, value_dim=8
    )
    assert read["packed"] == dict(
        sequences=5, tokens=[80, 123], shortest=[0, 0], longest=[37, 50], assumed=False
    )
    dense = tilewise.explain(meta(1, 2, 8, 16), meta(1, 2, 8, 16), meta(1, 2, 8, 16))
    assert dense.packed is None and "packing" not in dense.sizes


# ---- Tensors and offsets without contents


def test_meta_tensors_are_counted_by_offsets_that_lie_elsewhere():
    found = tilewise.explain(*tensors(meta), **packing(), mask=tilewise.Causal(), work="training", gpu="H200")
    given = [x.bfloat16() for x in tensors()]
    real = tilewise.explain(*given, **packing(), mask=tilewise.Causal(), work="training", gpu="H200")
    assert not found.refused and not found.packed.assumed and found.packed == real.packed
    assert [k.programs for k in found.kernels] == [k.programs for k in real.kernels]
    assert found.pairs_that_count == real.pairs_that_count


def test_offsets_without_contents_stand_for_equal_lengths():
    q = meta(302, 2, 64)
    given = dict(mask=tilewise.Causal(), gpu="H200", work="training")
    found = tilewise.explain(q, q, q, q_offsets=meta(4, dtype=torch.int64), **given)
    assert found.packed.assumed and "sequences of equal length" in found.notes[0]
    same = tilewise.explain(q, q, q, q_offsets=torch.tensor([0, 101, 202, 302]), **given)
    assert not same.packed.assumed and not same.notes and found.kernels == same.kernels
    with FakeTensorMode():
        fake = torch.empty(302, 2, 64, device="cuda", dtype=torch.bfloat16)
        starts = torch.empty(4, device="cuda", dtype=torch.int64)
        inside = tilewise.explain(fake, fake, fake, q_offsets=starts, **given)
    assert inside.packed == found.packed and inside.implementation == "portable" and not inside.refused
    assert [k.tiles for k in inside.kernels] == [k.tiles for k in found.kernels]


def test_what_is_not_known_of_a_mask_counts_as_visited(monkeypatch):
    leave_interpreter(monkeypatch)
    q = meta(90, 2, 16)
    mask = tilewise.UserMask(even_keys, interval=even_keys)
    found = tilewise.explain(q, q, q, q_offsets=offsets((40, 50)), mask=mask, gpu="H200")
    assert not found.exact and found.kernels[0].tiles.skipped == found.kernels[0].tiles.full == 0
    (said,) = [note for note in found.notes if "UserMask" in note and "cannot run here" in note]
    assert "upper bounds" in said


# ---- What is refused


def test_wrong_ranks_and_offsets_raise_what_a_call_raises():
    x, starts = torch.randn(12, 2, 16), torch.tensor([0, 5, 12])
    wrong = (
        dict(q=x[None], k=x, v=x, q_offsets=starts),
        dict(q=x, k=x[0], v=x, q_offsets=starts),
        dict(q=x, k=x, v=x, q_offsets=starts.float()),
        dict(q=x, k=x[:7], v=x[:7], q_offsets=starts),
        dict(q=x, k=x, v=x, q_offsets=starts, kv_offsets=starts[:2]),
    )
    for given in wrong:
        raised = []
        for function in (tilewise.explain, tilewise.packed_attention):
            with pytest.raises(ValueError) as caught:
                function(**given)
            raised.append(str(caught.value))
        assert raised[0] == raised[1]
    with pytest.raises(ValueError, match="q_offsets=None must be a tensor"):
        tilewise.explain(x, x, x, kv_offsets=starts)
    with pytest.raises(TypeError, match=r"explain\(\) has no cu_seqlens="):
        tilewise.explain(x, x, x, cu_seqlens=starts)


@pytest.mark.parametrize(
    "starts, said", [([0, 9, 5, 12], "must not decrease"), ([0, 5, 13], "outside the 12")]
)
def test_offsets_that_mean_no_sequences_are_refused(starts, said):
    x = torch.randn(12, 2, 16)
    with pytest.raises(ValueError, match=said):
        tilewise.explain(x, x, x, q_offsets=torch.tensor(starts))


def test_heads_and_tokens_that_look_exchanged_are_noted():
    for q, is_noted in ((meta(32, 4096, 128), True), (meta(4096, 32, 128), False)):
        found = tilewise.explain(q, q, q, q_offsets=torch.tensor([0, q.shape[0]]), gpu="H200")
        assert any("give transpose(0, 1) of each" in note for note in found.notes) == is_noted
