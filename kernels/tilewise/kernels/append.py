"""New keys and values on their way into a cache, and queries, turned by their positions if so asked.

cache[b, :, lens[b] + i] = new[b, :, i]

"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, keys_of, load_tile, store_tile
from ..parts.numerics import round_to
from ..parts.rotary import RotaryTable, turned
from ..parts.sequences import is_of_a_sequence
from ..parts.shape import Cache, Packing, Shape
from .call import power_of_two_tile, programs
from .launch import launch
from .walk import own_rows

TILE_ROWS, TILE_COLUMNS = 16, 256  # of a program; fewer rows where they are wider


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
    _batch, head, row, _, where, number, _tile = own_rows(sizes, layout, TILE)
    place, kv_place, new_len, kv_len = where
    position = kv_len + row
    new_len = tl.where(is_of_a_sequence(number, sizes, layout, 1, TILE), new_len, 0)
    valid = (row < new_len) & (position < sizes[3])

    k = turned(head_of(new_keys, place, head), row, valid, position, rotary, INTERLEAVED, HEAD_DIM, HEAD_TILE)
    k_head = keys_of(keys, kv_place, head, layout)
    store_tile(k_head, round_to(k, keys[0].dtype.element_ty), position, valid, 0, HEAD_DIM, HEAD_TILE)
    v = load_tile(head_of(new_values, place, head), row, valid, 0, VALUE_DIM, VALUE_TILE)
    store_tile(keys_of(values, kv_place, head, layout), v, position, valid, 0, VALUE_DIM, VALUE_TILE)


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
    _batch, head, row, _, where, _number, _tile = own_rows(sizes, layout, TILE)
    place, _kv_place, q_len, kv_len = where
    position = tl.maximum(kv_len - q_len + row, 0)  # the last query stands at the last key
    q = turned(
        head_of(queries, place, head), row, row < q_len, position, rotary, INTERLEAVED, HEAD_DIM, HEAD_TILE
    )
    q = round_to(q, out[0].dtype.element_ty)
    store_tile(head_of(out, place, head), q, row, row < q_len, 0, HEAD_DIM, HEAD_TILE)


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
    shape, tile = rows_shape(new_k, k, packing, cache), tile_rows(max(k.shape[3], v.shape[3]))
    grid = programs(shape, shape.q_len, tile, shape.q_heads)
    if grid:
        launch(
            append_kernel,
            (grid,),
            k,
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
            TILE=tile,
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
    shape, tile = rows_shape(q, k, packing, cache), tile_rows(k.shape[3])
    grid = programs(shape, shape.q_len, tile, shape.q_heads)
    if grid:
        launch(
            turn_kernel,
            (grid,),
            q,
            (q, q.stride()),
            (out, out.stride()),
            (shape.q_heads, 1, shape.q_len, shape.kv_len),
            shape.layout,
            rotary.args(),
            INTERLEAVED=rotary.is_interleaved,
            HEAD_DIM=q.shape[3],
            HEAD_TILE=power_of_two_tile(q.shape[3]),
            TILE=tile,
            enable_fp_fusion=True,
        )


def tile_rows(dim: int) -> int:
    """The rows of a program, which holds all columns of each."""
    return min(TILE_ROWS, TILE_ROWS * TILE_COLUMNS // power_of_two_tile(dim))


def rows_shape(x: torch.Tensor, k: torch.Tensor, packing: Packing | None, cache: Cache) -> Shape:
    """The rows of x [batch, heads, length, dim], or packed, against a cache: a head of keys for each of x."""
    batch = x.shape[0] if packing is None else packing.batch
    capacity = k.shape[2] if cache.pages is None else cache.pages.table.shape[1] * cache.pages.page_size
    return Shape(batch, x.shape[1], x.shape[1], x.shape[2], capacity, x.shape[3], x.shape[3], packing, cache)
