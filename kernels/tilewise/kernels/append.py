"""New keys and values on their way into a cache, and queries, turned by their positions if so asked.

    cache[b, :, lens[b] + i] = new[b, :, i]

A rotary embedding turns pairs of dimensions by the angle φ = position · frequency of the pair, whose cosine
and sine come from a table [positions, rotary_dim / 2]:

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

from ..parts.addressing import head_of, keys_of, load_tile, store_tile, tile_ptrs
from ..parts.numerics import round_to, widen
from ..parts.sequences import is_of_a_sequence, tile_of_rows, tiles_of
from ..parts.shape import Cache, Packing, Shape
from .call import on_device_of, power_of_two_tile, programs

TILE_ROWS = 16


class RotaryTable(NamedTuple):
    """cos and sin [positions, rotary_dim / 2] in fp32 of every position, and whether pairs are interleaved."""

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
    x = widen(load_tile(x_head, rows, row_mask, DIM, DIM_TILE))
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


@triton.jit
def append_kernel(
    new_keys,  # (pointer, strides), as for the next three
    new_values,
    keys,
    values,
    sizes,  # (kv_heads, 1, new rows, capacity)
    layout,  # of the new rows, and of the cache before them
    rotary,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    heads, _group, new_rows, capacity = sizes
    tiles = tiles_of(new_rows, layout[0], TILE)
    program = tl.program_id(0)
    number, head = program % tiles, program // tiles % heads
    _batch, tile, where = tile_of_rows(number, program // tiles // heads, sizes, layout, 1, TILE)
    place, kv_place, new_len, kv_len = where
    row = tile * TILE + tl.arange(0, TILE)
    position = kv_len + row
    new_len = tl.where(is_of_a_sequence(number, sizes, layout, 1, TILE), new_len, 0)
    valid = (row < new_len) & (position < capacity)

    k = turned(
        head_of(new_keys, place, head), row, valid, position, rotary, INTERLEAVED, HEAD_DIM, HEAD_TILE
    )
    k_head = keys_of(keys, kv_place, head, layout)
    store_tile(k_head, round_to(k, keys[0].dtype.element_ty), position, valid, HEAD_DIM, HEAD_TILE)
    v = load_tile(head_of(new_values, place, head), row, valid, VALUE_DIM, VALUE_TILE)
    store_tile(keys_of(values, kv_place, head, layout), v, position, valid, VALUE_DIM, VALUE_TILE)


@triton.jit
def turn_kernel(
    queries,  # (pointer, strides), as for out
    out,
    sizes,  # (q_heads, 1, q_len, capacity)
    layout,  # of queries, and of the cache with the keys that stand beside them
    rotary,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    heads, _group, q_rows, _capacity = sizes
    tiles = tiles_of(q_rows, layout[0], TILE)
    program = tl.program_id(0)
    number, head = program % tiles, program // tiles % heads
    _batch, tile, where = tile_of_rows(number, program // tiles // heads, sizes, layout, 1, TILE)
    place, _kv_place, q_len, kv_len = where
    row = tile * TILE + tl.arange(0, TILE)
    position = tl.maximum(kv_len - q_len + row, 0)  # the last query stands at the last key
    q = turned(
        head_of(queries, place, head), row, row < q_len, position, rotary, INTERLEAVED, HEAD_DIM, HEAD_TILE
    )
    q = round_to(q, out[0].dtype.element_ty)
    store_tile(head_of(out, place, head), q, row, row < q_len, HEAD_DIM, HEAD_TILE)


def launch_append(
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing | None,
    cache: Cache,
    rotary: RotaryTable | None,
) -> None:
    """Write new_k and new_v [batch, kv_heads, new_len, dim], packed [1, kv_heads, tokens, dim], into the
    cache k and v behind the rows that cache.kv_lens says are filled. What has no room is left out."""
    shape = rows_shape(new_k, k, packing, cache)
    grid = programs(shape, shape.q_len, TILE_ROWS, shape.q_heads)
    if grid:
        with on_device_of(k):
            append_kernel[(grid,)](
                (new_k, new_k.stride()),
                (new_v, new_v.stride()),
                (k, k.stride()),
                (v, v.stride()),
                (shape.q_heads, 1, shape.q_len, shape.kv_len),
                shape.layout,
                () if rotary is None else rotary.args(),
                INTERLEAVED=rotary is not None and rotary.is_interleaved,
                HEAD_DIM=k.shape[3],
                VALUE_DIM=v.shape[3],
                HEAD_TILE=power_of_two_tile(k.shape[3]),
                VALUE_TILE=power_of_two_tile(v.shape[3]),
                TILE=TILE_ROWS,
                enable_fp_fusion=True,
            )


def launch_turn(
    q: torch.Tensor,
    out: torch.Tensor,
    k: torch.Tensor,
    packing: Packing | None,
    cache: Cache,
    rotary: RotaryTable,
) -> None:
    """Fill out, of q's shape, with q turned by the positions its rows have beside cache.kv_lens keys."""
    shape = rows_shape(q, k, packing, cache)
    grid = programs(shape, shape.q_len, TILE_ROWS, shape.q_heads)
    if grid:
        with on_device_of(q):
            turn_kernel[(grid,)](
                (q, q.stride()),
                (out, out.stride()),
                (shape.q_heads, 1, shape.q_len, shape.kv_len),
                shape.layout,
                rotary.args(),
                INTERLEAVED=rotary.is_interleaved,
                HEAD_DIM=q.shape[3],
                HEAD_TILE=power_of_two_tile(q.shape[3]),
                TILE=TILE_ROWS,
                enable_fp_fusion=True,
            )


def rows_shape(x: torch.Tensor, k: torch.Tensor, packing: Packing | None, cache: Cache) -> Shape:
    """The rows of x [batch, heads, length, dim], or packed, against a cache: a head of keys for each of x."""
    batch = x.shape[0] if packing is None else packing.batch
    capacity = k.shape[2] if cache.pages is None else cache.pages.table.shape[1] * cache.pages.page_size
    return Shape(
        batch, x.shape[1], x.shape[1], x.shape[2], capacity, x.shape[3], x.shape[3], packing, cache
    )
