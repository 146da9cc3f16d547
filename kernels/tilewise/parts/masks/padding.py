"""Padding: only some of the keys are real."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function

import tilewise_reference.masks as dense

from ..bounds import FIRST_KEY, Bounds
from ..sequences import key_count
from ..shape import Shape
from .lengths import PerBatch, row_length
from .mask import BoundMask, Twin


@triton.jit
def padding_right_interval(q_idx, batch, head, args):
    return q_idx * 0, q_idx * 0 + row_length(batch, args[1]), q_idx >= 0


@triton.jit
def padding_left_interval(q_idx, batch, head, args):
    kv_len = key_count(batch, args[0])
    return q_idx * 0 + (kv_len - row_length(batch, args[1])), q_idx * 0 + kv_len, q_idx >= 0


class Padding(PerBatch):
    """Only `kv_lens` of the keys are real: the first ones with side="right", the last ones with side="left".

    kv_lens: an int, or an int32 or int64 tensor [batch]. Lengths in a tensor are not read on the host; one
    above kv_len counts as kv_len, one below 0 as 0.
    """

    FIELDS = ("name", "lengths", "side")

    def __init__(self, kv_lens: int | torch.Tensor, side: Literal["right", "left"] = "right") -> None:
        if side not in ("right", "left"):
            raise ValueError(f"{side=} must be 'right' or 'left'")
        super().__init__("kv_lens", kv_lens)
        self.side = side

    def looks(self) -> Any:
        return super().looks(), self.side

    def bind(self, shape: Shape) -> BoundMask:
        interval = padding_right_interval if self.side == "right" else padding_left_interval
        return BoundMask(interval, None, (shape.kv_len_args(), self.length_args(shape)))

    def bounds(self, shape: Shape) -> Bounds:
        if self.side == "left":
            return Bounds(shape.kv_len - self.host_lengths(), FIRST_KEY + shape.kv_len)
        return Bounds(FIRST_KEY, self.host_lengths())

    def twin(self, shape: Shape) -> Twin:
        return dense.padding(self.lengths, shape.kv_len, self.side)
