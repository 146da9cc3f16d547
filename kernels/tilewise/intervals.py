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
is not an interval, or not only one, its `keep` function decides pair by pair.
"""

import triton
import triton.language as tl


@triton.jit
def intersect_intervals(q_idx, kv_len, batch, head, INTERVALS: tl.constexpr, mask_args):
    """lo, hi and whole of each row under all masks together; hi ≤ lo where a row sees no key."""
    lo = q_idx * 0
    hi = q_idx * 0 + kv_len
    whole = q_idx >= 0
    for i in tl.static_range(len(INTERVALS)):
        if INTERVALS[i] is None:
            whole = whole & (q_idx < 0)
        else:
            mask_lo, mask_hi, mask_whole = INTERVALS[i](q_idx, batch, head, mask_args[i])
            lo = tl.maximum(lo, mask_lo)
            hi = tl.minimum(hi, mask_hi)
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
def kept_pairs(q_idx, kv_idx, kv_len, lo, hi, batch, head, KEEPS: tl.constexpr, mask_args):
    """The pairs that count in a tile that a mask cuts, [TILE_Q, TILE_KV]. Keep functions see valid keys only:
    what lies beyond kv_len is out by its interval and asks about the last key instead."""
    valid_idx = tl.minimum(kv_idx, kv_len - 1)
    kept = (kv_idx[None, :] >= lo[:, None]) & (kv_idx[None, :] < hi[:, None])
    for i in tl.static_range(len(KEEPS)):
        if KEEPS[i] is not None:
            kept = kept & KEEPS[i](q_idx[:, None], valid_idx[None, :], batch, head, mask_args[i])
    return kept
