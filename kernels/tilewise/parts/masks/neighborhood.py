"""Neighborhood: queries and keys are the points of a grid, and a query sees the points near its own.

Along an axis, the points with one remainder by the dilation form a group, and a point at x is number x div
dilation of its group. With a size of 5 (#: seen, o: the query; a border is on either side):

    dilation 1      ##o##......     .##o##.....     ......##o##
                    #o###......     o####......     ......####o     the window is moved inside
    dilation 2      #.o.#.#.#..     .o.#.#.#.#.                     two groups, of 6 and of 5 points

A query sees what it sees along every axis. In raster order these points lie between the first one, which is
first along all axes, and the last one: that is a row's interval. The keep function asks each axis.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import Bounds, positions
from ..sequences import row_shift
from ..shape import FAR, Align, Shape, ceil_div
from .mask import BoundMask, Mask, Twin

# args = (what `row_shift` takes, points of the grid, guards, axes)
# axis = (its length, the points between two neighbours along it in raster order, what divides by that,
#         size, members of the group before a point that it sees where no border is near, and behind it at
#         most, its field, group)
# group = (dilation, what divides by it, members that each group has, how many groups have one more, its
#          field); () where all points of an axis are of one group
#
# A point is a word of 32 bits, in which each axis has a field, its member's number, and each group one, its
# number. Above each field is a bit to borrow from, its guard. So one subtraction compares all fields:
# a >= b in every field where ((a | guards) - b) & guards == guards.


@triton.jit
def divided(n, by):
    """n div d, for n from 0 to 2³⁰; by: `divisor` of d. Division on a GPU takes some twenty instructions."""
    return tl.umulhi(n * 4, by[0]) >> by[1]


@triton.jit
def window_of(x, axis):
    """What the points at x see along an axis: the first and the last member of their group, and the group."""
    length, _stride, _by_stride, size, before, behind, _field, group = axis
    if len(group) == 0:
        first = tl.minimum(tl.maximum(x - before, 0), length - size)
        return first, tl.minimum(first + size - 1, x + behind), x * 0
    else:
        dilation, by_dilation, members, longer, _group_field = group
        i = divided(x, by_dilation)
        own = x - i * dilation
        first = tl.minimum(tl.maximum(i - before, 0), members + (own < longer).to(tl.int32) - size)
        return first, tl.minimum(first + size - 1, i + behind), own


@triton.jit
def windows_of(position, axes):
    """What the points at these positions see: the words of the first and of the last members; where these
    stand in raster order; and how many members there are."""
    rest, lo, hi, count = position, position * 0, position * 0, position * 0 + 1
    first_word, last_word = position * 0, position * 0
    for i in tl.static_range(len(axes)):
        stride, field, group = axes[i][1], axes[i][6], axes[i][7]
        x = divided(rest, axes[i][2])
        rest -= x * stride
        first, last, own = window_of(x, axes[i])
        first_word += first << field
        last_word += last << field
        count *= last - first + 1
        if len(group) > 0:
            first_word += own << group[4]
            last_word += own << group[4]
            first, last = first * group[0] + own, last * group[0] + own
        lo += first * stride
        hi += last * stride
    return first_word, last_word, lo, hi, count


@triton.jit
def neighborhood_interval(q_idx, batch, head, args):
    shift_args, points, _guards, axes = args
    position = q_idx + row_shift(batch, shift_args)
    is_there = (position >= 0) & (position < points)
    _first, _last, lo, hi, count = windows_of(tl.where(is_there, position, 0), axes)
    return lo, tl.where(is_there, hi + 1, lo), count == hi + 1 - lo


@triton.jit
def neighborhood_keep(q_idx, kv_idx, batch, head, args):
    """Of rows and keys of the grid; the interval leaves out others."""
    shift_args, _points, guards, axes = args
    position = tl.maximum(q_idx + row_shift(batch, shift_args), 0)
    first, last, _lo, _hi, _count = windows_of(position, axes)
    rest, word = kv_idx, kv_idx * 0
    for i in tl.static_range(len(axes)):
        stride, field, group = axes[i][1], axes[i][6], axes[i][7]
        y = divided(rest, axes[i][2])
        rest -= y * stride
        if len(group) > 0:
            member = divided(y, group[1])
            word += (y - member * group[0]) << group[4]
            y = member
        word += y << field
    return (((word | guards) - first) & ((last | guards) - word) & guards) == guards


@triton.jit
def neighborhood_coverage(q_idx, kv_first, kv_last, batch, head, args):
    """Of the smallest box of the grid that holds the keys: none of it is seen if along one axis none is, and
    all if along every axis all is. Where a dilated axis has more than one point, any group may be there."""
    shift_args, points, guards, axes = args
    position = q_idx + row_shift(batch, shift_args)
    is_there = (position >= 0) & (position < points)
    first, last, _lo, _hi, _count = windows_of(tl.where(is_there, position, 0), axes)
    from_rest, to_rest = tl.minimum(kv_first, points - 1), tl.minimum(kv_last, points - 1)
    start_word, stop_word = kv_first * 0, kv_first * 0
    is_one = kv_first >= 0  # along all axes so far the box has one point
    for i in tl.static_range(len(axes)):
        length, stride, by_stride = axes[i][0], axes[i][1], axes[i][2]
        field, group = axes[i][6], axes[i][7]
        start, stop = divided(from_rest, by_stride), divided(to_rest, by_stride)
        from_rest -= start * stride
        to_rest -= stop * stride
        start, stop = tl.where(is_one, start, 0), tl.where(is_one, stop, length - 1)
        is_one = is_one & (start == stop)
        if len(group) > 0:
            point, last_point = start, stop
            start, stop = divided(start, group[1]), divided(stop, group[1])
            own = point - start * group[0]
            start_word += tl.where(point == last_point, own, 0) << group[4]
            stop_word += tl.where(point == last_point, own, group[0] - 1) << group[4]
        start_word += start << field
        stop_word += stop << field
    meets = (((stop_word | guards) - first) & ((last | guards) - start_word) & guards) == guards
    inside = (((start_word | guards) - first) & ((last | guards) - stop_word) & guards) == guards
    meets = meets & is_there & (kv_first < points)
    return meets.to(tl.int32) + (meets & inside & (kv_last < points)).to(tl.int32)


class Neighborhood(Aligned, Mask):
    """Neighborhood attention: queries and keys are the points of a grid, in raster order (the last axis runs
    fastest), and a query sees the `size` points of the grid that are nearest to its own along each axis.

    size: an int, or one for each axis. Of an odd size as many lie before the query as behind it, of an even
    one size / 2 before and size / 2 - 1 behind, as NATTEN has it. Near a border the window is moved inside,
    so that every query sees as many keys.
    dilation: an int, or one for each axis: a query sees every dilation-th point, those of its own group. No
    group may have fewer points than `size`: size · dilation is at most the length of the axis.
    shape: the lengths of the axes, as (h, w), or (t, h, w) of a video. kv_len must be their product, and
    query i stands at point i + kv_len - q_len, in most calls i; `align` as in Causal. Of packed sequences,
    and in a cache, a sequence has the first points of the grid, as many as it has keys.
    causal: whether along an axis a query sees itself and the size - 1 before it alone; near the first point
    there are fewer. A bool, or one for each axis: (True, False, False) for a video, frame by frame.

    Source: Hassani et al. (arXiv 2204.07143), dilated Hassani and Shi (arXiv 2209.15001), causal Hassani et
    al. (arXiv 2403.04690).
    """

    has_gaps = True
    has_holes = True
    FIELDS = ("size", "dilation", "shape", "causal", "align")

    def __init__(
        self,
        size: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        *,
        shape: tuple[int, ...],
        causal: bool | tuple[bool, ...] = False,
        align: Align = None,
    ) -> None:
        check_align(align)
        self.shape = checked("shape", shape, int, None)
        axes = len(self.shape)
        self.size = checked("size", size, int, axes)
        self.dilation = checked("dilation", dilation, int, axes)
        self.causal = checked("causal", causal, bool, axes)
        self.align = align
        for axis, (length, count, step) in enumerate(zip(self.shape, self.size, self.dilation, strict=True)):
            if count * step > length:
                raise ValueError(
                    f"size={count} and dilation={step} along axis {axis} need {count * step} points, and "
                    f"shape={self.shape} has {length}: give a size of at most {length // step} there"
                )
        bits = sum([width + 1 for width in self.widths()])
        if bits > 32:
            raise ValueError(
                f"shape={self.shape} takes {bits} bits to number its points along each axis, and there "
                "are 32: cut the grid into smaller ones, along batch"
            )

    def given(self, name: str) -> Any:
        """One number that holds for all axes, in place of as many."""
        found = super().given(name)
        is_one = name in ("size", "dilation", "causal") and len(set(found)) == 1
        return found[0] if is_one else found

    def misfits(self, shape: Shape) -> list[str]:
        found, points = super().misfits(shape), math.prod(self.shape)
        if shape.is_dense and shape.kv_len != points:
            grid = " · ".join(map(str, self.shape))
            found.append(
                f"shape={self.shape} has {grid} = {points} points, and kv_len={shape.kv_len} must be equal"
            )
        return found

    def extents(self, shape: Shape) -> tuple[int, int]:
        return FAR, math.prod(self.shape)

    def widths(self) -> list[int]:
        """The bits of each field of a word, without its guard, from the lowest on: of the members of a group,
        and of the groups where there are several; of one axis after another."""
        numbers = [
            n
            for length, step in zip(self.shape, self.dilation, strict=True)
            for n in (ceil_div(length, step), *([step] if step > 1 else []))
        ]
        return [(n - 1).bit_length() for n in numbers]

    def on_device(self) -> tuple[Any, ...]:
        """What the device is told of the grid."""
        places = list(accumulate([width + 1 for width in self.widths()], initial=0))
        guards, fields = sum([1 << (place - 1) for place in places[1:]]), iter(places)
        axes, stride = [], math.prod(self.shape)
        for length, size, dilation, causal in zip(
            self.shape, self.size, self.dilation, self.causal, strict=True
        ):
            stride //= length
            before, behind = (size - 1, 0) if causal else (size // 2, FAR)
            axis = (length, stride, divisor(stride), size, before, behind, next(fields))
            group: tuple[Any, ...] = ()
            if dilation > 1:
                group = (dilation, divisor(dilation), *divmod(length, dilation), next(fields))
            axes.append((*axis, group))
        return math.prod(self.shape), guards - (guards >> 31 << 32), tuple(axes)

    def bind(self, shape: Shape) -> BoundMask:
        args = (shape.shift_args(self.align), *self.on_device())
        return BoundMask(neighborhood_interval, neighborhood_keep, args, neighborhood_coverage)

    def bounds(self, shape: Shape) -> Bounds:
        position = positions(shape, self.align)
        is_there = (position >= 0) & (position < math.prod(self.shape))
        position = position.where(is_there, 0)
        lo, hi, count = torch.zeros_like(position), torch.ones_like(position), torch.ones_like(position)
        for (length, stride, _, size, before, behind, *_), dilation in zip(
            self.on_device()[2], self.dilation, strict=True
        ):
            x = position // stride % length
            i, group = x // dilation, x % dilation
            first = (i - before).clamp(min=0).minimum((length - group + dilation - 1) // dilation - size)
            last = (first + size - 1).minimum(i + behind)
            lo, hi = lo + (first * dilation + group) * stride, hi + (last * dilation + group) * stride
            count = count * (last - first + 1)
        return Bounds(lo, hi.where(is_there, lo), count == hi - lo)

    def twin(self, shape: Shape) -> Twin:
        given = self.shape, self.size, self.dilation, self.causal
        return dense.neighborhood(*given, shape.q_len, shape.kv_len, self.align)


def divisor(d: int) -> tuple[int, int]:
    """By what `divided` divides: m and s, with n · m div 2³⁰⁺ˢ = n div d for all n below 2³⁰. m is 2³⁰⁺ˢ / d,
    rounded up by less than 1, which adds less than n / 2³⁰⁺ˢ < 1 / 2ˢ <= 1 / d to n / d (Granlund and
    Montgomery 1994, "Division by invariant integers using multiplication")."""
    s = (d - 1).bit_length()
    return ceil_div(1 << (30 + s), d), s


def checked(name: str, given: Any, kind: type[Any], axes: int | None) -> tuple[Any, ...]:
    """One value for each axis; one alone stands for all of them. None: as many axes as are given."""
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,) * (axes or 0)
    right = all([type(each) is kind and (kind is bool or each >= 1) for each in found])
    if found and right and len(found) == (axes or len(found)):
        return found
    what = "a bool" if kind is bool else "an int of at least 1"
    if axes is None:
        raise ValueError(
            f"{name}={given!r} must be the lengths of the axes, {what} for each, as (h, w) or (t, h, w)"
        )
    raise ValueError(f"{name}={given!r} must be {what}, or one for each of the {axes} axes of shape")
