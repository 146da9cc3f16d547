"""Prefix: the first keys for all, the rest causal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import FIRST_KEY, Bounds, positions
from ..sequences import row_shift
from ..shape import Align, Shape
from .lengths import PerBatch, row_length
from .mask import BoundMask, Twin


@triton.jit
def prefix_interval(q_idx, batch, head, args):
    shift_args, length_args = args
    position = q_idx + row_shift(batch, shift_args)
    return q_idx * 0, tl.maximum(position + 1, row_length(batch, length_args)), q_idx >= 0


class Prefix(Aligned, PerBatch):
    """Every query sees the first `lengths` keys; the rest are causal (prefix language model, T5,
    arXiv 1910.10683). lengths: an int, or an int32 or int64 tensor [batch]. `align` as in Causal."""

    FIELDS = ("name", "lengths", "align")

    def __init__(self, lengths: int | torch.Tensor, align: Align = None) -> None:
        check_align(align)
        super().__init__("lengths", lengths)
        self.align = align

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(prefix_interval, None, (shape.shift_args(self.align), self.length_args(shape)))

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(FIRST_KEY, torch.maximum(positions(shape, self.align) + 1, self.host_lengths()))

    def twin(self, shape: Shape) -> Twin:
        return dense.prefix(self.lengths, shape.q_len, shape.kv_len, self.align)
