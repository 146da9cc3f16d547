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
from typing import Any

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import Bounds, positions
from ..sequences import row_shift
from ..shape import FAR, Align, Shape
from .mask import BoundMask, Mask, Twin

# args = (what `row_shift` takes, points of the grid, axes)
# axis = (its length, the points between two neighbours along it in raster order, size, dilation,
#         members of the group before a point that it sees where no border is near, and behind it at most)


@triton.jit
def window_of(position, axis):
    """What the points at these positions see along an axis: its first and its last point."""
    length, stride, size, dilation, before, behind = axis
    x = position // stride % length
    i, group = x // dilation, x % dilation
    members = (length - group + dilation - 1) // dilation
    first = tl.minimum(tl.maximum(i - before, 0), members - size)
    last = tl.minimum(first + size - 1, i + behind)
    return first * dilation + group, last * dilation + group


@triton.jit
def neighborhood_interval(q_idx, batch, head, args):
    shift_args, points, axes = args
    position = q_idx + row_shift(batch, shift_args)
    is_there = (position >= 0) & (position < points)
    position = tl.where(is_there, position, 0)
    lo, hi, count = q_idx * 0, q_idx * 0 + 1, q_idx * 0 + 1
    for i in tl.static_range(len(axes)):
        first, last = window_of(position, axes[i])
        lo += first * axes[i][1]
        hi += last * axes[i][1]
        count *= (last - first) // axes[i][3] + 1
    return lo, tl.where(is_there, hi, lo), count == hi - lo


@triton.jit
def neighborhood_keep(q_idx, kv_idx, batch, head, args):
    shift_args, points, axes = args
    position = q_idx + row_shift(batch, shift_args)
    kept = (position >= 0) & (position < points) & (kv_idx < points)
    position = tl.maximum(position, 0)
    for i in tl.static_range(len(axes)):
        first, last = window_of(position, axes[i])
        y = kv_idx // axes[i][1] % axes[i][0]
        kept = kept & (y >= first) & (y <= last) & (y % axes[i][3] == first % axes[i][3])
    return kept


@triton.jit
def neighborhood_coverage(q_idx, kv_first, kv_last, batch, head, args):
    """Of the smallest box of the grid that holds the keys: none of it is seen if along one axis none is, and
    all if along every axis all is."""
    shift_args, points, axes = args
    position = q_idx + row_shift(batch, shift_args)
    is_there = (position >= 0) & (position < points) & (kv_first < points)
    position = tl.maximum(position, 0)
    none, is_all = is_there == 0, is_there & (kv_last < points)
    kv_last = tl.minimum(kv_last, points - 1)
    is_one = kv_first >= 0  # along all axes so far the box has one point
    for i in tl.static_range(len(axes)):
        length, stride, _size, dilation, _before, _behind = axes[i]
        first, last = window_of(position, axes[i])
        start = tl.where(is_one, kv_first // stride % length, 0)
        stop = tl.where(is_one, kv_last // stride % length, length - 1)
        is_one = is_one & (start == stop)
        # The first point of the window that is not before the box.
        nearest = first + tl.cdiv(tl.maximum(start - first, 0), dilation) * dilation
        none = none | (nearest > stop) | (nearest > last)
        in_one_group = ((start == stop) & (nearest == start)) | (dilation == 1)
        is_all = is_all & (start >= first) & (stop <= last) & in_one_group
    return tl.where(none, 0, is_all.to(tl.int32) + 1)


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
        if math.prod(self.shape) >= FAR:
            raise ValueError(
                f"shape={self.shape} has {math.prod(self.shape)} points, and must have below {FAR}"
            )
        for axis, (length, count, step) in enumerate(zip(self.shape, self.size, self.dilation, strict=True)):
            if count * step > length:
                raise ValueError(
                    f"size={count} and dilation={step} along axis {axis} need {count * step} points, and "
                    f"shape={self.shape} has {length}: give a size of at most {length // step} there"
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

    def axes(self) -> tuple[tuple[int, ...], ...]:
        """What the device is told of each axis."""
        found, stride = [], math.prod(self.shape)
        for length, size, dilation, causal in zip(
            self.shape, self.size, self.dilation, self.causal, strict=True
        ):
            stride //= length
            before, behind = (size - 1, 0) if causal else (size // 2, FAR)
            found.append((length, stride, size, dilation, before, behind))
        return tuple(found)

    def bind(self, shape: Shape) -> BoundMask:
        args = (shape.shift_args(self.align), math.prod(self.shape), self.axes())
        return BoundMask(neighborhood_interval, neighborhood_keep, args, neighborhood_coverage)

    def bounds(self, shape: Shape) -> Bounds:
        position = positions(shape, self.align)
        is_there = (position >= 0) & (position < math.prod(self.shape))
        position = position.where(is_there, 0)
        lo, hi, count = torch.zeros_like(position), torch.ones_like(position), torch.ones_like(position)
        for length, stride, size, dilation, before, behind in self.axes():
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
