"""Rotary position embeddings in a kernel: rows turned by their positions as they are loaded.

Pairs of dimensions turn by the angle φ = position · frequency of the pair, whose cosine and sine come from a
table [positions, rotary_dim / 2]:

    (x_a, x_b) -> (x_a cos φ - x_b sin φ, x_a sin φ + x_b cos φ)

A pair is (i, i + rotary_dim / 2), or interleaved (2 i, 2 i + 1). Each dimension is loaded with the other one
of its pair; dimensions from rotary_dim on stay as they are.

Method: RoFormer (Su et al. 2021, arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .addressing import load_tile, tile_ptrs
from .numerics import widen


class RotaryTable(NamedTuple):
    """cos and sin [positions, rotary_dim / 2] in fp32 or, where q is, fp64; and whether pairs are
    interleaved."""

    cos: torch.Tensor
    sin: torch.Tensor
    is_interleaved: bool = False

    def args(self) -> tuple[Any, ...]:
        """What `turned` takes as `rotary`; () stands for none."""
        return self.cos, self.sin, self.cos.stride(), self.sin.stride(), self.cos.shape[1], self.cos.shape[0]


@triton.jit
def turned(
    x_head, rows, row_mask, position, rotary,
    INTERLEAVED: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr,
):  # fmt: skip
    """Rows of a head, [rows, DIM_TILE] in fp32, turned by their positions; without rotary (), as they are."""
    x = widen(load_tile(x_head, rows, row_mask, 0, DIM, DIM_TILE))
    if len(rotary) == 0:
        return x
    else:
        cos_ptr, sin_ptr, cos_strides, sin_strides, pairs, positions = rotary
        column = tl.arange(0, DIM_TILE)
        if INTERLEAVED:
            pair, other, is_first = column // 2, column ^ 1, column % 2 == 0
        else:
            is_first = column < pairs
            pair = tl.where(is_first, column, column - pairs)
            other = tl.where(is_first, column + pairs, column - pairs)
        is_turned = column < 2 * pairs
        pair, other = tl.where(is_turned, pair, 0), tl.where(is_turned, other, 0)
        mask = row_mask[:, None] & is_turned[None, :]
        y = widen(tl.load(tile_ptrs(x_head, rows, row_mask, other), mask=mask, other=0.0))
        at = tl.minimum(position, positions - 1).to(tl.int64)[:, None]
        cos = tl.load(cos_ptr + at * cos_strides[0] + pair[None, :] * cos_strides[1], mask=mask, other=1.0)
        sin = tl.load(sin_ptr + at * sin_strides[0] + pair[None, :] * sin_strides[1], mask=mask, other=0.0)
        return tl.where(mask, x * cos + tl.where(is_first[None, :], -y, y) * sin, x)
