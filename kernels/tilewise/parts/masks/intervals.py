"""Intervals: any interval a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..addressing import load_within
from ..bounds import Bounds, on_host
from ..shape import ANY, FAR, INTS, Shape, broadcast_strides, check_dtype, common_limits, misfits
from .lengths import as_index
from .mask import BoundMask, Mask, Twin


@triton.jit
def rows_interval(q_idx, batch, head, args):
    start_ptr, start_strides, end_ptr, end_strides, limits = args
    b, h, row = batch.to(tl.int64), head.to(tl.int64), q_idx.to(tl.int64)
    start_ptrs = start_ptr + b * start_strides[0] + h * start_strides[1] + row * start_strides[2]
    end_ptrs = end_ptr + b * end_strides[0] + h * end_strides[1] + row * end_strides[2]
    start, end = load_within(start_ptrs, q_idx, limits, 0), load_within(end_ptrs, q_idx, limits, 0)
    return as_index(start), as_index(end), q_idx >= 0


class Intervals(Mask):
    """Query i sees the keys start[i] ≤ j < end[i]; none where end ≤ start.

    start, end: int32 or int64 tensors that broadcast to [batch, q_heads, q_len]. Bounds beyond 0..kv_len are
    cut to it.
    """

    has_gaps = True
    FIELDS = ("start", "end")

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        check_dtype("start", start, INTS)
        check_dtype("end", end, INTS)
        self.start, self.end = start, end

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"start": self.start, "end": self.end}

    def misfits(self, shape: Shape) -> list[str]:
        wanted = shape.fitted[:3]
        return misfits("start", self.start, wanted) + misfits("end", self.end, wanted)

    def bind(self, shape: Shape) -> BoundMask:
        rows = shape.fitted[:3]
        start, end = broadcast_strides(self.start, rows), broadcast_strides(self.end, rows)
        args = (self.start, start, self.end, end, common_limits(rows, self.start, self.end))
        return BoundMask(rows_interval, None, args)

    def extents(self, shape: Shape) -> tuple[int, int]:
        return common_limits((shape.batch, shape.q_heads, ANY), self.start, self.end)[0], FAR

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(on_host(self.start), on_host(self.end))

    def twin(self, shape: Shape) -> Twin:
        return dense.intervals(self.start, self.end)
