"""The tangent of dQ: a program owns a tile of rows and walks its keys, as `dq_kernel` does.

    S, Ṡ, P        as in forward.py         Ṗ = P · (Ṡ - mean)
    dP  = dO Vᵀ                             dṖ = dO V̇ᵀ                                dO stands still
    dS  = P · (dP - delta)                  dṠ = Ṗ · (dP - delta) + P · (dṖ - deltȧ)
    back through the modifiers to the dot products Z, both: parts/scores/tangents.py
    dQ  = dZ K                              dQ̇ = dŻ K + dZ K̇                          [rows, head_dim]

This is also the gradient in Q of <dO, Ȯ> + <dLSE, mean>, for derivatives in two directions do not depend on
their order. So one kernel serves those who derive a gradient and those who derive a tangent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parts.addressing import head_of, rows_of, tensors_of
from ...parts.dropout import dropout_keep
from ...parts.intervals import intersect_intervals, kept_pairs, kv_range
from ...parts.numerics import round_to
from ...parts.pieces import (
    load_pieces,
    product,
    products,
    rounded,
    scaled,
    store_pieces,
    where_rows,
    zero_pieces,
)
from ...parts.scores.tangents import pull_back_tangents
from ...parts.softmax import softmax_probabilities
from ..call import programs
from ..coverage import list_keys
from ..launch import launch
from ..tile import Tile
from ..walk import listed_keys, load_keys, own_rows, step_keys, steps_of, walked
from .call import SecondCall, second_arguments
from .scores import gradients_and_tangents, scores_and_tangents


@triton.jit
def rows_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    moves,  # this and what follows, to SECONDS: `second_arguments`
    statistics,
    DERIVATIVES: tl.constexpr,
    MOVING: tl.constexpr,
    rows,
    SECONDS: tl.constexpr,
    lists,  # of the tiles of keys that each tile of rows visits: coverage.py; or ()
    dqueries,  # dQ̇, (pointer, strides)
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    move_queries, move_keys, move_values = tensors_of(moves[0], moves[1])
    dout, mean_ptr, delta_ptr, delta_dot_ptr = rows
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
    do = load_pieces(
        head_of(dout, q_place, head), q_idx, valid, VALUE_DIM, VALUE_TILE
    )  # [TILE_Q, VALUE_TILE]
    k_walk = walked(keys, (), kv_place, head // group, layout)
    v_walk = walked(values, (), kv_place, head // group, layout)
    k_move = walked(move_keys, (), kv_place, head // group, layout)
    v_move = walked(move_values, (), kv_place, head // group, layout)
    rows_ptr = rows_of(q_place, head, q_heads, q_rows)
    row_max = tl.load(statistics[0] + rows_ptr + row)[:, None]  # [TILE_Q, 1]
    sum_log2 = tl.load(statistics[1] + rows_ptr + row)[:, None]
    mean = tl.load(mean_ptr + rows_ptr + row)[:, None]
    delta = tl.load(delta_ptr + rows_ptr + row)[:, None]
    delta_dot = tl.load(delta_dot_ptr + rows_ptr + row)[:, None]
    dq = zero_pieces(TILE_Q, HEAD_TILE)  # [TILE_Q, HEAD_TILE]

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(k_walk, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            k_dot = load_keys(k_move, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)
            s, t, inputs, tangents = scores_and_tangents(
                q, q_dot, k, k_dot, batch, head, row[:, None], kv_row[None, :], unit, SCORES, DERIVATIVES,
                score_args, MOVING, moves[2], PRECISION,
            )  # fmt: skip
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            v = load_keys(v_walk, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE)
            v_dot = load_keys(
                v_move, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE
            )  # [TILE_KV, VALUE_TILE]
            # dP = dO Vᵀ        dṖ = dO V̇ᵀ
            dp, dp_dot = product(do, v, PRECISION), product(do, v_dot, PRECISION)
            keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False)
            ds, dt = gradients_and_tangents(p, p * (t - mean), dp, dp_dot, keep, dropout, delta, delta_dot)
            ds, dt = pull_back_tangents(
                ds, dt, inputs, tangents, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, SECONDS,
                score_args, MOVING, moves[2], 0,
            )  # fmt: skip
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                    mask_args,
                )  # fmt: skip
                ds, dt = tl.where(kept, ds, 0.0), tl.where(kept, dt, 0.0)
                if HAS_GAPS:  # 0 · NaN is NaN: a key that no row sees must not enter the sum
                    seen = tl.max(kept.to(tl.int32), 0) != 0
                    k, k_dot = where_rows(seen, k), where_rows(seen, k_dot)
            # dQ̇ = dQ̇ + dŻ K + dZ K̇
            dq = products(round_to(dt, k[0].dtype), k, dq, PRECISION)  # [TILE_Q, HEAD_TILE]
            dq = products(round_to(ds, k[0].dtype), k_dot, dq, PRECISION)

    if unit is not None:
        dq = scaled(dq, unit)
    dq = rounded(dq, dqueries[0].dtype.element_ty)
    store_pieces(head_of(dqueries, q_place, head), dq, q_idx, valid, HEAD_DIM, HEAD_TILE)


def launch_rows(second: SecondCall, dq: torch.Tensor, tile: Tile) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim]."""
    shape = second.tangent.call.shape
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    if grid:
        arguments = second_arguments(second, tile) | dict(
            lists=list_keys(second.tangent.call, tile, grid),
            dqueries=(dq, dq.stride()),
            HAS_GAPS=second.tangent.call.has_gaps,
        )
        launch(rows_kernel, (grid,), dq, **arguments)
