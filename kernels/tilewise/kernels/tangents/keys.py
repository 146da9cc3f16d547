"""The tangents of dK and dV: a program owns a tile of keys and walks the rows that visit it, as `dkv_kernel`
does, on the transposes.

    dK = dZᵀ Q        dK̇ = dŻᵀ Q + dZᵀ Q̇        [keys, head_dim]
    dV = Pᵀ dO        dV̇ = Ṗᵀ dO                 [keys, value_dim]

What stands before these lines is that of rows.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...parts.addressing import head_of, load_rows, rows_of, tensors_of
from ...parts.dropout import drop, dropout_keep
from ...parts.intervals import intersect_intervals, kept_pairs, q_range
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
from ...parts.sequences import first_tile, tiles_of
from ...parts.softmax import softmax_probabilities
from ..call import programs
from ..coverage import list_rows
from ..launch import launch
from ..tile import Tile
from ..walk import listed_rows, own_keys, row_steps, row_tile
from .call import SecondCall, second_arguments
from .scores import gradients_and_tangents, scores_and_tangents


@triton.jit
def keys_kernel(
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
    ranges_ptr,
    lists,  # of the tiles of rows that visit each tile of keys: coverage.py; or ()
    dkeys,  # dK̇, (pointer, strides), as for dV̇
    dvalues,
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    move_queries, move_keys, move_values = tensors_of(moves[0], moves[1])
    dout, mean_ptr, delta_ptr, delta_dot_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    batch, kv_head, kv_start, where = own_keys(tl.program_id(0), sizes, layout, TILE_KV)
    q_place, kv_place, q_len, kv_len = where
    q_tiles = tl.cdiv(q_len, TILE_Q)
    range_tiles, range_first = tiles_of(q_rows, layout[0], TILE_Q), first_tile(q_place, batch, layout, TILE_Q)

    kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
    kv_row, valid = tl.minimum(kv_idx, kv_len - 1), kv_idx < kv_len
    k_head, k_move = head_of(keys, kv_place, kv_head), head_of(move_keys, kv_place, kv_head)
    v_head, v_move = head_of(values, kv_place, kv_head), head_of(move_values, kv_place, kv_head)
    k = load_pieces(k_head, kv_idx, valid, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
    k_dot = load_pieces(k_move, kv_idx, valid, HEAD_DIM, HEAD_TILE)
    v = load_pieces(v_head, kv_idx, valid, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
    v_dot = load_pieces(v_move, kv_idx, valid, VALUE_DIM, VALUE_TILE)
    dk, dv = zero_pieces(TILE_KV, HEAD_TILE), zero_pieces(TILE_KV, VALUE_TILE)

    for member in range(group):
        head = kv_head * group + member
        rows_ptr = rows_of(q_place, head, q_heads, q_rows)
        head_tiles = (q_place[0].to(tl.int64) * q_heads + head) * range_tiles + range_first
        if len(lists) > 0:
            span = listed_rows(lists, tl.program_id(0) * group + member)
        else:
            span = q_range(ranges_ptr + head_tiles * 4, q_tiles, kv_start, kv_start + TILE_KV, 128)
        q_head, q_move = head_of(queries, q_place, head), head_of(move_queries, q_place, head)
        do_head = head_of(dout, q_place, head)

        for IS_CUT in tl.static_range(2):
            for step in range(row_steps(span, 0, IS_CUT, False)):
                q_tile = row_tile(step, span, 0, IS_CUT, False)
                q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
                if IS_CUT:
                    row = tl.minimum(q_idx, q_len - 1)
                    lo, hi, _ = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
                    # 0 · NaN is NaN: a row that sees none of these keys must not enter the sums.
                    q_mask = (q_idx < q_len) & (tl.maximum(lo, kv_start) < tl.minimum(hi, kv_start + TILE_KV))
                else:
                    q_mask = None
                    row = q_idx
                q = load_pieces(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
                q_dot = load_pieces(q_move, q_idx, q_mask, HEAD_DIM, HEAD_TILE)
                do = load_pieces(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
                row_max = load_rows(statistics[0] + rows_ptr, q_idx, q_mask)[None, :]  # [1, TILE_Q]
                sum_log2 = load_rows(statistics[1] + rows_ptr, q_idx, q_mask)[None, :]
                mean = load_rows(mean_ptr + rows_ptr, q_idx, q_mask)[None, :]
                delta = load_rows(delta_ptr + rows_ptr, q_idx, q_mask)[None, :]
                delta_dot = load_rows(delta_dot_ptr + rows_ptr, q_idx, q_mask)[None, :]

                sT, tT, inputs, tangents = scores_and_tangents(
                    k, k_dot, q, q_dot, batch, head, row[None, :], kv_row[:, None], unit, SCORES, DERIVATIVES,
                    score_args, MOVING, moves[2], PRECISION,
                )  # fmt: skip
                pT = softmax_probabilities(sT, row_max, sum_log2, unit)  # [TILE_KV, TILE_Q]
                pT_dot = pT * (tT - mean)
                if IS_CUT:
                    kept = q_mask[None, :] & kept_pairs(
                        row[None, :], kv_idx[:, None], kv_len, lo[None, :], hi[None, :], batch, head, KEEPS,
                        mask_args,
                    )  # fmt: skip
                    pT, pT_dot = tl.where(kept, pT, 0.0), tl.where(kept, pT_dot, 0.0)
                    if HAS_GAPS:  # nor a row whose interval has keys here, none of which it sees
                        sees = tl.max(kept.to(tl.int32), 0) != 0
                        q, q_dot, do = where_rows(sees, q), where_rows(sees, q_dot), where_rows(sees, do)
                # dPᵀ = V dOᵀ        dṖᵀ = V̇ dOᵀ
                dpT, dpT_dot = product(v, do, PRECISION), product(v_dot, do, PRECISION)
                keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, True)
                # dV̇ = dV̇ + Ṗᵀ dO
                dv = products(round_to(drop(pT_dot, keep, dropout), do[0].dtype), do, dv, PRECISION)
                dsT, dtT = gradients_and_tangents(pT, pT_dot, dpT, dpT_dot, keep, dropout, delta, delta_dot)
                dsT, dtT = pull_back_tangents(
                    dsT, dtT, inputs, tangents, batch, head, row[None, :], kv_row[:, None], DERIVATIVES,
                    SECONDS, score_args, MOVING, moves[2], 0,
                )  # fmt: skip
                if IS_CUT:
                    dsT, dtT = tl.where(kept, dsT, 0.0), tl.where(kept, dtT, 0.0)
                # dK̇ = dK̇ + dŻᵀ Q + dZᵀ Q̇
                dk = products(round_to(dtT, q[0].dtype), q, dk, PRECISION)
                dk = products(round_to(dsT, q[0].dtype), q_dot, dk, PRECISION)

    if unit is not None:
        dk = scaled(dk, unit)
    dk, dv = rounded(dk, dkeys[0].dtype.element_ty), rounded(dv, dvalues[0].dtype.element_ty)
    store_pieces(head_of(dkeys, kv_place, kv_head), dk, kv_idx, valid, HEAD_DIM, HEAD_TILE)
    store_pieces(head_of(dvalues, kv_place, kv_head), dv, kv_idx, valid, VALUE_DIM, VALUE_TILE)


def launch_keys(second: SecondCall, dk: torch.Tensor, dv: torch.Tensor, tile: Tile) -> None:
    """Fill dk [batch, kv_heads, kv_len, head_dim] and dv [batch, kv_heads, kv_len, value_dim]. tile.tile_q is
    that of second.ranges."""
    shape = second.tangent.call.shape
    grid = programs(shape, shape.kv_len, tile.tile_kv, shape.kv_heads)
    if grid:
        arguments = second_arguments(second, tile) | dict(
            ranges_ptr=second.ranges,
            lists=list_rows(second.tangent.call, tile),
            dkeys=(dk, dk.stride()),
            dvalues=(dv, dv.stride()),
            HAS_GAPS=second.tangent.call.has_gaps,
        )
        launch(keys_kernel, (grid,), dk, **arguments)
