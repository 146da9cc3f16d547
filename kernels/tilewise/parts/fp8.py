"""Numbers of 8 bits: what q, k and v in float8_e4m3fn stand for, and how P is multiplied with such values.

    Q = q_scale · Q8        K = k_scale · K8        V = v_scale · V8          Q8, K8, V8: float8_e4m3fn

A scale is one number for the tensor, for a head, or for a tile of rows, and is read on the device. Those of
Q and K are the first score modifier, so all that follows has the scores that it would have without them:

    S  = (q_scale k_scale) · Q8 K8ᵀ                            fp32

P lies between 0 and 1, where e4m3 has no numbers below 2⁻⁹: it is stretched before it is rounded. Scales of V
that change along the keys go with it, as shares of the head's largest one; what is left is a factor of O:

    P8 = round(P · (v_scale / largest) · peak)                 e4m3; peak: a power of two, so that P8 ≤ 448
    O  = (Σ P8 V8) · (largest / peak) / row_sum                sums in fp32; row_sum is that of P, not of P8

e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) has 3 bits of fraction: an error of up to 1/16 a number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .addressing import page_of
from .scores.score import BoundScore, Score
from .sequences import rows_at
from .shape import Shape, ceil_div

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of its numbers
NARROWEST_FP8 = 32  # columns that a matmul of such numbers needs
ALIGNED = 16  # bytes by which a column of numbers that lie along the rows begins

Tensor = torch.Tensor


class Scales(NamedTuple):
    """What float8_e4m3fn numbers stand for: q is `q` · its 8 bits, and so k and v.

    q, k, v: fp32 tensors of positive, finite numbers on the device of what they scale, each of which
        broadcasts to [batch, heads]; with `rows` to [batch, heads, tiles], a number for each so many rows of
        a head, the last tile perhaps of fewer. Of packed tensors the rows are counted over all tokens and
        batch is 1; of a cache in pages inside each page, [pages, heads, tiles].
    rows: the rows of a tile; None: scales do not change along them.
    dtype: out's, torch.float16, torch.bfloat16 or torch.float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: int | None = None
    dtype: torch.dtype = torch.bfloat16


def empty_numbers(x: Tensor, rows: int, along_rows: bool) -> tuple[Tensor, Tensor]:
    """Where `quantize` puts the numbers of x [blocks, heads, length, dim], in x's memory order or each column
    in one piece, and their scales. rows: of a tile; 0: a scale for each head, -1: for the tensor."""
    blocks, heads, length, dim = x.shape
    if along_rows:
        padded = ceil_div(length, ALIGNED) * ALIGNED
        x8 = x.new_empty((blocks, heads, dim, padded), dtype=FP8).transpose(2, 3)[:, :, :length]
    else:
        x8 = torch.empty_like(x, dtype=FP8)
    sizes: tuple[int, ...] = (blocks, heads, ceil_div(length, rows)) if rows > 0 else (blocks, heads)
    return x8, x.new_empty((1, 1) if rows < 0 else sizes, dtype=torch.float32)


def scale_sizes(shape: Shape, rows: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the scales of q, and those of k and v, broadcast to."""
    if rows is None:
        return (shape.batch, shape.q_heads), (shape.batch, shape.kv_heads)
    blocks, length = (1 if shape.packing is not None else shape.batch), shape.kv_len
    if shape.cache is not None:
        pages = shape.cache.pages
        blocks, length = (shape.batch, length) if pages is None else (pages.page_count, pages.page_size)
    q_sizes = (shape.blocks, shape.q_heads, ceil_div(shape.q_len, rows))
    return q_sizes, (blocks, shape.kv_heads, ceil_div(length, rows))


def given_scale(scale: Tensor, sizes: tuple[int, ...], rows: int | None) -> tuple[Any, ...]:
    """A scale for `scale_at`, every number where that looks for it: Triton 3.6 loses strides that are 1 on
    their way through functions."""
    scale = scale.expand(sizes).contiguous()
    return (scale, sizes[1]) if rows is None else (scale, *sizes[1:], rows)


# ---- The scales of Q and K


@triton.jit
def scale_at(scale, side, batch, head, rows, count):
    """The scales of rows of a head of the caller's sequence `batch`, one number if they do not change along
    rows. scale: a pointer to [batch, heads], and heads; or to [blocks, heads, tiles], heads, tiles and the
    rows of a tile. side, count: sequences.py."""
    heads = scale[1]
    if len(scale) == 2:
        return tl.load(scale[0] + (batch.to(tl.int64) * heads + head))
    elif len(side) == 3 and len(side[2]) > 0:
        table_ptr, table_strides, page_size, page_count = side[2]
        table_ptr += batch.to(tl.int64) * table_strides[0]
        page = page_of(rows, None, (table_ptr, table_strides[1], page_size, page_count))
        return tl.load(scale[0] + ((page * heads + head) * scale[2] + (rows % page_size) // scale[3]))
    else:
        place, _length = rows_at(side, batch, count)
        tile = (place[1] + rows) // scale[3]
        return tl.load(scale[0] + ((place[0].to(tl.int64) * heads + head) * scale[2] + tile))


@triton.jit
def descale(s, batch, head, q_idx, kv_idx, args):
    """q_scale · k_scale · s of each pair."""
    q_scale, k_scale, sizes, layout = args
    _q_heads, group, q_rows, kv_rows = sizes
    q_factor = scale_at(q_scale, layout[0], batch, head, q_idx, q_rows)
    return s * (q_factor * scale_at(k_scale, layout[1], batch, head // group, kv_idx, kv_rows))


class Descaled(Score):
    """s becomes q_scale · k_scale · s."""

    def __init__(self, scales: Scales) -> None:
        self.scales = scales

    def bind(self, shape: Shape) -> BoundScore:
        q_sizes, kv_sizes = scale_sizes(shape, self.scales.rows)
        q_scale = given_scale(self.scales.q, q_sizes, self.scales.rows)
        k_scale = given_scale(self.scales.k, kv_sizes, self.scales.rows)
        sizes = (shape.q_heads, shape.group, shape.q_len, shape.kv_len)
        return BoundScore(descale, (q_scale, k_scale, sizes, shape.layout))


class ValueScales(NamedTuple):
    """What a kernel is told of the scales of V, for `scale_at`; all None where V is not fp8."""

    share: tuple[Any, ...] | None = None  # where they change along the keys
    largest: tuple[Any, ...] | None = None  # of each head
    peak: float | None = None


# ---- Those of V: the three of `ValueScales`


@triton.jit
def stretched(p, share, largest, peak, batch, kv_head, kv_row, sizes, layout):
    """P · (v_scale / largest) · peak, for a tile P [TILE_Q, TILE_KV] of keys kv_row [TILE_KV]."""
    if largest is not None:
        factor = peak
        if share is not None:
            most = scale_at(largest, layout[1], batch, kv_head, kv_row, sizes[3])
            part = scale_at(share, layout[1], batch, kv_head, kv_row, sizes[3])  # [TILE_KV]
            factor = (part * (peak / most))[None, :]
        p = p * factor
    return p


@triton.jit
def shrunk(factor, largest, peak, batch, kv_head, sizes, layout):
    """The factor that is due to the rows of O, times largest / peak."""
    if largest is None:
        return factor
    else:
        return factor * (scale_at(largest, layout[1], batch, kv_head, kv_head, sizes[3]) / peak)


def peak_of(kept_factor: float) -> float:
    """The largest power of two by which weights of up to kept_factor, that of dropout, stay within e4m3."""
    return 2.0 ** math.floor(math.log2(LARGEST / kept_factor)) if kept_factor else 1.0


def of_values(scales: Scales, shape: Shape, kept_factor: float) -> ValueScales:
    """What `stretched` and `shrunk` take."""
    rows, heads = scales.rows, (shape.batch, shape.kv_heads)
    share: tuple[Any, ...] | None = None
    largest = scales.v
    if rows is not None:
        share = given_scale(scales.v, scale_sizes(shape, rows)[1], rows)
        largest = largest_of(scales.v, rows, shape)
    return ValueScales(share, given_scale(largest, heads, None), peak_of(kept_factor))


def largest_of(scale: Tensor, rows: int, shape: Shape) -> Tensor:
    """The largest scale of each head, [batch or 1, kv_heads]; of a cache, among the tiles with a row."""
    scale, cache = scale.expand(scale_sizes(shape, rows)[1]), shape.cache
    if 0 in scale.shape:
        return scale.new_ones(1, 1)
    if cache is None:
        return scale.amax(2)
    first = torch.arange(scale.shape[2], device=scale.device) * rows  # [tiles], the first row of each
    if cache.pages is not None:
        table, size, count = cache.pages
        scale = scale[table.clamp(0, count - 1).long()].transpose(1, 2)  # [batch, kv_heads, max_pages, tiles]
        first = (torch.arange(table.shape[1], device=scale.device)[:, None] * size + first).flatten()
        scale = scale.flatten(2)
        if 0 in scale.shape:  # no sequence has a page
            return scale.new_ones(1, 1)
    holds = first < cache.kv_lens[:, None, None]
    most = torch.where(holds, scale, 0.0).amax(2)
    return torch.where(most > 0, most, 1.0)
