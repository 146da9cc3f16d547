"""Q, K or V as fp8 numbers and their scales, rotated on the way if asked for.

    Y     = X R                        [rows, dim]       R: below, or none
    scale = max |Y| / 448              over a tile of rows, a head or the tensor; of the finite numbers alone
    X8    = round(Y / scale)           e4m3

A rotation of the columns leaves products as they are, Q R (K R)ᵀ = Q Kᵀ, and spreads what is large in a few
columns over all, so that the scale is not theirs alone (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456;
FlashAttention-3, Shah et al. 2024, arXiv 2407.08608, "incoherent processing"). R is diagonal in blocks of
`side` columns, the largest power of two that divides dim, at most 128: in each a Hadamard matrix with signs,

    R_ij = (-1)^(Σ i_2n i_2n+1) · (-1)^(Σ i_n j_n) / √side         i_n, j_n: bits of i and j

The signs, a bent function of i (Rothaus 1976), keep a row that is the same in all columns from gathering in
one: Hadamard's matrix alone would sum it up there.

A program owns a tile of rows. It measures them, or is told their scale, and writes them, or leaves it to a
second launch, once all tiles that share a scale are measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile, store_tile
from ..parts.fp8 import LARGEST
from ..parts.numerics import float32_precision, matmul, round_to, widen
from ..parts.shape import ceil_div, next_power_of_two
from .launch import launch

Tensor = torch.Tensor

MOST_COLUMNS = 128  # that are rotated, and loaded, together
NARROWEST_BLOCK = 16  # a matmul's
ROWS_AT_ONCE = 64
INVERSE_LARGEST = tl.constexpr(1.0 / LARGEST)
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)  # fp32's smallest normal number


def side_of(dim: int) -> int:
    """The columns of a block that is rotated in itself."""
    return min(MOST_COLUMNS, dim & -dim)


@triton.jit
def is_odd(bits):
    """Whether the number of bits that are set is odd, for numbers below 2⁸."""
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    return ((bits ^ (bits >> 1)) & 1) != 0


@triton.jit
def rotation(dtype: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """R · √SIDE of BLOCK columns, whose numbers are 1, -1 and 0, in a dtype."""
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    inside = i % SIDE
    sign = is_odd((inside & (inside >> 1) & 0x55) ^ (inside & j))
    r = tl.where(i // SIDE == j // SIDE, tl.where(sign, -1.0, 1.0), 0.0)  # [BLOCK, BLOCK]
    return round_to(r, dtype)


@triton.jit
def block_of(
    x_head, rows, valid, START: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr,
    SHRINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of rows of Y, from START on, [rows, BLOCK] in fp32; SIDE: 0 without a rotation."""
    x = load_tile(x_head, rows, valid, START, DIM, BLOCK)  # [rows, BLOCK]
    if SIDE == 0:
        return widen(x)
    else:
        # Y = X R
        zero = tl.zeros([x.shape[0], BLOCK], tl.float32)
        return matmul(x, rotation(x.dtype, SIDE, BLOCK), zero, PRECISION) * SHRINK


@triton.jit
def quantize_kernel(
    x,  # (pointer, strides), [blocks, heads, rows, DIM]
    x8,  # the same, or None: the rows are only measured
    scale,  # (pointer, strides), [blocks, heads, tiles]
    sizes,  # (heads, rows, tiles, rows of a tile)
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    SHRINK: tl.constexpr,  # 1 / √SIDE
    IS_MEASURED: tl.constexpr,  # the scale is there
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,  # rows at once
):
    heads, row_count, tiles, tile_rows = sizes
    program = tl.program_id(0)
    tile, head, block = program % tiles, program // tiles % heads, program // tiles // heads
    place = (block, block * 0)
    x_head = head_of(x, place, head)
    first = tile * tile_rows
    last = tl.minimum(first + tile_rows, row_count)
    scale_ptr, scale_strides = scale
    scale_ptr += block.to(tl.int64) * scale_strides[0] + head.to(tl.int64) * scale_strides[1]
    scale_ptr += tile.to(tl.int64) * scale_strides[2]

    if IS_MEASURED:
        factor = tl.load(scale_ptr)
    else:
        largest = tl.zeros([TILE], tl.float32)
        for start in range(first, last, TILE):
            rows = start + tl.arange(0, TILE)
            for c in tl.static_range(0, DIM, BLOCK):
                y = block_of(x_head, rows, rows < last, c, DIM, BLOCK, SIDE, SHRINK, PRECISION)
                size = tl.abs(y)  # [TILE, BLOCK]
                largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0), 1))
        factor = tl.max(largest) * INVERSE_LARGEST
        if x8 is not None:  # else it is one of several, which become a scale together
            factor = tl.where(factor > 0.0, tl.maximum(factor, SMALLEST_SCALE), 1.0)
        tl.store(scale_ptr, factor)
    if x8 is not None:
        x8_head = head_of(x8, place, head)
        inverse = tl.div_rn(factor * 0.0 + 1.0, factor)
        for start in range(first, last, TILE):
            rows = start + tl.arange(0, TILE)
            for c in tl.static_range(0, DIM, BLOCK):
                y = block_of(x_head, rows, rows < last, c, DIM, BLOCK, SIDE, SHRINK, PRECISION)
                y8 = round_to(y * inverse, x8[0].dtype.element_ty)
                store_tile(x8_head, y8, rows, rows < last, c, DIM, BLOCK)


def launch_quantize(
    x: Tensor, x8: Tensor | None, scale: Tensor, rows: int, is_rotated: bool, is_measured: bool
) -> None:
    """Fill x8, if it is given, and, unless it is measured already, scale [blocks, heads, tiles of so many
    rows] in fp32, for x [blocks, heads, length, dim]; any strides."""
    blocks, heads, length, dim = x.shape
    side = side_of(dim) if is_rotated else 0
    tiles = ceil_div(length, rows)
    if 0 in (blocks, heads, tiles):
        return
    arguments: dict[str, Any] = dict(
        x=(x, x.stride()),
        x8=None if x8 is None else (x8, x8.stride()),
        scale=(scale, scale.stride()),
        sizes=(heads, length, tiles, rows),
        DIM=dim,
        BLOCK=max(NARROWEST_BLOCK, side) if is_rotated else min(MOST_COLUMNS, next_power_of_two(dim)),
        SIDE=side,
        SHRINK=side**-0.5 if side else 1.0,
        IS_MEASURED=is_measured,
        PRECISION="ieee" if x.dtype == torch.float32 else float32_precision(),
        TILE=min(ROWS_AT_ONCE, max(NARROWEST_BLOCK, next_power_of_two(rows))),
        num_warps=4,
        enable_fp_fusion=False,
    )
    launch(quantize_kernel, (blocks * heads * tiles,), x, **arguments)
