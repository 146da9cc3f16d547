"""Causal: keys up to the row's own position."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import FIRST_KEY, Bounds, positions
from ..sequences import row_shift
from ..shape import Align, Shape
from .mask import BoundMask, Mask, Twin


@triton.jit
def causal_interval(q_idx, batch, head, args):
    return q_idx * 0, q_idx + row_shift(batch, args[0]) + 1, q_idx >= 0


class Causal(Aligned, Mask):
    """A query sees its own position and everything before it.

    align: "bottom_right" puts the last query at the last key (new tokens after a cache); "top_left" puts the
    first query at the first key, as PyTorch's `is_causal=True` does. The two agree where q_len = kv_len. An
    int, or an int32 or int64 tensor [batch] on q's device, is the key position of query 0: over a buffer that
    sequences fill as far as kv_lens say, Causal(kv_lens - q_len) puts the last query of each at its last key.
    None is "bottom_right", and an error where that is not clear: in `attention` with q_len ≠ kv_len beside
    Padding on the right, and beside Documents whose keys have ids of their own.
    """

    FIELDS = ("align",)

    def __init__(self, align: Align = None) -> None:
        check_align(align)
        self.align = align

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(causal_interval, None, (shape.shift_args(self.align),))

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(FIRST_KEY, positions(shape, self.align) + 1)

    def twin(self, shape: Shape) -> Twin:
        return dense.causal(shape.q_len, shape.kv_len, self.align)
