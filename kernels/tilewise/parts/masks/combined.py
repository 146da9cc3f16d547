"""Two masks as one, and one as its opposite: what `|`, `&` and `~` make of intervals, keeps and coverages.

    row of a        ░░░░███████░░░░░░░░░░░░░░
    row of b        ░░░░░░░░░░░░░░█████░░░░░░
    row of a | b    ░░░░▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒░░░░░░      the hull of both; whole where nothing between is left out
    row of ~b       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒      everything; but where b sees a prefix or a suffix, the rest

An interval says where to look, and may be too wide: then `whole` is false, and the keep says which pairs
count. It asks of each mask whether the pair lies in its interval and is kept there, and joins the answers as
the operator says. So it may be asked about any pair, and stand inside another one.

`bounds_of_either`, `bounds_of_both` and `bounds_of_opposite` say on the host what the intervals say on the
device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..asking import asking
from ..bounds import UNLIMITED, Bounds
from ..sequences import key_count
from ..shape import FAR, Shape
from .mask import BoundMask, Mask

# ---- Intervals, keeps and coverages of two masks; FIRST and SECOND are those that are asked
#
# args = (what `key_count` takes, args of the first, args of the second)

FIRST: Any = None
SECOND: Any = None


@triton.jit
def cut(q_idx, lo, hi, kv_len):
    """An interval of each row within the keys that are there."""
    zero = q_idx * 0
    return tl.maximum(zero + lo, 0), tl.minimum(zero + hi, kv_len)


def either_interval(q_idx, batch, head, args):
    kv_len = key_count(batch, args[0])
    lo_a, hi_a, whole_a = FIRST(q_idx, batch, head, args[1])
    lo_b, hi_b, whole_b = SECOND(q_idx, batch, head, args[2])
    lo_a, hi_a = cut(q_idx, lo_a, hi_a, kv_len)
    lo_b, hi_b = cut(q_idx, lo_b, hi_b, kv_len)
    none_a, none_b = hi_a <= lo_a, hi_b <= lo_b
    lo = tl.where(none_a, lo_b, tl.where(none_b, lo_a, tl.minimum(lo_a, lo_b)))
    hi = tl.where(none_a, hi_b, tl.where(none_b, hi_a, tl.maximum(hi_a, hi_b)))
    a_is_all = whole_a & (none_b | ((lo_a <= lo_b) & (hi_b <= hi_a)))
    b_is_all = whole_b & (none_a | ((lo_b <= lo_a) & (hi_a <= hi_b)))
    meet = whole_a & whole_b & (lo_a <= hi_b) & (lo_b <= hi_a)
    return lo, hi, a_is_all | b_is_all | meet


def both_interval(q_idx, batch, head, args):
    lo_a, hi_a, whole_a = FIRST(q_idx, batch, head, args[1])
    lo_b, hi_b, whole_b = SECOND(q_idx, batch, head, args[2])
    zero = q_idx * 0
    return tl.maximum(zero + lo_a, lo_b), tl.minimum(zero + hi_a, hi_b), whole_a & whole_b


def opposite_interval(q_idx, batch, head, args):
    kv_len = key_count(batch, args[0])
    lo, hi, whole = FIRST(q_idx, batch, head, args[1])
    lo, hi = cut(q_idx, lo, hi, kv_len)
    none = hi <= lo
    is_prefix, is_suffix = whole & (lo <= 0), whole & (hi >= kv_len)
    first = tl.where(is_prefix & (none == 0), hi, 0)
    stop = tl.where(is_suffix & (none == 0), lo, kv_len)
    return first, stop, none | is_prefix | is_suffix


@triton.jit
def everywhere(q_idx, batch, head, args):
    """The interval of a mask that has none."""
    return q_idx * 0, q_idx * 0 + (1 << 30), q_idx < 0


def either_keep(q_idx, kv_idx, batch, head, args):
    return FIRST(q_idx, kv_idx, batch, head, args[1]) | SECOND(q_idx, kv_idx, batch, head, args[2])


def both_keep(q_idx, kv_idx, batch, head, args):
    return FIRST(q_idx, kv_idx, batch, head, args[1]) & SECOND(q_idx, kv_idx, batch, head, args[2])


def opposite_keep(q_idx, kv_idx, batch, head, args):
    return FIRST(q_idx, kv_idx, batch, head, args[1]) == 0


def either_coverage(q_idx, kv_first, kv_last, batch, head, args):
    a = FIRST(q_idx, kv_first, kv_last, batch, head, args[1])
    return tl.maximum(a, SECOND(q_idx, kv_first, kv_last, batch, head, args[2]))


def both_coverage(q_idx, kv_first, kv_last, batch, head, args):
    a = FIRST(q_idx, kv_first, kv_last, batch, head, args[1])
    return tl.minimum(a, SECOND(q_idx, kv_first, kv_last, batch, head, args[2]))


def opposite_coverage(q_idx, kv_first, kv_last, batch, head, args):
    return 2 - FIRST(q_idx, kv_first, kv_last, batch, head, args[1])


# ---- The pairs and the coverage of one mask, from its interval FIRST and its keep SECOND


def inside(q_idx, kv_idx, batch, head, args):
    lo, hi, _whole = FIRST(q_idx, batch, head, args)
    return (kv_idx >= lo) & (kv_idx < hi)


def inside_and_kept(q_idx, kv_idx, batch, head, args):
    lo, hi, _whole = FIRST(q_idx, batch, head, args)
    return (kv_idx >= lo) & (kv_idx < hi) & SECOND(q_idx, kv_idx, batch, head, args)


@triton.jit
def every_pair(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx >= 0)


def inside_covers(q_idx, kv_first, kv_last, batch, head, args):
    lo, hi, whole = FIRST(q_idx, batch, head, args)
    sees = (kv_last >= lo) & (kv_first < hi) & (lo < hi)
    sees_all = whole & (kv_first >= lo) & (kv_last < hi)
    return sees.to(tl.int32) + sees_all.to(tl.int32)


@triton.jit
def perhaps_some(q_idx, kv_first, kv_last, batch, head, args):
    """The coverage of a mask that goes pair by pair alone."""
    return (q_idx + kv_first) * 0 + 1


def pairs_of(mask: BoundMask) -> Any:
    """The keep function that says, without the interval, which pairs count."""
    if mask.interval is None:
        return every_pair if mask.keep is None else mask.keep
    if mask.keep is None:
        return asking(inside, FIRST=mask.interval, SECOND=None)
    return asking(inside_and_kept, FIRST=mask.interval, SECOND=mask.keep)


def coverage_of(mask: BoundMask) -> Any:
    if mask.coverage is None and mask.interval is None:
        return perhaps_some
    return mask.coverage or asking(inside_covers, FIRST=mask.interval, SECOND=None)


# ---- The masks


def either(a: BoundMask, b: BoundMask, shape: Shape) -> BoundMask:
    """The pairs that count under one of them, or both."""
    interval = None
    if a.interval is not None and b.interval is not None:  # else the hull is everything
        interval = asking(either_interval, FIRST=a.interval, SECOND=b.interval)
    keep = asking(either_keep, FIRST=pairs_of(a), SECOND=pairs_of(b))
    coverage = asking(either_coverage, FIRST=coverage_of(a), SECOND=coverage_of(b))
    return BoundMask(interval, keep, (shape.kv_len_args(), a.args, b.args), coverage)


def both(a: BoundMask, b: BoundMask, shape: Shape) -> BoundMask:
    """The pairs that count under both."""
    interval = keep = None
    if a.interval is not None or b.interval is not None:
        intervals = (a.interval or everywhere, b.interval or everywhere)
        interval = asking(both_interval, FIRST=intervals[0], SECOND=intervals[1])
    if a.keep is not None or b.keep is not None:
        keep = asking(both_keep, FIRST=pairs_of(a), SECOND=pairs_of(b))
    coverage = asking(both_coverage, FIRST=coverage_of(a), SECOND=coverage_of(b))
    return BoundMask(interval, keep, (shape.kv_len_args(), a.args, b.args), coverage)


def opposite(a: BoundMask, shape: Shape) -> BoundMask:
    """The pairs that do not count under it."""
    interval = a.interval and asking(opposite_interval, FIRST=a.interval, SECOND=None)
    keep = asking(opposite_keep, FIRST=pairs_of(a), SECOND=None)
    coverage = asking(opposite_coverage, FIRST=coverage_of(a), SECOND=None)
    return BoundMask(interval, keep, (shape.kv_len_args(), a.args), coverage)


# ---- Sequences that are longer than a mask's tensors: nothing counts beyond, whatever an operator says
#
# args = ((queries, keys) that the tensors have elements for, args of FIRST)


def limited_interval(q_idx, batch, head, args):
    lo, hi, whole = FIRST(q_idx, batch, head, args[1])
    return lo, tl.where(q_idx < args[0][0], tl.minimum(hi, args[0][1]), lo), whole


def limited_keep(q_idx, kv_idx, batch, head, args):
    is_there = (q_idx < args[0][0]) & (kv_idx < args[0][1])
    return is_there & FIRST(q_idx, kv_idx, batch, head, args[1])


def limited_coverage(q_idx, kv_first, kv_last, batch, head, args):
    found = FIRST(q_idx, kv_first, kv_last, batch, head, args[1])
    found = tl.where(kv_last < args[0][1], found, tl.minimum(found, 1))
    return tl.where((q_idx < args[0][0]) & (kv_first < args[0][1]), found, 0)


def limited(mask: BoundMask, extents: tuple[int, int]) -> BoundMask:
    """The mask, of sequences whose lengths the host does not know, within what its tensors reach."""
    if extents == (FAR, FAR):
        return mask
    interval = mask.interval and asking(limited_interval, FIRST=mask.interval, SECOND=None)
    keep = asking(limited_keep, FIRST=pairs_of(mask), SECOND=None)
    coverage = asking(limited_coverage, FIRST=coverage_of(mask), SECOND=None)
    return BoundMask(interval, keep, (extents, mask.args), coverage)


# ---- The same on the host


def bounds_within(mask: Mask, shape: Shape) -> Bounds | None:
    """A mask's bounds, cut to the rows and keys that are there; a row beyond its tensors sees nothing."""
    found = mask.bounds(shape)
    if found is None:
        return None
    lo, hi, whole = (of_rows(x, shape.q_len) for x in found)
    reached = torch.arange(shape.q_len, device="cpu") < mask.extents(shape)[0]
    return Bounds(lo.clamp(min=0), torch.where(reached, hi.clamp(max=shape.kv_len), 0), whole)


def of_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with as many rows, or one for all."""
    if x.dim() == 0 or x.shape[-1] in (1, rows):
        return x
    missing = rows - x.shape[-1]
    return x[..., :rows] if missing < 0 else torch.cat([x, x.new_zeros(*x.shape[:-1], missing)], -1)


def bounds_of_either(a: Bounds, b: Bounds) -> Bounds:
    none_a, none_b = a.hi <= a.lo, b.hi <= b.lo
    lo = torch.where(none_a, b.lo, torch.where(none_b, a.lo, torch.minimum(a.lo, b.lo)))
    hi = torch.where(none_a, b.hi, torch.where(none_b, a.hi, torch.maximum(a.hi, b.hi)))
    a_is_all = a.whole & (none_b | ((a.lo <= b.lo) & (b.hi <= a.hi)))
    b_is_all = b.whole & (none_a | ((b.lo <= a.lo) & (a.hi <= b.hi)))
    meet = a.whole & b.whole & (a.lo <= b.hi) & (b.lo <= a.hi)
    return Bounds(lo, hi, a_is_all | b_is_all | meet)


def bounds_of_both(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi), a.whole & b.whole)


def bounds_of_opposite(a: Bounds, kv_len: int) -> Bounds:
    none = a.hi <= a.lo
    is_prefix, is_suffix = a.whole & (a.lo <= 0), a.whole & (a.hi >= kv_len)
    first = torch.where(is_prefix & ~none, a.hi, 0)
    stop = torch.where(is_suffix & ~none, a.lo, kv_len)
    return Bounds(first, stop, none | is_prefix | is_suffix)


def bounds_of_everything() -> Bounds:
    """Of a mask that has no interval."""
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    return Bounds(zero, zero + UNLIMITED, zero > 0)
