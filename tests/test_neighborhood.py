"""Masks of space: neighborhoods and blocks against what their sentences say, point by point."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import tilewise
from harness.features import build, judge
from harness.oracle import check, kept_pairs
from tilewise import BlockCausal, Causal, Neighborhood, Window
from tilewise.kernels.tile import Tile
from tilewise.parts.masks.neighborhood import divisor
from tilewise.plan.request import make_request
from tilewise.tools.explain.coverage import evaluate


def seen_along(x: int, length: int, size: int, dilation: int, causal: bool) -> set[int]:
    """The points of an axis that the one at x sees: of its group, the `size` nearest that stand together,
    the one before the query first where there are two."""
    group = [y for y in range(length) if (y - x) % dilation == 0]
    place = group.index(x)
    if causal:
        return set(group[max(0, place - size + 1) : place + 1])
    runs = [range(first, first + size) for first in range(len(group) - size + 1)]
    wanted = place - size // 2  # half of them before the query, if no border is near
    return {group[i] for i in min(runs, key=lambda run: abs(run[0] - wanted))}


def points_seen(mask: Neighborhood) -> torch.Tensor:
    """The pairs of the grid that count, by loops over its points."""
    points = list(itertools.product(*map(range, mask.shape)))
    kept = torch.zeros(len(points), len(points), dtype=torch.bool)
    for q, at in enumerate(points):
        axes = zip(at, mask.shape, mask.size, mask.dilation, mask.causal, strict=True)
        along = [seen_along(*axis) for axis in axes]
        for k, other in enumerate(points):
            kept[q, k] = all(y in seen for y, seen in zip(other, along, strict=True))
    return kept


GRIDS = [
    Neighborhood(3, shape=(11,)),
    Neighborhood(4, shape=(11,)),
    Neighborhood(3, 2, shape=(7, 9)),
    Neighborhood((2, 5), (3, 1), shape=(8, 6)),
    Neighborhood((3, 4), shape=(5, 8), causal=(True, False)),
    Neighborhood((2, 3, 3), (1, 1, 2), shape=(3, 4, 7), causal=(True, False, True)),
    Neighborhood((1, 2, 4), shape=(1, 2, 4)),
]


@pytest.mark.parametrize("mask", GRIDS, ids=repr)
def test_a_query_sees_the_nearest_points(mask, device):
    wanted = points_seen(mask)
    n = len(wanted)
    x = torch.randn(1, 1, n, 16, device=device)
    request = make_request(x, x, x, mask=mask)
    assert torch.equal(kept_pairs(request)[0, 0].cpu(), wanted)
    if not any(mask.causal):  # none sees fewer
        assert (wanted.sum(1) == torch.tensor(mask.size).prod()).all()
    # The kernels' own functions: rows that are one-hot keys show who is seen.
    values = torch.eye(n, device=device)[None, None]
    with tilewise.tiles.use(Tile(16, 16)):
        out = tilewise.attention(x, x, values, mask=mask, impl="portable")
    assert torch.equal(out[0, 0].cpu() > 0, wanted)
    lo, hi, whole = (each.expand(1, 1, n)[0, 0] for each in mask.bounds(request.shape))
    for row, (first, stop, is_whole) in enumerate(zip(lo.tolist(), hi.tolist(), whole.tolist(), strict=True)):
        keys = wanted[row].nonzero()[:, 0]
        assert (first, stop) == (int(keys[0]), int(keys[-1]) + 1), "an interval ends where its keys do"
        assert is_whole == (len(keys) == stop - first)
    for ours, theirs in zip(
        (lo, hi, whole), evaluate(mask.bind(request.shape), request.shape, device), strict=True
    ):
        assert torch.equal(ours, theirs[0, 0])


def test_gradients_and_lists_of_tiles(device):
    """Over a grid wide enough for tiles between those that count to be left out, in a part of the calls."""
    for seed, mask in enumerate((Neighborhood((3, 5), shape=(3, 34)), ~Neighborhood((3, 8), shape=(3, 34)))):
        p = build(device, random.Random(seed), [], batch=1, q_heads=1, kv_heads=1, q_len=102, kv_len=102)
        p.mask = mask
        judge(p, backward=seed == 0)


@pytest.mark.parametrize("rows", ["packed_rows", "cached_rows"])
def test_a_sequence_has_the_first_points_of_the_grid(rows, device):
    """In a cache the last query stands at the last key, as far as a video has been made."""
    p = build(device, random.Random(5), [rows], q_len=12 if rows == "cached_rows" else 36, kv_len=36)
    p.mask = Neighborhood((2, 3, 3), shape=(3, 3, 4), causal=(True, False, False))
    judge(p)


def test_dividing_by_a_multiplication():
    rng = random.Random(0)
    for d in (*range(1, 300), *[rng.randrange(1, 1 << 29) for _ in range(300)], (1 << 29) - 1, 1 << 28):
        m, s = divisor(d)
        assert 0 < m < 1 << 31
        for n in (0, d - 1, d, 2 * d - 1, (1 << 30) // d * d - 1, rng.randrange(1 << 30), (1 << 30) - 1):
            assert n >= 1 << 30 or (4 * n * m >> 32) >> s == n // d, (n, d)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Neighborhood(3, 2, shape=(9, 5)), r"dilation=2 along axis 1 need 6 points.*at most 2"),
        (lambda: Neighborhood((3, 3), shape=(9,)), r"size=\(3, 3\) must be an int of at least 1"),
        (lambda: Neighborhood(0, shape=(9,)), "size=0 must be an int of at least 1"),
        (lambda: Neighborhood(3, shape=12), "shape=12 must be the lengths of the axes"),
        (lambda: Neighborhood(3, shape=(4, 5), causal=(1, 0)), r"causal=\(1, 0\) must be a bool"),
        (lambda: Neighborhood(3, shape=(4100, 4100, 4100)), "takes 42 bits"),
        (lambda: BlockCausal(0), "block=0 must be an int from 1"),
        (lambda: BlockCausal(4, 0), "window=0 must be None"),
        (lambda: BlockCausal(4, align="left"), "align='left' must be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_grid_has_as_many_points_as_there_are_keys(device):
    x = torch.zeros(1, 1, 21, 16, device=device)
    (said,) = tilewise.why_not(x, x, x, mask=Neighborhood(3, shape=(4, 5)))
    assert "Neighborhood: shape=(4, 5) has 4 · 5 = 20 points, and kv_len=21 must be equal" in said


# ---- Blocks of positions


@pytest.mark.parametrize("window", [None, 1, 3])
def test_frames_see_the_frames_before(window, device):
    """By loops over frames and their tokens, from any position on."""
    frames, block = 5, 7
    wanted = torch.zeros(frames, block, frames, block, dtype=torch.bool)
    for own in range(frames):
        for other in range(frames):
            wanted[own, :, other] = other <= own and (window is None or other > own - window)
    wanted = wanted.reshape(35, 35).to(device)
    q, k = torch.randn(2, 2, 19, 16, device=device), torch.randn(2, 1, 35, 16, device=device)
    for align, first in (("bottom_right", 16), ("top_left", 0), (-4, -4)):
        rows = torch.arange(first, first + 19, device=device)
        kept = wanted[rows.clamp(min=0)] & (rows >= 0)[:, None]
        mask = BlockCausal(block, window, align)
        assert torch.equal(kept_pairs(make_request(q, k, k, mask=mask))[0, 0], kept)
        with tilewise.tiles.use(Tile(16, 16)):
            check(q, k, k, mask=mask)


def test_blocks_of_one_token_are_causal(device):
    q = torch.randn(1, 2, 33, 16, device=device)
    with tilewise.tiles.use(Tile(16, 16)):
        for mask, same in ((BlockCausal(1), Causal()), (BlockCausal(1, 4), Window(3, 0))):
            assert torch.equal(check(q, q, q, mask=mask)[0], check(q, q, q, mask=same)[0])


@pytest.mark.parametrize("rows", ["packed_apart", "paged_rows"])
def test_blocks_of_packed_and_cached_sequences(rows, device):
    p = build(device, random.Random(2), [rows], q_len=18, kv_len=33)
    p.mask = BlockCausal(6, 2) & BlockCausal(9)
    judge(p, backward=True)


def test_gaps_that_a_mask_beside_it_leaves_are_known(device):
    """Of each block of 8 two rows see a key: those between, which nobody sees, may be NaN."""
    q, v = torch.randn(1, 1, 32, 16, device=device), torch.randn(1, 1, 32, 16, device=device)
    mask = BlockCausal(8) & Window(0, 0, 6)
    hidden = ~kept_pairs(make_request(q, q, v, mask=mask))[0, 0].any(0)
    assert hidden.any()
    with tilewise.tiles.use(Tile(16, 16)):
        clean, dirty = (
            tilewise.attention(q, q, v.masked_fill(hidden[:, None], junk), mask=mask, impl="portable")
            for junk in (0.0, torch.nan)
        )
    assert torch.equal(clean, dirty)
