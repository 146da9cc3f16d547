"""Bias: a tensor that is added to the scores."""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl

import tilewise_reference.scores as dense

from ..addressing import load_pairs
from ..hints import shape_hint, with_hint
from ..numerics import widen
from ..shape import PARAMETERS, Shape, broadcast_strides, check_dtype, common_limits, misfits, pair_limits
from .score import BoundScore, Parameter, Score, Twin, padded_sizes


@triton.jit
def bias_score(s, batch, head, q_idx, kv_idx, args):
    ptr, strides, limits = args
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]
    return s + widen(load_pairs(ptrs, q_idx, kv_idx, limits, float("nan")))


class Bias(Score):
    """s becomes s + bias. bias: a float tensor that broadcasts to [batch, q_heads, q_len, kv_len],
    with any strides and alignment. `attention(..., bias=b)` is Bias(b) after all other modifiers."""

    FIELDS: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, bias: torch.Tensor) -> None:
        if isinstance(bias, torch.Tensor) and bias.dtype == torch.bool:
            raise ValueError(
                "bias.dtype=torch.bool is none of torch.float16, torch.bfloat16, torch.float32 and "
                "torch.float64: a bool tensor, True where a pair counts, is mask="
            )
        check_dtype("bias", bias, PARAMETERS)
        self.bias = bias

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"bias": self.bias}

    def misfits(self, shape: Shape) -> list[str]:
        return [
            with_hint(misfit, shape_hint("bias", tuple(self.bias.shape), shape))
            for misfit in misfits("bias", self.bias, shape.fitted)
        ]

    def bind(self, shape: Shape) -> BoundScore:
        strides, limits = broadcast_strides(self.bias, shape.fitted), common_limits(shape.fitted, self.bias)
        return BoundScore(bias_score, (self.bias, strides, limits))

    def extents(self, shape: Shape) -> tuple[int, int]:
        return pair_limits(self.bias)

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        return {"bias": Parameter(None, padded_sizes(self.bias))}

    def twin(self, shape: Shape) -> Twin:
        return dense.additive_bias(self.bias)
