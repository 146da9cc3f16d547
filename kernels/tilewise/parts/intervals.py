"""Which keys must a tile of rows visit? The arithmetic of intervals, common to all masks.

Under a structured mask, query row i may see the keys lo(i) ≤ j < hi(i). The intervals of several masks
intersect; a tile of rows visits the keys between its smallest lo and its largest hi; and between its largest
lo and its smallest hi every pair counts, so that those tiles need no mask:

             keys ──►
    row 0    ░░████████░░░░░░░        ██ lo ≤ key < hi
    row 1    ░░░░████████░░░░░
    row 2    ░░░░░░████████░░░
             ──┬───┬───┬───┬──
           start   └ full ┘ stop

`lo`, `hi` and `whole` are vectors over the rows; `whole` says that every key in lo..hi counts. Where a mask
is not an interval, or not only one, its `keep` function decides pair by pair. Where it leaves holes that are
worth skipping, its `coverage` says what a row sees of a run of keys, and `covered` what all masks say of it.
"""

import triton
import triton.language as tl


@triton.jit
def intersect_intervals(
    q_idx, kv_len, batch, head, INTERVALS: tl.constexpr, mask_args, COVERAGES: tl.constexpr = None
):
    """lo, hi and whole of each row under all masks together; hi ≤ lo where a row sees no key. With COVERAGES
    `whole` is said by the masks that have none: of the others, `covered` asks that."""
    lo = q_idx * 0
    hi = q_idx * 0 + kv_len
    whole = q_idx >= 0
    for i in tl.static_range(len(INTERVALS)):
        mask_whole = q_idx < 0
        if INTERVALS[i] is not None:
            mask_lo, mask_hi, mask_whole = INTERVALS[i](q_idx, batch, head, mask_args[i])
            lo = tl.maximum(lo, mask_lo)
            hi = tl.minimum(hi, mask_hi)
        if COVERAGES is None or COVERAGES[i] is None:
            whole = whole & mask_whole
    return lo, hi, whole


@triton.jit
def kv_range(lo, hi, whole, kv_len, TILE_KV: tl.constexpr):
    """The keys start..stop that a tile of rows visits, lying in the key tiles first..last; of these, the
    tiles full_first..full_last need no mask. Without any such tile, full_first = full_last = last."""
    sees = lo < hi
    start = tl.min(tl.where(sees, lo, kv_len))
    stop = tl.max(tl.where(sees, hi, 0))
    first = start // TILE_KV
    last = tl.maximum(tl.cdiv(stop, TILE_KV), first)
    full_first = tl.maximum(tl.cdiv(tl.max(lo), TILE_KV), first)
    full_last = tl.minimum(tl.min(tl.where(whole, hi, 0)) // TILE_KV, last)
    none_full = full_last <= full_first
    full_first = tl.where(none_full, last, full_first)
    full_last = tl.where(none_full, last, full_last)
    return start, stop, first, full_first, full_last, last


@triton.jit
def covered(
    row, first, last, lo, hi, whole, batch, head_column, COVERAGES: tl.constexpr, mask_args
):  # fmt: skip
    """What rows [R], with their lo, hi and whole, see of runs of keys first..last, both inclusive, [1, N],
    under all masks together: 0 where none of a run, 2 where all, for sure, 1 where some, perhaps; [R, N]."""
    lo, hi = lo[:, None], hi[:, None]
    overlaps = tl.maximum(lo, first) < tl.minimum(hi, last + 1)
    contains = whole[:, None] & (lo <= first) & (hi > last)
    seen = overlaps.to(tl.int32) + (overlaps & contains).to(tl.int32)
    for i in tl.static_range(len(COVERAGES)):
        if COVERAGES[i] is not None:
            of_mask = COVERAGES[i](row[:, None], first, last, batch, head_column, mask_args[i])
            seen = tl.minimum(seen, of_mask)
    return seen


@triton.jit
def kept_pairs(q_idx, kv_idx, kv_len, lo, hi, batch, head, KEEPS: tl.constexpr, mask_args):
    """The pairs that count in a tile that a mask cuts: rows q_idx with their lo and hi against keys kv_idx,
    shaped to broadcast to the tile or to its transpose. Keep functions see valid keys only: what lies beyond
    kv_len is out by its interval and asks about the last key instead."""
    valid_idx = tl.minimum(kv_idx, kv_len - 1)
    kept = (kv_idx >= lo) & (kv_idx < hi)
    for i in tl.static_range(len(KEEPS)):
        if KEEPS[i] is not None:
            kept = kept & KEEPS[i](q_idx, valid_idx, batch, head, mask_args[i])
    return kept


# ---- The same question from the side of the keys: which tiles of rows visit a tile of keys?
#
# Before the backward, every tile of rows writes down four numbers: the keys start..stop that it visits, and
# the keys full_start..full_stop that all of its rows see. A tile of keys reads them, many tiles at a time.


@triton.jit
def store_range(ranges_ptr, lo, hi, whole, kv_len, is_partial):
    """Write the four numbers of one tile of rows. A tile that reaches beyond q_len (is_partial) says that
    none of its keys is seen by all rows, so that its missing rows are masked out."""
    sees = lo < hi
    tl.store(ranges_ptr, tl.min(tl.where(sees, lo, kv_len)))
    tl.store(ranges_ptr + 1, tl.max(tl.where(sees, hi, 0)))
    tl.store(ranges_ptr + 2, tl.max(lo))
    tl.store(ranges_ptr + 3, tl.where(is_partial, 0, tl.min(tl.where(whole, hi, 0))))


@triton.jit
def visits_and_full(ranges_ptr, q_tile, q_tiles, kv_start, kv_stop):
    """Whether these tiles of rows visit any of the keys kv_start..kv_stop, and whether every pair counts."""
    valid = q_tile < q_tiles
    ptrs = ranges_ptr + q_tile * 4
    start, stop = tl.load(ptrs, mask=valid, other=0), tl.load(ptrs + 1, mask=valid, other=0)
    full_start, full_stop = tl.load(ptrs + 2, mask=valid, other=0), tl.load(ptrs + 3, mask=valid, other=0)
    return (start < kv_stop) & (stop > kv_start), (full_start <= kv_start) & (full_stop >= kv_stop)


@triton.jit
def q_range(ranges_ptr, q_tiles, kv_start, kv_stop, CHUNK: tl.constexpr):
    """The tiles of rows first..last that visit the keys kv_start..kv_stop (and perhaps some between them that
    do not); of these, full_first..full_last is the first run of tiles in which every pair counts. Without
    any, full_first = full_last = last."""
    return q_range_of(ranges_ptr, q_tiles, kv_start, kv_stop, tl.arange(0, CHUNK))


@triton.jit
def q_range_of(ranges_ptr, q_tiles, kv_start, kv_stop, offsets):
    """The same, looking at as many tiles at a time as there are offsets, 0, 1, 2, ..."""
    CHUNK: tl.constexpr = offsets.shape[0]
    first, last, full_first = q_tiles, q_tiles * 0, q_tiles
    for chunk in range(0, q_tiles, CHUNK):
        q_tile = chunk + offsets
        visits, full = visits_and_full(ranges_ptr, q_tile, q_tiles, kv_start, kv_stop)
        first = tl.minimum(first, tl.min(tl.where(visits, q_tile, q_tiles)))
        last = tl.maximum(last, tl.max(tl.where(visits, q_tile + 1, 0)))
        full_first = tl.minimum(full_first, tl.min(tl.where(full, q_tile, q_tiles)))
    first = tl.minimum(first, last)
    full_first = tl.minimum(full_first, last)
    full_last = last
    for chunk in range(full_first // CHUNK * CHUNK, last, CHUNK):
        q_tile = chunk + offsets
        _, full = visits_and_full(ranges_ptr, q_tile, q_tiles, kv_start, kv_stop)
        ends = (q_tile >= full_first) & (full == 0)
        full_last = tl.minimum(full_last, tl.min(tl.where(ends, q_tile, q_tiles)))
    return first, full_first, full_last, last


@triton.jit
def cut_tile(step, first, full_first, full_last):
    """The step-th tile of a range that is not one of its full tiles."""
    tile = first + step
    return tl.where(tile < full_first, tile, tile + (full_last - full_first))
