"""Which tiles of rows visit a tile of keys: the arithmetic of the backward's walk against brute force."""

import random

import pytest
import torch
import triton
import triton.language as tl

from tilewise.parts.intervals import cut_tile, q_range, store_range, visits_and_full

TILE_Q, TILE_KV, CHUNK = 16, 16, 8
MOST = 40  # tiles of rows that a case may have: five chunks


@triton.jit
def store_kernel(ranges_ptr, lo_ptr, hi_ptr, whole_ptr, kv_len_ptr, partial_ptr, ROWS: tl.constexpr):
    """store_range of one case a program."""
    case = tl.program_id(0)
    rows = case * ROWS + tl.arange(0, ROWS)
    lo, hi, whole = tl.load(lo_ptr + rows), tl.load(hi_ptr + rows), tl.load(whole_ptr + rows) != 0
    kv_len, is_partial = tl.load(kv_len_ptr + case), tl.load(partial_ptr + case) != 0
    store_range(ranges_ptr + case * 4, lo, hi, whole, kv_len, is_partial)


def rows_of_a_tile(rng: random.Random, kv_len: int) -> list[tuple[int, int, bool]]:
    """lo, hi and whole of TILE_Q rows: wide, narrow, empty, or what a causal mask gives."""
    kind = rng.choice(("wide", "narrow", "empty", "causal", "all"))
    if kind == "causal":
        first = rng.randint(-20, kv_len)
        return [(0, min(kv_len, first + i), True) for i in range(TILE_Q)]
    if kind == "all":
        return [(0, kv_len, True)] * TILE_Q
    rows = []
    for _ in range(TILE_Q):
        lo, hi = rng.randint(0, kv_len // 3), rng.randint(kv_len - kv_len // 3, kv_len)
        if kind == "narrow":
            lo = rng.randint(0, kv_len)
            hi = rng.randint(lo, min(kv_len, lo + 9))
        if kind == "empty" or rng.random() < 0.02:
            hi = lo - rng.randint(0, 3)
        rows.append((lo, hi, rng.random() > 0.02))
    return rows


def test_store_range_says_what_a_tile_of_rows_visits(device):
    rng = random.Random(1)
    kv_lens = [rng.choice((1, 15, 16, 33, 100)) for _ in range(60)]
    cases = [rows_of_a_tile(rng, kv_len) for kv_len in kv_lens]
    partial = [rng.random() < 0.3 for _ in cases]
    lo, hi, whole = torch.tensor(cases, dtype=torch.int32, device=device).unbind(2)
    ranges = torch.full((len(cases), 4), -7, dtype=torch.int32, device=device)
    lens, is_partial = (torch.tensor(x, dtype=torch.int32, device=device) for x in (kv_lens, partial))
    tensors = [x.contiguous() for x in (lo, hi, whole)]
    store_kernel[(len(cases),)](ranges, *tensors, lens, is_partial, ROWS=TILE_Q)

    seen_full = 0
    for kv_len, rows, part, found in zip(kv_lens, cases, partial, ranges.tolist(), strict=True):
        start, stop, full_start, full_stop = found
        pairs = {key for a, b, _ in rows for key in range(a, b)}
        assert (start, stop) == (min(pairs, default=kv_len), max(pairs, default=-1) + 1)
        everywhere = {
            key for key in range(kv_len) if all(w and a <= key < b for a, b, w in rows) and not part
        }
        assert set(range(full_start, full_stop)) == everywhere
        seen_full += bool(everywhere)
    assert 5 < seen_full < 55, "the cases show nothing about full keys"


@triton.jit
def walk_kernel(
    ranges_ptr, offsets_ptr, tiles_ptr, start_ptr, found_ptr, walk_ptr, flags_ptr,
    TILE_KV: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One case a program: q_range, then how often the steps of dkv_kernel reach each tile, full and cut; and
    visits_and_full of each tile."""
    case = tl.program_id(0)
    head_ptr = ranges_ptr + tl.load(offsets_ptr + case) * 4
    q_tiles, kv_start = tl.load(tiles_ptr + case), tl.load(start_ptr + case)
    first, full_first, full_last, last = q_range(head_ptr, q_tiles, kv_start, kv_start + TILE_KV, CHUNK)
    tl.store(found_ptr + case * 4, first)
    tl.store(found_ptr + case * 4 + 1, full_first)
    tl.store(found_ptr + case * 4 + 2, full_last)
    tl.store(found_ptr + case * 4 + 3, last)
    full_walk_ptr, cut_walk_ptr = walk_ptr + case * 2 * MOST, walk_ptr + (case * 2 + 1) * MOST
    for step in range(full_last - full_first):
        tl.atomic_add(full_walk_ptr + full_first + step, 1)
    for step in range(last - first - (full_last - full_first)):
        tl.atomic_add(cut_walk_ptr + cut_tile(step, first, full_first, full_last), 1)
    q_tile = tl.arange(0, 64)
    visits, full = visits_and_full(head_ptr, q_tile, q_tiles, kv_start, kv_start + TILE_KV)
    tl.store(flags_ptr + case * 128 + q_tile, visits.to(tl.int32))
    tl.store(flags_ptr + case * 128 + 64 + q_tile, full.to(tl.int32))


def run_walk(cases: list[tuple[list[list[int]], int]], device: torch.device):
    """For each (ranges of the tiles of rows, kv_start): q_range's four numbers, both walks, both flags."""
    rows = [row for ranges, _ in cases for row in ranges]
    # Behind the last tile of one case stand the ranges of the next: reading too far shows. The last has junk.
    ranges = torch.tensor([*rows, *[[0, 1 << 20, 0, 1 << 20]] * 64], dtype=torch.int32, device=device)
    sizes = [len(ranges) for ranges, _ in cases]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    given = [
        torch.tensor(x, dtype=torch.int32, device=device) for x in (offsets, sizes, [s for _, s in cases])
    ]
    found = torch.full((len(cases), 4), -7, dtype=torch.int32, device=device)
    walk = torch.zeros(len(cases), 2, MOST, dtype=torch.int32, device=device)
    flags = torch.full((len(cases), 2, 64), -7, dtype=torch.int32, device=device)
    walk_kernel[(len(cases),)](ranges, *given, found, walk, flags, TILE_KV=TILE_KV, CHUNK=CHUNK, MOST=MOST)
    return found.tolist(), walk.tolist(), flags.tolist()


def one_range(rng: random.Random, kind: str, q_tile: int, q_tiles: int, kv_len: int) -> list[int]:
    """The four numbers of one tile of rows, as store_range may write them."""
    partial = q_tile == q_tiles - 1 and rng.random() < 0.5
    if kind == "all":
        start, stop, full_start, full_stop = 0, kv_len, 0, kv_len
    elif kind == "none":
        # The largest lo and the smallest hi of rows that see nothing.
        start, stop, full_start = kv_len, 0, rng.randint(0, kv_len)
        full_stop = rng.randint(0, full_start)
    elif kind == "causal":
        stop = min(kv_len, (q_tile + 1) * TILE_Q)
        start, full_start, full_stop = 0, 0, min(stop, q_tile * TILE_Q + 1)
    elif kind == "window":
        start, stop = max(0, q_tile * TILE_Q - 40), min(kv_len, (q_tile + 1) * TILE_Q)
        full_start, full_stop = max(0, (q_tile + 1) * TILE_Q - 41), min(kv_len, q_tile * TILE_Q + 1)
    elif rng.random() < 0.25:  # "gaps": any, with tiles that see nothing, and runs of full ones between
        return one_range(rng, "none", q_tile, q_tiles, kv_len)
    else:
        start = rng.choice((0, 0, rng.randint(0, kv_len - 1)))
        stop = rng.choice((kv_len, kv_len, rng.randint(start + 1, kv_len)))
        full_start = rng.choice((start, rng.randint(start, stop)))
        full_stop = rng.choice((stop, rng.randint(0, stop)))
    if stop <= start and kind != "none":  # keys that end before the rows begin to see any
        return one_range(rng, "none", q_tile, q_tiles, kv_len)
    return [start, stop, full_start, 0 if partial else full_stop]


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ["all", "none", "causal", "window", "gaps"])
def test_q_range_visits_what_is_needed_once(kind, device):
    rng = random.Random(kind)
    cases = []
    for case in range(50):
        q_tiles = rng.choice((0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, MOST - 3, MOST))
        kv_len = rng.randint(1, 12 * TILE_KV) if kind == "gaps" else rng.randint(1, MOST * TILE_Q)
        kv_start = rng.randrange(0, kv_len, TILE_KV)
        kv_start = 0 if case % 5 == 0 else kv_start
        cases.append(([one_range(rng, kind, i, q_tiles, kv_len) for i in range(q_tiles)], kv_start))

    full_tiles = cut_tiles = second_runs = 0
    for (ranges, kv_start), numbers, walk, flags in zip(cases, *run_walk(cases, device), strict=True):
        kv_stop = kv_start + TILE_KV
        keys = range(kv_start, kv_stop)
        needed = [i for i, (a, b, _, _) in enumerate(ranges) if set(range(a, b)) & set(keys)]
        full = [i for i, (_, _, a, b) in enumerate(ranges) if a <= kv_start and b >= kv_stop]
        assert flags[0] == [int(i in needed) for i in range(64)]
        assert flags[1] == [int(i in full) for i in range(64)]

        first, full_first, full_last, last = numbers
        assert first <= full_first <= full_last <= last <= max(len(ranges), 0)
        once = [int(first <= i < last) for i in range(MOST)]
        assert [a + b for a, b in zip(*walk, strict=True)] == once, "not each tile once"
        assert set(needed) <= set(range(first, last))
        assert (first, last) == ((needed[0], needed[-1] + 1) if needed else (first, first))
        run = []
        for i in full:
            if not run or i == run[-1] + 1:
                run.append(i)
        assert [i for i in range(MOST) if walk[0][i]] == run == list(range(full_first, full_last))
        if not run:
            assert full_first == full_last == last
        full_tiles, cut_tiles, second_runs = (
            full_tiles + len(run),
            cut_tiles + sum(walk[1]),
            second_runs + (len(full) > len(run)),
        )
    assert (full_tiles > 0) == (kind != "none") and (cut_tiles > 0) == (kind != "none")
    assert kind != "gaps" or second_runs > 5, "the cases show nothing about a second run of full tiles"


@pytest.mark.parametrize("edge", range(CHUNK - 2, CHUNK + 3))
def test_full_runs_end_and_begin_at_chunks(edge, device):
    """A run of full tiles that begins, or ends, around the border between two chunks."""
    whole, cut, none = [0, 64, 0, 64], [0, 64, 0, 0], [64, 0, 64, 0]
    cases = [
        ([cut] * edge + [whole] * 5 + [cut] * 3, 16),
        ([whole] * edge + [cut] * 2 + [whole] * 2, 16),
        ([none] * edge + [whole] * (2 * CHUNK) + [none] * 4, 16),
        ([whole] * edge, 16),
        ([none] * edge + [cut], 16),
    ]
    wanted = [
        [0, edge, edge + 5, edge + 8],
        [0, 0, edge, edge + 4],
        [edge, edge, edge + 2 * CHUNK, edge + 2 * CHUNK],
        [0, 0, edge, edge],
        [edge, edge + 1, edge + 1, edge + 1],
    ]
    found, walk, _ = run_walk(cases, device)
    assert found == wanted
    for (first, _, _, last), (full, cuts) in zip(found, walk, strict=True):
        assert [a + b for a, b in zip(full, cuts, strict=True)] == [
            int(first <= i < last) for i in range(MOST)
        ]
