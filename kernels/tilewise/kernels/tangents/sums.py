"""What does the backward's tangent know before it walks? Two numbers a row, and the keys that tiles visit.

    delta  = Σ_j P dP - dLSE              [rows]     Σ_d dO · O - dLSE, but O is rounded, and P dP is not
    deltȧ  = Σ_j Ṗ dP + P dṖ              [rows]     dP = dO Vᵀ, dṖ = dO V̇ᵀ

The backward takes delta from O, as all fused kernels do. Here what is left of dP - delta and of its tangent
is multiplied once more, and roundings of O to 16 bits would be the largest error of all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parts.addressing import head_of, rows_of, tensors_of
from ...parts.dropout import drop, dropout_keep
from ...parts.intervals import intersect_intervals, kept_pairs, kv_range, store_range
from ...parts.pieces import load_pieces, product
from ...parts.sequences import tiles_of
from ...parts.softmax import softmax_probabilities
from ..call import programs, tile_count
from ..coverage import list_keys
from ..launch import launch
from ..tile import Tile
from ..walk import listed_keys, load_keys, own_rows, step_keys, steps_of, walked
from .call import TangentCall, tangent_arguments
from .scores import scores_and_tangents


@triton.jit
def sums_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    moves,  # this and the next three: `tangent_arguments`
    statistics,
    DERIVATIVES: tl.constexpr,
    MOVING: tl.constexpr,
    dout,  # (pointer, strides)
    mean_ptr,  # a number a row, contiguous, as for the next three
    dlse_ptr,  # or None
    delta_ptr,
    delta_dot_ptr,
    ranges_ptr,  # [.., q_heads, tiles, 4] int32: intervals.py
    lists,  # of the tiles of keys that each tile of rows visits: coverage.py; or ()
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    move_queries, move_keys, move_values = tensors_of(moves[0], moves[1])
    q_heads, group, q_rows, _kv_rows = sizes
    batch, head, q_idx, row, where, tile, q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, kv_place, q_len, kv_len = where
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    if len(lists) > 0:
        span = listed_keys(lo, hi, kv_len, lists, ())
    else:
        span = kv_range(lo, hi, whole, kv_len, TILE_KV)

    valid = q_idx < q_len
    q_head, q_move = head_of(queries, q_place, head), head_of(move_queries, q_place, head)
    q = load_pieces(q_head, q_idx, valid, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    q_dot = load_pieces(q_move, q_idx, valid, HEAD_DIM, HEAD_TILE)
    do = load_pieces(
        head_of(dout, q_place, head), q_idx, valid, VALUE_DIM, VALUE_TILE
    )  # [TILE_Q, VALUE_TILE]
    k_walk = walked(keys, (), kv_place, head // group, layout)
    v_walk = walked(values, (), kv_place, head // group, layout)
    k_move = walked(move_keys, (), kv_place, head // group, layout)
    v_move = walked(move_values, (), kv_place, head // group, layout)
    rows_ptr = rows_of(q_place, head, q_heads, q_rows)
    row_max = tl.load(statistics[0] + rows_ptr + row)  # [TILE_Q]
    sum_log2 = tl.load(statistics[1] + rows_ptr + row)
    mean = tl.load(mean_ptr + rows_ptr + row)
    delta, delta_dot = tl.zeros([TILE_Q], tl.float32), tl.zeros([TILE_Q], tl.float32)

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(k_walk, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            k_dot = load_keys(k_move, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)
            s, t, _inputs, _tangents = scores_and_tangents(
                q, q_dot, k, k_dot, batch, head, row[:, None], kv_row[None, :], unit, SCORES, DERIVATIVES,
                score_args, MOVING, moves[2], PRECISION,
            )  # fmt: skip
            p = softmax_probabilities(s, row_max[:, None], sum_log2[:, None], unit)  # [TILE_Q, TILE_KV]
            v = load_keys(v_walk, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE)
            v_dot = load_keys(
                v_move, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE
            )  # [TILE_KV, VALUE_TILE]
            keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False)
            # dP = dO Vᵀ        dṖ = dO V̇ᵀ
            dp = drop(product(do, v, PRECISION), keep, dropout)
            dp_dot = drop(product(do, v_dot, PRECISION), keep, dropout)
            share, share_dot = p * dp, p * ((t - mean[:, None]) * dp + dp_dot)
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                    mask_args,
                )  # fmt: skip
                share, share_dot = tl.where(kept, share, 0.0), tl.where(kept, share_dot, 0.0)
            delta += tl.sum(share, 1)
            delta_dot += tl.sum(share_dot, 1)

    if dlse_ptr is not None:  # a row without key and sink depends on nothing, whatever gradient it is handed
        dlse = tl.load(dlse_ptr + rows_ptr + row)
        delta -= tl.where(row_max == float("-inf"), 0.0, dlse)
    tl.store(delta_ptr + rows_ptr + q_idx, delta, mask=valid)
    tl.store(delta_dot_ptr + rows_ptr + q_idx, delta_dot, mask=valid)
    tiles = tiles_of(q_rows, layout[0], TILE_Q)
    range_ptr = ranges_ptr + ((q_place[0].to(tl.int64) * q_heads + head) * tiles + tile) * 4
    store_range(range_ptr, lo, hi, whole, kv_len, (q_tile + 1) * TILE_Q > q_len)


def launch_sums(
    tangent: TangentCall, do: torch.Tensor, dlse: torch.Tensor | None, mean: torch.Tensor, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """delta and deltȧ [batch, q_heads, q_len] fp32, and the ranges of keys that tiles of tile.tile_q rows
    visit, [blocks, q_heads, tiles, 4]. dlse and mean are contiguous."""
    shape = tangent.call.shape
    tiles = shape.blocks, shape.q_heads, tile_count(shape, shape.q_len, tile.tile_q)
    delta, delta_dot = torch.empty_like(mean), torch.empty_like(mean)
    ranges = torch.empty(*tiles, 4, dtype=torch.int32, device=do.device)
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    if grid:
        arguments = tangent_arguments(tangent, tile) | dict(
            dout=(do, do.stride()),
            mean_ptr=mean,
            dlse_ptr=dlse,
            delta_ptr=delta,
            delta_dot_ptr=delta_dot,
            ranges_ptr=ranges,
            lists=list_keys(tangent.call, tile, grid),
        )
        launch(sums_kernel, (grid,), do, **arguments)
    return delta, delta_dot, ranges
