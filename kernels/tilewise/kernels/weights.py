"""The weights of chosen rows: P = exp(S - row_max) / row_sum, written down for rows that are asked for.

A program owns a tile of the chosen rows, which may stand anywhere, and a tile of keys of one sequence and one
query head. It writes the weights of those of its rows that are of this sequence. What it leaves is 0 already:
the keys of other sequences, rows that there are none of, and what a cache has not filled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, keys_of, rows_of, tensors_of
from ..parts.intervals import intersect_intervals, kept_pairs
from ..parts.pieces import load_pieces, product
from ..parts.scores.score import apply_scores
from ..parts.sequences import tile_of_keys, tiles_of
from ..parts.shape import ceil_div
from ..parts.softmax import softmax_probabilities
from .call import Call, key_programs, shared_arguments
from .launch import launch
from .tile import Tile


@triton.jit
def weights_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    chosen,  # (pointer to the rows' numbers, their stride, how many)
    max_ptr,  # a number a row, contiguous: the forward's row statistics
    sum_ptr,
    weights,  # (pointer, strides of block, head, chosen row and key)
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, _dropout, mask_args, score_args = call
    queries, keys, _values = tensors_of(pointers, strides)
    q_heads, group, q_rows, kv_rows = sizes
    tiles = tiles_of(kv_rows, layout[1], TILE_KV)
    chosen_ptr, stride, count = chosen
    chosen_tiles = tl.cdiv(count, TILE_Q)
    program = tl.program_id(0)
    at = (program % chosen_tiles) * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q], among the chosen
    tile = program // chosen_tiles % tiles
    head = program // chosen_tiles // tiles % q_heads
    block = program // chosen_tiles // tiles // q_heads
    batch, kv_tile, where = tile_of_keys(tile, block, sizes, layout, TILE_KV)
    q_place, kv_place, q_len, kv_len = where
    kv_start = kv_tile * TILE_KV

    number = tl.load(chosen_ptr + at.to(tl.int64) * stride, mask=at < count, other=-1).to(tl.int64)
    number -= q_place[1]
    is_here = (number >= 0) & (number < q_len)  # [TILE_Q]: a row, and of this sequence
    row = tl.where(is_here, number, 0).to(tl.int32)
    if (tl.max(is_here.to(tl.int32)) != 0) & (kv_start < kv_len):
        kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
        kv_row = tl.minimum(kv_idx, kv_len - 1)
        q_head, k_head = head_of(queries, q_place, head), keys_of(keys, kv_place, head // group, layout)
        q = load_pieces(q_head, row, is_here, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
        k = load_pieces(k_head, kv_idx, kv_idx < kv_len, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
        rows_ptr = rows_of(q_place, head, q_heads, q_rows)
        row_max = tl.load(max_ptr + rows_ptr + row)[:, None]  # [TILE_Q, 1]
        sum_log2 = tl.load(sum_ptr + rows_ptr + row)[:, None]

        # S = scores(Q Kᵀ)
        s = product(q, k, PRECISION)  # [TILE_Q, TILE_KV]
        s, _ = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
        p = softmax_probabilities(s, row_max, sum_log2, unit)
        lo, hi, _whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
        kept = kept_pairs(
            row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS, mask_args
        )
        p = tl.where(kept, p, 0.0)
        w_ptr, w_strides = weights
        w_ptr += q_place[0].to(tl.int64) * w_strides[0] + head.to(tl.int64) * w_strides[1]
        columns = (kv_place[1] + kv_idx).to(tl.int64) * w_strides[3]
        ptrs = w_ptr + at.to(tl.int64)[:, None] * w_strides[2] + columns[None, :]
        tl.store(ptrs, p, mask=is_here[:, None] & (kv_idx < kv_len)[None, :])


def launch_weights(
    call: Call, statistics: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, tile: Tile
) -> None:
    """Write the weights of the chosen rows [rows] to weights [blocks, q_heads, rows, kv rows], fp32, which
    are 0. statistics: the forward's [2, blocks, q_heads, q rows]."""
    row_max, sum_log2 = statistics.unbind(0)
    grid = ceil_div(len(chosen), tile.tile_q) * key_programs(call.shape, tile.tile_kv, call.shape.q_heads)
    if not grid or call.shape.q_len == 0:
        return
    arguments = shared_arguments(call) | dict(
        chosen=(chosen, chosen.stride(0), len(chosen)),
        max_ptr=row_max,
        sum_ptr=sum_log2,
        weights=(weights, weights.stride()),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch(weights_kernel, (grid,), weights, **arguments)
