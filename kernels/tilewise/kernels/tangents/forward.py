"""The tangent of the forward: Ȯ and that of LSE, a tile at a time.

    S, Ṡ  = scores and their tangents      recomputed from Q, K, Q̇ and K̇:          scores.py
    P     = exp(S - row_max) / row_sum     what the forward kept of a row:           softmax.py
    mean  = Σ P Ṡ                          [rows]: how LSE moves; a sink's share is in it from the start
    Ṗ     = P · (Ṡ - mean)
    Ȯ     = Σ Ṗ V + P V̇                    [rows, value_dim]

A program owns a tile of rows and walks its keys twice: once for the mean, once for Ȯ. One walk would sum
P Ṡ V and take mean · O off at the end; where all Ṡ of a row are large and alike, roundings would be left.

Method: forward-mode differentiation of the softmax (Griewank & Walther, Evaluating Derivatives, 2008, ch. 3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parts.addressing import head_of, rows_of, tensors_of
from ...parts.dropout import drop, dropout_keep
from ...parts.intervals import intersect_intervals, kept_pairs, kv_range
from ...parts.numerics import round_to
from ...parts.pieces import load_pieces, products, rounded, store_pieces, where_rows, zero_pieces
from ...parts.softmax import softmax_probabilities
from ..call import programs
from ..coverage import list_keys
from ..launch import launch
from ..tile import Tile
from ..walk import listed_keys, load_keys, own_rows, step_keys, steps_of, walked
from .call import TangentCall, tangent_arguments
from .scores import scores_and_tangents


@triton.jit
def tangent_kernel(
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
    lists,  # of the tiles of keys that each tile of rows visits: coverage.py; or ()
    out,  # Ȯ, (pointer, strides)
    mean_ptr,  # a number a row, contiguous; it holds the sink's share, if there is a sink
    HAS_SINK: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    move_queries, move_keys, move_values = tensors_of(moves[0], moves[1])
    q_heads, group, q_rows, _kv_rows = sizes
    batch, head, q_idx, row, where, _tile, _q_tile = own_rows(sizes, layout, TILE_Q)
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
    k_walk = walked(keys, (), kv_place, head // group, layout)
    v_walk = walked(values, (), kv_place, head // group, layout)
    k_move = walked(move_keys, (), kv_place, head // group, layout)
    v_move = walked(move_values, (), kv_place, head // group, layout)
    rows_ptr = rows_of(q_place, head, q_heads, q_rows)
    row_max = tl.load(statistics[0] + rows_ptr + row)[:, None]  # [TILE_Q, 1]
    sum_log2 = tl.load(statistics[1] + rows_ptr + row)[:, None]
    mean = tl.zeros([TILE_Q], tl.float32)
    if HAS_SINK:
        mean += tl.load(mean_ptr + rows_ptr + row)
    o = zero_pieces(TILE_Q, VALUE_TILE)  # [TILE_Q, VALUE_TILE]

    for WALK in tl.static_range(2):
        for IS_CUT in tl.static_range(2):
            for step in range(steps_of(span, IS_CUT)):
                kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
                k = load_keys(k_walk, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)
                k_dot = load_keys(
                    k_move, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE
                )  # [TILE_KV, HEAD_TILE]
                s, t, _inputs, _tangents = scores_and_tangents(
                    q, q_dot, k, k_dot, batch, head, row[:, None], kv_row[None, :], unit, SCORES, DERIVATIVES,
                    score_args, MOVING, moves[2], PRECISION,
                )  # fmt: skip
                p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
                if IS_CUT:
                    kept = kept_pairs(
                        row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                        mask_args,
                    )  # fmt: skip
                    p = tl.where(kept, p, 0.0)
                    t = tl.where(kept, t, 0.0)
                if WALK == 0:
                    mean += tl.sum(p * t, 1)
                else:
                    v = load_keys(v_walk, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE)
                    v_dot = load_keys(
                        v_move, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE
                    )  # [TILE_KV, VALUE_TILE]
                    if IS_CUT and HAS_GAPS:  # 0 · NaN is NaN: a key that no row sees must not enter the sum
                        seen = tl.max(kept.to(tl.int32), 0) != 0
                        v, v_dot = where_rows(seen, v), where_rows(seen, v_dot)
                    keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False)
                    # Ȯ = Ȯ + Ṗ V + P V̇
                    p_dot = drop(p * (t - mean[:, None]), keep, dropout)
                    o = products(round_to(p_dot, v[0].dtype), v, o, PRECISION)
                    o = products(round_to(drop(p, keep, dropout), v[0].dtype), v_dot, o, PRECISION)

    tl.store(mean_ptr + rows_ptr + q_idx, mean, mask=valid)
    o = rounded(o, out[0].dtype.element_ty)
    store_pieces(head_of(out, q_place, head), o, q_idx, valid, VALUE_DIM, VALUE_TILE)


def launch_tangent(
    tangent: TangentCall, out: torch.Tensor, mean: torch.Tensor, has_sink: bool, tile: Tile
) -> None:
    """Fill out [batch, q_heads, q_len, value_dim] and mean [batch, q_heads, q_len] fp32, which comes with the
    sink's share of it where there is a sink: its weight times its tangent."""
    shape = tangent.call.shape
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    if grid:
        arguments = tangent_arguments(tangent, tile) | dict(
            lists=list_keys(tangent.call, tile, grid),
            out=(out, out.stride()),
            mean_ptr=mean,
            HAS_SINK=has_sink,
            HAS_GAPS=tangent.call.has_gaps,
        )
        launch(tangent_kernel, (grid,), out, **arguments)
