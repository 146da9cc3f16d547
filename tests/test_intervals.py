"""Which key tiles are visited, and in which of them no mask is asked: the arithmetic against brute force."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from tilewise.parts.intervals import intersect_intervals, kv_range
from tilewise.parts.masks.causal import causal_interval
from tilewise.parts.masks.documents import document_hulls
from tilewise.parts.masks.intervals import rows_interval

ROWS, TILE = 16, 16
LENGTHS = [0, 1, 15, 16, 17, 48, 61, 100]


@triton.jit
def range_kernel(lo_ptr, hi_ptr, whole_ptr, kv_len_ptr, found_ptr, ROWS: tl.constexpr, TILE_KV: tl.constexpr):
    """kv_range of one case a program."""
    case = tl.program_id(0)
    rows = case * ROWS + tl.arange(0, ROWS)
    whole = tl.load(whole_ptr + rows) != 0
    start, stop, first, full_first, full_last, last = kv_range(
        tl.load(lo_ptr + rows), tl.load(hi_ptr + rows), whole, tl.load(kv_len_ptr + case), TILE_KV
    )
    found_ptr += case * 6
    tl.store(found_ptr, start)
    tl.store(found_ptr + 1, stop)
    tl.store(found_ptr + 2, first)
    tl.store(found_ptr + 3, full_first)
    tl.store(found_ptr + 4, full_last)
    tl.store(found_ptr + 5, last)


def one_case(kind: str, rng: random.Random) -> tuple[int, list[int], list[int], list[bool]]:
    """kv_len and, for each of ROWS rows, lo, hi and whole as intersect_intervals may give them."""
    kv_len = rng.choice(LENGTHS)
    if kind == "causal":
        shift = rng.randint(-20, kv_len)
        return kv_len, [0] * ROWS, [min(kv_len, i + shift + 1) for i in range(ROWS)], [True] * ROWS
    if kind == "window":
        shift, left, right = rng.randint(-20, kv_len), rng.randint(0, 50), rng.randint(0, 50)
        lo = [max(0, i + shift - left) for i in range(ROWS)]
        return kv_len, lo, [min(kv_len, i + shift + right + 1) for i in range(ROWS)], [True] * ROWS
    if kind == "all":
        return kv_len, [0] * ROWS, [kv_len] * ROWS, [True] * ROWS
    if kind == "nothing":
        lo = [rng.randint(0, kv_len + 40) for _ in range(ROWS)]
        return kv_len, lo, [x - rng.randint(0, 3) for x in lo], [rng.random() < 0.8 for _ in range(ROWS)]
    # "any": every row its own; in some cases narrow ones, in some an empty one, in some one that is not whole
    narrow, empty, in_parts = (rng.choice([0.0, share]) for share in (0.7, 0.05, 0.05))
    lo, hi, whole = [], [], []
    for _ in range(ROWS):
        start, stop = rng.randint(0, kv_len // 3), rng.randint(kv_len - kv_len // 3, kv_len)
        if rng.random() < narrow:
            start, stop = rng.randint(0, kv_len), rng.randint(0, kv_len)
        lo.append(start)
        hi.append(start - rng.randint(0, 3) if rng.random() < empty else stop)
        whole.append(rng.random() >= in_parts)
    return kv_len, lo, hi, whole


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ["causal", "window", "all", "nothing", "any"])
def test_kv_range_visits_what_is_needed_once(kind, device):
    rng = random.Random(kind)
    cases = [one_case(kind, rng) for _ in range(80)]
    kv_lens, los, his, wholes = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in zip(*cases, strict=True)
    )
    found = torch.zeros(len(cases), 6, dtype=torch.int32, device=device)
    range_kernel[(len(cases),)](los, his, wholes, kv_lens, found, ROWS=ROWS, TILE_KV=TILE)

    full_tiles = 0
    for case, numbers in zip(cases, found.tolist(), strict=True):
        kv_len, lo, hi, whole = case
        start, stop, first, full_first, full_last, last = numbers
        pairs = {key for a, b in zip(lo, hi, strict=True) for key in range(a, b)}
        assert pairs <= set(range(kv_len)), "the case itself is wrong"
        keys = {tile: range(tile * TILE, (tile + 1) * TILE) for tile in range(math.ceil(kv_len / TILE))}

        assert (start, stop) == (min(pairs, default=kv_len), max(pairs, default=-1) + 1)
        full = list(range(full_first, full_last))
        # As the kernel walks: first .. full_first, then full_last .. last.
        steps = [first + step for step in range(last - first - len(full))]
        cut = [tile if tile < full_first else tile + len(full) for tile in steps]
        visited = full + cut
        assert len(visited) == len(set(visited)), f"a tile is visited twice: {case}"
        hull = range(start, stop)
        assert set(visited) == {tile for tile, inside in keys.items() if set(inside) & set(hull)}, case
        everything_counts = {
            tile
            for tile, inside in keys.items()
            if all(w and a <= inside[0] and inside[-1] < b for a, b, w in zip(lo, hi, whole, strict=True))
        }
        assert set(full) == everything_counts, case
        full_tiles += len(full)
    assert (full_tiles > 0) == (kind != "nothing"), "the cases of this kind show nothing about full tiles"


@triton.jit
def intersect_kernel(kv_len, args, found_ptr, INTERVALS: tl.constexpr, ROWS: tl.constexpr):
    """lo, hi and whole of each row under all masks; a program is a head of a batch of 2 × 3."""
    program, rows = tl.program_id(0), tl.arange(0, ROWS)
    lo, hi, whole = intersect_intervals(rows, kv_len, program // 3, program % 3, INTERVALS, args)
    found_ptr += program * 3 * ROWS + rows
    tl.store(found_ptr, lo)
    tl.store(found_ptr + ROWS, hi)
    tl.store(found_ptr + 2 * ROWS, whole.to(tl.int32))


@pytest.mark.parametrize("has_keep", [False, True])
def test_intervals_intersect(has_keep, device):
    """Bounds are cut to 0..kv_len; a mask without an interval leaves them, but nothing is whole any more."""
    kv_len, shape = 40, (2, 3, ROWS)
    a_lo, b_lo = torch.randint(-9, 30, (2, *shape), dtype=torch.int32, device=device)
    a_hi, b_hi = torch.randint(10, 60, (2, *shape), dtype=torch.int32, device=device)
    args = tuple((lo, lo.stride(), hi, hi.stride(), ()) for lo, hi in ((a_lo, a_hi), (b_lo, b_hi)))
    intervals = (rows_interval, rows_interval, causal_interval) + (None,) * has_keep
    args += (((20,),),) + ((),) * has_keep
    found = torch.zeros(2, 3, 3, ROWS, dtype=torch.int32, device=device)
    intersect_kernel[(6,)](kv_len, args, found, INTERVALS=intervals, ROWS=ROWS)

    causal_hi = torch.arange(ROWS, device=device) + 21
    lo, hi, whole = found.unbind(2)
    assert torch.equal(lo, torch.maximum(a_lo, b_lo).clamp(min=0))
    least_hi = torch.minimum(torch.minimum(a_hi, b_hi), causal_hi)
    assert torch.equal(hi, least_hi.clamp(max=kv_len).int())
    assert (whole == int(not has_keep)).all()


@pytest.mark.parametrize("beyond", [1 << 31, (1 << 32) + 3, torch.iinfo(torch.int64).max])
def test_bounds_far_outside_are_cut(beyond, device):
    """int64 bounds that do not fit into 32 bits, such as "no end", mean what they say."""
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    far = torch.tensor(beyond, device=device)
    want = tilewise.attention(q, k, v, impl="portable")
    masks = [
        tilewise.Padding(far[None]),
        tilewise.Padding(far[None], "left"),
        tilewise.Padding(beyond),
        tilewise.Prefix(far[None]),
        tilewise.Prefix(beyond),
        tilewise.Intervals(-far, far),
    ]
    for mask in masks:
        assert torch.equal(tilewise.attention(q, k, v, mask=mask, impl="portable"), want)
    nothing = (
        tilewise.Padding(-far[None]) & tilewise.Padding(-far[None], "left") & tilewise.Intervals(far, far)
    )
    assert not tilewise.attention(q, k, v, mask=nothing, impl="portable").any()


@triton.jit
def count_visit(s, batch, head, q_idx, kv_idx, args):
    """Score modifier that changes nothing and counts every pair that it is asked about."""
    visits_ptr, kv_len = args
    tl.atomic_add(visits_ptr + q_idx * kv_len + kv_idx, tl.full(s.shape, 1, tl.int32))
    return s


@triton.jit
def count_question(q_idx, kv_idx, batch, head, args):
    """Mask that keeps every pair and counts how often it is asked."""
    asked_ptr, kv_len = args
    pairs = q_idx * kv_len + kv_idx
    tl.atomic_add(asked_ptr + pairs, tl.full(pairs.shape, 1, tl.int32))
    return pairs >= 0


@triton.jit
def causal_rows(q_idx, batch, head, args):
    return q_idx * 0, q_idx + 33, q_idx >= 0


Q_LEN, KV_LEN = 2 * TILE, 4 * TILE  # whole tiles, so that no pair stands in for another


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


MASKS = {
    "causal": lambda d: tilewise.Causal(),
    "causal top left": lambda d: tilewise.Causal("top_left"),
    "window": lambda d: tilewise.Window(12, 0),
    "window both ways": lambda d: tilewise.Window(20, 3),
    "prefix": lambda d: tilewise.Prefix(20, "top_left"),
    "padding": lambda d: tilewise.Padding(ints(33).to(d)),
    "left padding": lambda d: tilewise.Padding(17, "left"),
    "no key at all": lambda d: tilewise.Padding(0),
    "documents": lambda d: tilewise.Documents(
        ints(*[1] * 20, *[2] * 12).to(d), ints(*[0] * 16, *[1] * 10, *[2] * 38).to(d)
    ),
    "rows": lambda d: tilewise.Intervals(torch.arange(32, device=d) // 2, torch.arange(32, device=d) + 5),
    "a combination": lambda d: tilewise.Causal(-4) & tilewise.Window(40, None, 30) & tilewise.Padding(50),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_visits_the_tiles_of_the_mask_and_no_other(name, device):
    """The walk itself, end to end: every pair of a needed tile once, of any other never."""
    mask = MASKS[name](device)
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (Q_LEN, KV_LEN, KV_LEN))
    visits = torch.zeros(Q_LEN, KV_LEN, dtype=torch.int32, device=device)
    score = tilewise.UserScore(count_visit, (visits, KV_LEN))
    with tilewise.tiles.use(tilewise.tiles.Tile(TILE, TILE)):
        tilewise.attention(q, k, v, mask=mask, score=score, impl="portable")

    shape = tilewise.api.make_request(q, k, v, mask=mask).shape
    index = [torch.arange(n, device=device).view([-1 if a == i else 1 for i in range(4)])
             for a, n in enumerate(shape.scores)]  # fmt: skip
    kept = torch.ones(shape.scores, dtype=torch.bool, device=device)
    for part in mask.parts():
        kept = kept & part.twin(shape)(*index)
    for q_tile in range(Q_LEN // TILE):
        rows = slice(q_tile * TILE, (q_tile + 1) * TILE)
        seen = kept[0, 0, rows].any(0).nonzero().flatten().tolist()
        hull = range(seen[0] // TILE, seen[-1] // TILE + 1) if seen else range(0)
        wanted = torch.tensor([int(key // TILE in hull) for key in range(KV_LEN)], device=device)
        assert (visits[rows] == wanted).all(), f"query tile {q_tile} should visit the key tiles {list(hull)}"


def test_full_tiles_ask_no_mask(device):
    """A mask with an interval that is whole is asked about pairs of cut tiles only."""
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (Q_LEN, KV_LEN, KV_LEN))
    asked = torch.zeros(Q_LEN, KV_LEN, dtype=torch.int32, device=device)
    mask = tilewise.UserMask(count_question, (asked, KV_LEN), interval=causal_rows)
    with tilewise.tiles.use(tilewise.tiles.Tile(TILE, TILE)):
        tilewise.attention(q, k, v, mask=mask, impl="portable")
    # Row i sees i + 33 keys: rows 0.. have 32 whole keys and cut the tile after; rows 16.. one tile more.
    wanted = torch.zeros_like(asked)
    wanted[:TILE, 2 * TILE : 3 * TILE] = 1
    wanted[TILE:, 3 * TILE :] = 1
    assert torch.equal(asked, wanted)


def brute_force_hulls(ids: list[int], kv_ids: list[int]) -> list[tuple[int, int, bool] | None]:
    """First key, last key + 1 and wholeness of each row's document; None where it has no key."""
    hulls: list[tuple[int, int, bool] | None] = []
    for document in ids:
        keys = [key for key, other in enumerate(kv_ids) if other == document]
        hulls.append((keys[0], keys[-1] + 1, keys[-1] + 1 - keys[0] == len(keys)) if keys else None)
    return hulls


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (5, 12), (12, 5), (3, 0), (0, 4)])
@pytest.mark.parametrize("batches", [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("in_order", [False, True])
def test_document_hulls(sizes, batches, in_order, device):
    ids, kv_ids = (torch.randint(-2, 4, (b, n), device=device) for b, n in zip(batches, sizes, strict=True))
    if in_order:
        ids, kv_ids = ids.sort().values, kv_ids.sort().values
    hulls = document_hulls(ids, kv_ids)
    assert hulls.dtype == torch.int32 and hulls.is_contiguous() and hulls.shape == (max(batches), sizes[0], 3)
    for b, rows in enumerate(hulls.tolist()):
        own, keys = ids.expand(max(batches), -1)[b], kv_ids.expand(max(batches), -1)[b]
        wanted = brute_force_hulls(own.tolist(), keys.tolist())
        for (first, stop, whole), want in zip(rows, wanted, strict=True):
            if want is None:
                assert first == stop and 0 <= first <= sizes[1]  # an interval of no key, anywhere
            else:
                assert (first, stop, bool(whole)) == want


def test_document_ids_beyond_32_bits_stay_apart(device):
    """int64 ids that agree in their lower 32 bits with int32 ids are other documents."""
    ids = torch.full((1, 16), (1 << 32) + 1, device=device)
    for q_ids, kv_ids in ((ids, ids.int()), (ids.int(), ids)):
        first, stop, _ = document_hulls(q_ids, kv_ids).unbind(2)
        assert torch.equal(first, stop)
