"""`tilewise.explain` of caches: launches, tiles, bytes and memory are those of the calls."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from harness.counted import Counted
from harness.explained import launched_grids, leave_interpreter, meta, prose
from tilewise.kernels.tile import Tile
from tilewise.parts.shape import ceil_div
from tilewise.plan import passes
from tilewise.plan.request import cached_request

Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8
GROUP = Q_HEADS // KV_HEADS
LENGTHS, CAPACITY = (37, 0, 120, 75, 37), 128
BATCH, PAGE = len(LENGTHS), 16
Q_LENGTHS = (3, 0, 1, 20, 3)
LAYOUTS = ("decoding", "a few", "pages", "packed")
SPLITS = (None, 32, 48)


@pytest.fixture(autouse=True)
def as_on_the_chip(monkeypatch):
    """A launch here splits the keys as the chip that is explained does."""
    monkeypatch.setattr(passes, "multiprocessors", lambda device: 132)


def call(layout: str, device="cpu") -> tuple[list, dict]:
    """q, the caches and the other arguments."""
    lens = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    caches = [torch.randn(BATCH, KV_HEADS, CAPACITY, dim, device=device) for dim in (DIM, VALUE_DIM)]
    q = torch.randn(BATCH, Q_HEADS, 1 if layout == "decoding" else 11, DIM, device=device)
    arguments = dict(kv_lens=lens)
    if layout == "pages":
        count = CAPACITY // PAGE
        caches = [torch.randn(50, PAGE, KV_HEADS, dim, device=device) for dim in (DIM, VALUE_DIM)]
        arguments["pages"] = torch.randperm(50, device=device)[: BATCH * count].view(BATCH, count)
    if layout == "packed":
        q = torch.randn(sum(Q_LENGTHS) + 2, Q_HEADS, DIM, device=device)
        arguments["q_offsets"] = torch.tensor([0, *Q_LENGTHS], device=device).cumsum(0)
    return [q, *caches], arguments


def q_lengths(layout: str) -> tuple[int, ...]:
    return Q_LENGTHS if layout == "packed" else (1 if layout == "decoding" else 11,) * BATCH


@pytest.mark.parametrize("split_size", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_are_the_grids_of_the_launches(layout, split_size, device, monkeypatch):
    grids = launched_grids(monkeypatch, {name: f"{name}.{name}" for name in ("forward", "combine")})
    given, arguments = call(layout, device)
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(*given, **arguments, split_size=split_size, gpu="H200")
        request = cached_request(*given, **arguments, split_size=split_size, impl="portable")
        passes.run_forward(request, False)
    assert {kernel.name: kernel.programs for kernel in found.kernels} == grids
    assert [kernel.name for kernel in found.kernels] == ["forward", "combine"]
    size = split_size or 32  # four programs at most, of two tiles of keys by the capacity: 128 // 64 = 2
    splits = ceil_div(CAPACITY, size) if split_size else 2
    assert found.cached.splits == splits
    busy = 0
    for q_len, kv_len in zip(q_lengths(layout), LENGTHS, strict=True):
        own = size if split_size else ceil_div(ceil_div(kv_len, 2), 32) * 32
        busy += KV_HEADS * ceil_div(GROUP * q_len, 16) * max(1, ceil_div(kv_len, own) if kv_len else 0)
    assert found.kernels[0].busy == busy < found.kernels[0].programs


MASKS = {
    "no mask": None,
    "causal": tilewise.Causal(),
    "window": tilewise.Window(20, 3),
    "padding": tilewise.Padding(torch.tensor([30, 3, 99, 75, 0])),
    "of each head": tilewise.Intervals(torch.tensor([0, 3, 6, 40])[:, None], torch.tensor(77)),
}


@pytest.mark.parametrize("split_size", SPLITS)
@pytest.mark.parametrize("layout", ["decoding", "a few", "packed"])
@pytest.mark.parametrize("name", MASKS)
def test_counts_are_the_steps_of_the_kernel(name, layout, split_size, device):
    """Of splits that are no multiple of a tile of keys, and of heads that see other keys than their group."""
    tile, mask = Tile(16, 32), MASKS[name]
    (q, k, _), arguments = call(layout)
    with device, tilewise.tiles.use(tile):
        q, k = q.to(device), k.to(device)
        arguments = {key: x.to(device) for key, x in arguments.items()}
        counted = Counted(tile, mask, q, k, **arguments, split_size=split_size)
        found = tilewise.explain(q, k, k, **counted.arguments, gpu="H200")
        _, steps = counted.steps(lambda: passes.run_forward(counted.request, False))
    kernel, _ = found.kernels
    assert found.exact and (kernel.tiles.visited, kernel.tiles.masked) == steps
    assert kernel.tiles.skipped + kernel.tiles.visited == kernel.tiles.total
    if mask is None:
        assert kernel.tiles.skipped == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_that_of_all_sequences_alone(layout):
    given, arguments = call(layout)
    mask = tilewise.Causal()
    found = tilewise.explain(*given, **arguments, mask=mask, split_size=32, gpu="H200")
    alone = []
    for q_len, kv_len in zip(q_lengths(layout), LENGTHS, strict=True):
        sizes = ((Q_HEADS, q_len, DIM), (KV_HEADS, kv_len, DIM), (KV_HEADS, kv_len, VALUE_DIM))
        one = [meta(1, *each, dtype=torch.float32) for each in sizes]
        alone.append(tilewise.explain(*one, mask=mask, gpu="H200"))
    assert found.pairs_that_count == sum(e.pairs_that_count for e in alone)
    assert found.pairs == sum(e.pairs for e in alone) and found.flops == sum(e.flops for e in alone)
    assert found.kernels[0].flops == sum(e.kernels[0].flops for e in alone)
    assert found.kernels[1].flops == found.kernels[1].executed_flops == 0


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_and_memory(layout, return_lse, device, monkeypatch):
    """Keys and values that sequences have, what each split writes, and what combine makes of it."""
    given, arguments = call(layout, device)
    kept: list = []
    real = passes.launch_combine
    monkeypatch.setattr(passes, "launch_combine", lambda *args: kept.append(args) or real(*args))
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(*given, **arguments, gpu="H200", return_lse=return_lse)
        passes.run_forward(cached_request(*given, **arguments, impl="portable"), return_lse)
    ((parts, parts_lse, out, lse),) = kept
    wanted = {"out": out.nbytes, "out of each split": parts.nbytes, "lse of each split": parts_lse.nbytes}
    results = out.nbytes + (lse.nbytes if return_lse else 0)
    assert {x.name: x.bytes for x in found.memory} == wanted | ({"lse": lse.nbytes} if return_lse else {})
    forward, combine = found.kernels
    queried = [kv_len for q_len, kv_len in zip(q_lengths(layout), LENGTHS, strict=True) if q_len]
    keys = KV_HEADS * sum(queried) * 4 * (DIM + VALUE_DIM)
    tables = sum(x.nbytes for x in arguments.values())
    assert forward.bytes == given[0].nbytes + keys + tables + parts.nbytes + parts_lse.nbytes
    assert combine.bytes == parts.nbytes + parts_lse.nbytes + results


def test_a_chip_with_enough_programs_splits_nothing():
    given = [meta(256, 32, 1, 128), *(meta(256, 8, 4096, 128) for _ in "kv")]
    lens = torch.full((256,), 1000)
    found = tilewise.explain(*given, kv_lens=lens, gpu="H200")
    assert [kernel.name for kernel in found.kernels] == ["forward"] and found.cached.splits == 1
    assert found.cached.split_keys == 1000 and "keys are in one piece" in prose(found)
    few = [x[:4] for x in given]
    on = {gpu: tilewise.explain(*few, kv_lens=lens[:4], gpu=gpu).cached.splits for gpu in ("H200", "A100")}
    assert on == {"H200": ceil_div(2 * 132, 32), "A100": ceil_div(2 * 108, 32)}


# ---- What is said


def test_the_text_says_how_full_the_cache_is_and_how_programs_share_it():
    given, arguments = call("pages")
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(*given, **arguments, gpu="H200")
    said = prose(found)
    assert said.startswith(
        "cached attention, forward: 5 sequences, q [5, 4, 11, 16], cache_k [50, 16, 2, 16], "
        "cache_v [50, 16, 2, 8], float32"
    )
    assert "5 sequences of 0 to 120 keys each, 269 in all, and room for 128 each." in said
    assert f"Pages of 16 rows: {3 + 8 + 5 + 3} in use, of 50 that the cache has." in said
    assert "A tile has 16 rows, for 22 that a sequence has in the 2 heads of a group" in said
    assert "keys are split over 2 programs, at most 64 keys each; combine joins" in said
    # two tiles of rows a head of keys, each with two splits; the sequence without keys needs one of them
    assert "4 of 40 programs of forward have no rows or no keys" in said
    packed = prose(tilewise.explain(*call("packed")[0], **call("packed")[1], gpu="H200"))
    assert "q [29, 4, 16], cache_k [5, 2, 128, 16]" in packed and "for up to 40 that" in packed


def test_everything_is_json():
    given, arguments = call("pages")
    found = tilewise.explain(*given, **arguments, split_size=48, gpu="H200")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["cached"] == dict(
        sequences=5, capacity=128, keys=269, shortest=0, longest=120, assumed=False, page_size=16, pages=50,
        pages_in_use=19, rows=22, splits=3, split_keys=48,
    )  # fmt: skip
    assert read["sizes"] == dict(
        batch=5, q_heads=4, kv_heads=2, q_len=11, kv_len=128, head_dim=16, value_dim=8
    )
    dense = tilewise.explain(meta(1, 2, 8, 16), meta(1, 2, 8, 16), meta(1, 2, 8, 16))
    assert dense.cached is None and "cache" not in dense.sizes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_without_contents_stand_for_full_caches(layout):
    given, arguments = call(layout)
    full = torch.full((BATCH,), CAPACITY)
    same = tilewise.explain(*given, **arguments | dict(kv_lens=full), mask=tilewise.Causal(), gpu="H200")
    arguments["kv_lens"] = meta(BATCH, dtype=torch.int64)
    metas = [x.to("meta") for x in given]
    found = tilewise.explain(*metas, **arguments, mask=tilewise.Causal(), gpu="H200")
    assert found.cached.assumed and not same.cached.assumed and not found.refused
    assert found.kernels == same.kernels and "the lengths have no contents here" in found.notes[0]
    assert not same.notes
    with FakeTensorMode():
        fakes = [torch.empty(x.shape, device="cuda") for x in given]
        lens = torch.empty(BATCH, device="cuda", dtype=torch.int64)
        others = {k: torch.empty(x.shape, device="cuda", dtype=x.dtype) for k, x in arguments.items()}
        inside = tilewise.explain(*fakes, **others | dict(kv_lens=lens), gpu="H200")
    assert inside.cached.assumed and inside.implementation == "portable" and not inside.refused


def test_what_is_appended_is_not_counted():
    given, arguments = call("decoding")
    new = dict(new_k=torch.zeros(BATCH, KV_HEADS, 1, DIM), new_v=torch.zeros(BATCH, KV_HEADS, 1, VALUE_DIM))
    plain = tilewise.explain(*given, **arguments, gpu="H200")
    found = tilewise.explain(*given, **arguments, **new, gpu="H200")
    assert found.kernels == plain.kernels and not plain.notes
    assert found.notes == ("what new_k, new_v and rotary add is not counted",)
    with pytest.raises(ValueError, match=r"new_v=None must be a tensor"):
        tilewise.explain(*given, **arguments, new_k=new["new_k"])


def test_a_chip_that_no_tile_fits_splits_nothing(monkeypatch):
    def nothing_fits(*_):
        raise NotImplementedError("too little shared memory")

    monkeypatch.setattr("tilewise.tools.explain.as_workload.arch_choice", nothing_fits)
    given, arguments = call("a few")
    found = tilewise.explain(*given, **arguments, gpu="H200")
    assert not found.kernels and found.no_kernels == "too little shared memory"
    assert (found.cached.splits, found.cached.split_keys, found.cached.keys) == (1, 120, 269)
    assert "No kernel on an H200: too little shared memory" in prose(found)


def test_plain_pytorch_holds_the_scores_of_one_sequence(monkeypatch):
    leave_interpreter(monkeypatch)
    for layout in LAYOUTS:
        given, arguments = call(layout)
        found = tilewise.explain(*given, **arguments, gpu="H200", score=tilewise.Softcap(2.0))
        pairs = max(q * kv for q, kv in zip(q_lengths(layout), LENGTHS, strict=True))
        assert found.implementation == "torch"
        assert [x.bytes for x in found.memory_here] == [4 * Q_HEADS * pairs]


# ---- What is refused


def test_wrong_arguments_raise_what_a_call_raises():
    (q, k, v), arguments = call("pages")
    wrong = (
        dict(kv_lens=torch.zeros(BATCH)), dict(kv_lens=torch.zeros(2, dtype=torch.int32)), dict(pages=3),
        dict(pages=torch.zeros(2, 2, dtype=torch.int32)), dict(split_size=8), dict(scale="big"),
    )  # fmt: skip
    for changes in wrong:
        raised = []
        for function in (tilewise.explain, tilewise.cached_attention):
            with pytest.raises(ValueError) as caught:
                function(q, k, v, **arguments | changes)
            raised.append(str(caught.value))
        assert raised[0] == raised[1] == tilewise.why_not(q, k, v, **arguments | changes)[0]
    with pytest.raises(ValueError, match="has no gradient: explain it with work='forward'"):
        tilewise.explain(q, k, v, **arguments, work="training")
    with pytest.raises(ValueError, match="go with kv_lens, as in cached_attention"):
        tilewise.explain(q, k, v, pages=arguments["pages"])
    with pytest.raises(TypeError, match=r"cached_attention\(\) has no kv_offsets="):
        tilewise.explain(q, k, v, **arguments, kv_offsets=arguments["kv_lens"])


def test_why_not_lists_every_reason_against_a_cached_call():
    (q, k, v), arguments = call("packed")
    assert tilewise.why_not(q, k, v, **arguments, return_lse=True) == []
    reasons = tilewise.why_not(
        q, k, v, **arguments | dict(kv_lens=0.5), split_size=7, mask="causal", cu_seqlens=1, scale=math.nan
    )
    words = (
        "cached_attention() has no cu_seqlens=",
        "mask='causal'",
        "kv_lens=0.5",
        "split_size=7",
        "scale=nan",
    )
    assert len(reasons) == len(words)
    for word, reason in zip(words, reasons, strict=True):
        assert word in reason
    new = torch.zeros(29, KV_HEADS, DIM)
    (reason,) = tilewise.why_not(q, k, v, **arguments, new_k=new, new_v=new)
    assert reason == "new_v.shape=(29, 2, 16) must be [29, 2, 8]"
    assert "must have 3 dimensions" in tilewise.why_not(q[None], k, v, **arguments)[0]
