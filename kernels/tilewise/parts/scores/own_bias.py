"""OwnBias: of a bias of a larger call, what one rank has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function

from ..shape import ANY, Shape, broadcast_strides, common_limits
from .bias import Bias, bias_score
from .score import BoundScore


@triton.jit
def own_bias_score(s, batch, head, q_idx, kv_idx, args):
    return bias_score(s, batch - args[1], head - args[2], q_idx, kv_idx, args[0])


class OwnBias(Bias):
    """Bias(whole), of which `bias` begins at these numbers of sequence and head: it is asked with those of
    the whole, and never for others than it has. A bias is as large as all scores, so nobody holds it whole
    where each has a part. Made by pytorch/sharded.py alone, once the whole has been found to fit."""

    FIELDS = ("bias", "first_batch", "first_head")

    def __init__(self, bias: torch.Tensor, first_batch: int, first_head: int) -> None:
        self.bias, self.first_batch, self.first_head = bias, first_batch, first_head

    def misfits(self, shape: Shape) -> list[str]:
        return []

    def bind(self, shape: Shape) -> BoundScore:
        strides, limits = broadcast_strides(self.bias, (ANY,) * 4), common_limits(shape.fitted, self.bias)
        return BoundScore(own_bias_score, ((self.bias, strides, limits), self.first_batch, self.first_head))

    def origin(self, whole: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Where a part that begins there in the whole call begins in this bias."""
        batch, head, row, key = whole
        return batch - self.first_batch, head - self.first_head, row, key
