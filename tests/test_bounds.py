"""Masks on the host: `bounds` against the device functions, counts of tiles against what kernels visit."""

from __future__ import annotations

import random

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from harness.counted import Counted
from tilewise.kernels.tile import Tile
from tilewise.parts.shape import Shape, ceil_div
from tilewise.plan.request import make_request
from tilewise.tools.explain.coverage import (
    evaluate,
    interval_of,
    keys_that_are_seen,
    pairs_that_count,
    rows_of,
    walk_over_keys,
    walk_over_rows,
)

MEANT_FOR_EVER = torch.iinfo(torch.int64).max
ALIGNS = ("bottom_right", "top_left")


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run."""
    with device:
        yield


def random_shape(rng: random.Random) -> Shape:
    kv_heads = rng.choice((1, 2))
    q_heads = kv_heads * rng.choice((1, 2))
    return Shape(rng.choice((1, 3)), q_heads, kv_heads, rng.randint(1, 40), rng.randint(0, 60), 16, 16)


def random_lengths(rng: random.Random, shape: Shape) -> int | torch.Tensor:
    """One for all, or one a sequence, some of them far outside."""
    if rng.random() < 0.4:
        return rng.choice((0, rng.randint(0, shape.kv_len), 1 << 40))
    sizes = [rng.randint(-3, shape.kv_len + 5) for _ in range(shape.batch)]
    sizes[0] = rng.choice((sizes[0], MEANT_FOR_EVER, -MEANT_FOR_EVER))
    return torch.tensor(sizes if rng.random() < 0.8 else sizes[:1])


def random_ints(rng: random.Random, shape: Shape, most: int) -> torch.Tensor:
    """Broadcasts to [batch, q_heads, q_len]; int32 or int64, with any strides."""
    sizes = [size if rng.random() < 0.7 else 1 for size in shape.scores[:3]]
    drawn = torch.randint(-5, most + 5, [2 * size for size in sizes])[::2, 1::2, ::2]
    return drawn.int() if rng.random() < 0.5 else drawn


def random_align(rng: random.Random, shape: Shape) -> str | int | torch.Tensor:
    """A corner, or where query 0 stands: a number, or one a sequence, some of them far outside."""
    if rng.random() < 0.4:
        return rng.choice((*ALIGNS, rng.randint(-50, 70)))
    sizes = [rng.randint(-50, 70) for _ in range(shape.batch)]
    sizes[0] = rng.choice((sizes[0], 1 << 29))
    return torch.tensor(sizes if rng.random() < 0.8 else sizes[:1])


MASKS = {
    "causal": lambda r, s: tilewise.Causal(random_align(r, s)),
    "window": lambda r, s: tilewise.Window(
        r.choice((None, 0, 7, 50)), r.choice((None, 0, 3)), align=random_align(r, s)
    ),
    "prefix": lambda r, s: tilewise.Prefix(random_lengths(r, s), align=random_align(r, s)),
    "padding": lambda r, s: tilewise.Padding(random_lengths(r, s), side=r.choice(("left", "right"))),
    "intervals": lambda r, s: tilewise.Intervals(random_ints(r, s, s.kv_len), random_ints(r, s, s.kv_len)),
    "documents": lambda r, s: tilewise.Documents(
        torch.randint(0, 4, (r.choice((1, s.batch)), s.q_len)),
        torch.randint(0, 4, (r.choice((1, s.batch)), s.kv_len)).sort(-1).values,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_bounds_are_those_of_the_device_function(name, device):
    rng = random.Random(name)
    for _ in range(15):
        shape = random_shape(rng)
        mask = MASKS[name](rng, shape)
        bounds = mask.bounds(shape)
        assert [x.dtype for x in bounds] == [torch.int64, torch.int64, torch.bool]
        assert all(x.device.type == "cpu" for x in bounds)
        asked = evaluate(mask.bind(shape), shape, device)
        for ours, theirs in zip(bounds, asked, strict=True):
            assert torch.equal(ours.expand(shape.scores[:3]), theirs), (mask, shape)


@triton.jit
def all_pairs(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx >= 0)


class OwnMask(tilewise.Mask):
    """What a user's subclass without bounds is."""

    def bind(self, shape):
        return tilewise.Causal().bind(shape)


def test_masks_without_bounds():
    shape = Shape(1, 1, 1, 5, 7, 16, 16)
    assert tilewise.Dense(torch.ones(5, 7, dtype=torch.bool)).bounds(shape) is None
    assert tilewise.UserMask(all_pairs).bounds(shape) is None
    assert OwnMask().bounds(shape) is None
    # It has an interval all the same, which is asked where kernels run.
    assert torch.equal(rows_of([OwnMask()], shape).hi, rows_of([tilewise.Causal()], shape).hi)


def test_an_interval_that_cannot_run_here_is_named(monkeypatch):
    monkeypatch.setattr("tilewise.tools.explain.coverage.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = Shape(1, 1, 1, 40, 40, 16, 16)
    rows = rows_of([tilewise.Window(3, 3), OwnMask()], shape)
    (reason,) = rows.unknown
    assert "OwnMask" in reason and "cannot run here" in reason
    assert not rows.whole.any() and torch.equal(rows.lo, rows_of([tilewise.Window(3, 3)], shape).lo)


def test_tiles_that_the_device_lists_are_named():
    mask = tilewise.Blocks(torch.ones(1, 3, dtype=torch.bool), 16)
    rows = rows_of([mask], Shape(1, 1, 1, 40, 40, 16, 16))
    assert "Blocks" in rows.unknown[0] and "leaves out" in rows.unknown[0]


def test_tensors_without_contents_are_named():
    mask = tilewise.Padding(torch.empty(1, dtype=torch.int64, device="meta"))
    assert "no contents" in interval_of(mask, Shape(1, 1, 1, 4, 4, 16, 16))
    dense = tilewise.Dense(torch.empty(4, 4, dtype=torch.bool, device="meta"))
    assert interval_of(dense, Shape(1, 1, 1, 4, 4, 16, 16)) is None


# ---- What the kernels do, counted by the kernels


SHAPE = Shape(2, 2, 1, 37, 50, 16, 16)
WIDE, TALL = Tile(16, 32), Tile(32, 16)
COUNTED = {
    "no mask": (WIDE, lambda: None),
    "causal": (WIDE, lambda: tilewise.Causal()),
    "causal, tall tiles": (TALL, lambda: tilewise.Causal()),
    "more queries than keys": (TALL, lambda: tilewise.Causal("top_left") & tilewise.Padding(20)),
    "window": (TALL, lambda: tilewise.Window(20, 3)),
    "padding": (WIDE, lambda: tilewise.Padding(torch.tensor([50, 33]))),
    "intervals of heads": (
        TALL,
        lambda: tilewise.Intervals(
            torch.tensor([[0], [30]])[None], torch.arange(37) + torch.tensor([[5], [20]])
        ),
    ),
    "documents": (WIDE, lambda: tilewise.Documents(torch.arange(37) // 20, torch.arange(50) // 25)),
    "documents in pieces": (
        TALL,
        lambda: tilewise.Documents(torch.arange(37) % 3, torch.arange(50) // 9 % 3),
    ),
    "nothing": (WIDE, lambda: tilewise.Padding(0)),
    "an own interval": (WIDE, lambda: OwnMask()),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_the_steps_of_the_kernels(name):
    tile, make = COUNTED[name]
    q, k = torch.randn(2, 2, 37, 16), torch.randn(2, 1, 50, 16)
    call = Counted(tile, make(), q, k)
    with tilewise.tiles.use(tile):
        explained = tilewise.explain(q, k, k, **call.arguments, work="training", gpu="H200")
        found = call.found()
    assert explained.exact
    for kernel in explained.kernels:
        if kernel.tiles is not None:
            assert (kernel.tiles.visited, kernel.tiles.masked) == found.pop(kernel.name), kernel.name
            total = ceil_div(37, tile.tile_q) * ceil_div(50, tile.tile_kv) * 4
            assert kernel.tiles.total == total == kernel.tiles.visited + kernel.tiles.skipped
    assert not found


def test_counts_of_a_bias_gradient_are_the_steps_of_its_kernel():
    q, k = torch.randn(1, 1, 45, 16), torch.randn(1, 1, 70, 16)
    call = Counted(Tile(16, 16), tilewise.Causal(), q, k, bias=torch.randn(45, 70).requires_grad_())
    with tilewise.tiles.use(call.tile):
        explained = tilewise.explain(q, k, k, **call.arguments, work="training", gpu="H200")
        found = call.found()
    kernel = explained.kernels[-1]
    assert kernel.name == "gradient of Bias.bias"
    assert found[kernel.name] == (kernel.tiles.visited, kernel.tiles.masked) and kernel.tiles.full == 0
    assert kernel.programs == 3 * 5  # each owns a tile of the bias


@pytest.mark.parametrize("name", ["causal", "window", "padding", "intervals of heads", "documents"])
def test_pairs_and_keys_against_the_dense_mask(name):
    shape = SHAPE._replace(kv_heads=1)
    mask = COUNTED[name][1]()
    q, k = torch.empty(1).expand(2, 2, 37, 16), torch.empty(1).expand(2, 1, 50, 16)
    request = make_request(q, k, k, mask=mask)
    index = [
        torch.arange(n).view([-1 if a == i else 1 for i in range(4)]) for a, n in enumerate(shape.scores)
    ]
    kept = torch.stack([part.twin(shape)(*index).expand(shape.scores) for part in request.masks]).all(0)
    rows = rows_of(request.masks, shape)
    assert pairs_that_count(rows, shape) == int(kept.sum())
    seen = kept.any(2).any(1)  # [batch, kv_len]; both heads share theirs
    spans = [(keys.nonzero().max() + 1 - keys.nonzero().min()).item() for keys in seen]
    assert keys_that_are_seen(rows, shape) == sum(spans)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("heads_differ", [False, True])
def test_counting_takes_memory_linear_in_length(heads_differ):
    shape = Shape(4, 8, 8, 1 << 13, 1 << 13, 64, 64)
    starts = torch.arange(8)[:, None] if heads_differ else torch.zeros(1, dtype=torch.int64)
    with Largest() as largest:
        rows = rows_of([tilewise.Causal(), tilewise.Intervals(starts, torch.tensor(9000))], shape)
        over_keys = walk_over_keys(rows, shape, 128, 64)
        over_rows = walk_over_rows(rows, shape, 64, 128)
    assert largest.elements <= (8 if heads_differ else 1) * shape.q_len
    if not heads_differ:  # tiles of 128 rows see 2, 4, 6 … of 64 keys; two of these are cut
        assert over_keys.visited == 32 * sum(2 * (i + 1) for i in range(64)) and over_keys.masked == 32 * 128
        assert over_rows.visited == 32 * sum(128 - 2 * i for i in range(64))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_count(sizes):
    shape = Shape(2, 2, 2, *sizes, 16, 16)
    rows = rows_of([tilewise.Causal()], shape)
    assert walk_over_keys(rows, shape, 16, 16).total == walk_over_rows(rows, shape, 16, 16).total == 0
    assert pairs_that_count(rows, shape) == keys_that_are_seen(rows, shape) == 0
