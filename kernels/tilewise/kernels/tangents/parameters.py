"""The tangents of the gradients of what scores are made of: parameters.py, derived once more.

    dθ[e] = Σ dS' · ∂f/∂θ        dθ̇[e] = Σ dṠ' · ∂f/∂θ + dS' · (∂²f/∂θ∂s Ṡ + Σ ∂²f/∂θ∂θ' θ̇')

over the pairs that read element e, S' being what the modifier f returned. Walks and sums are those of
parameter_walks.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...parts.addressing import head_of, rows_of, tensors_of
from ...parts.dropout import dropout_keep
from ...parts.intervals import intersect_intervals, kept_pairs, visits_and_full
from ...parts.pieces import load_pieces, product
from ...parts.scores.score import Parameter
from ...parts.scores.tangents import moved_derivative, pull_back_tangents
from ...parts.sequences import first_tile, sequence_at, tiles_of
from ...parts.softmax import softmax_probabilities
from ..launch import launch
from ..parameters import finished, walk_arguments
from ..tile import Tile
from .call import SecondCall, second_arguments
from .scores import gradients_and_tangents, scores_and_tangents


@triton.jit
def second_parameter_kernel(
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
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    ranges_ptr,  # this and what follows, to STORE: `walk_arguments`
    grad_ptr,
    grad_sizes,
    pairs,
    own,
    sum_args,
    MODIFIER: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BUCKETS: tl.constexpr,
    BEGIN: tl.constexpr,
    AT: tl.constexpr,
    START: tl.constexpr,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    OWN_SECONDS: tl.constexpr,  # of DERIVATIVE by what the modifier is given
):
    tl.static_assert(TILE_Q == TILE_KV, "a program may own a tile of either")
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    move_queries, move_keys, move_values = tensors_of(moves[0], moves[1])
    dout, mean_ptr, delta_ptr, delta_dot_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    range_tiles = tiles_of(q_rows, layout[0], TILE_Q)
    program = tl.program_id(0)
    begin, steps = BEGIN(program, own, pairs, sizes, layout, TILE_Q)
    total = START(TILE_Q, BUCKETS)
    for step in range(steps):
        batch, head, q_tile, kv_tile = AT(begin, step, own, pairs)
        q_place, kv_place, q_len, kv_len = sequence_at(batch, sizes, layout)
        kv_start, kv_head = kv_tile * TILE_KV, head // group
        head_tiles = (q_place[0].to(tl.int64) * q_heads + head) * range_tiles
        range_ptr = ranges_ptr + (head_tiles + first_tile(q_place, batch, layout, TILE_Q)) * 4
        q_tiles = tl.cdiv(q_len, TILE_Q)
        visits, _full = visits_and_full(range_ptr, q_tile, q_tiles, kv_start, kv_start + TILE_KV)
        if visits:
            q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
            row = tl.minimum(q_idx, q_len - 1)
            kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
            kv_row = tl.minimum(kv_idx, kv_len - 1)
            q_mask, kv_mask = q_idx < q_len, kv_idx < kv_len
            q_head, q_move = head_of(queries, q_place, head), head_of(move_queries, q_place, head)
            k_head, k_move = head_of(keys, kv_place, kv_head), head_of(move_keys, kv_place, kv_head)
            v_head, v_move = head_of(values, kv_place, kv_head), head_of(move_values, kv_place, kv_head)
            q = load_pieces(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
            q_dot = load_pieces(q_move, q_idx, q_mask, HEAD_DIM, HEAD_TILE)
            k = load_pieces(k_head, kv_idx, kv_mask, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            k_dot = load_pieces(k_move, kv_idx, kv_mask, HEAD_DIM, HEAD_TILE)
            rows_ptr = rows_of(q_place, head, q_heads, q_rows)
            row_max = tl.load(statistics[0] + rows_ptr + row)[:, None]  # [TILE_Q, 1]
            sum_log2 = tl.load(statistics[1] + rows_ptr + row)[:, None]
            mean = tl.load(mean_ptr + rows_ptr + row)[:, None]
            delta = tl.load(delta_ptr + rows_ptr + row)[:, None]
            delta_dot = tl.load(delta_dot_ptr + rows_ptr + row)[:, None]

            s, t, inputs, tangents = scores_and_tangents(
                q, q_dot, k, k_dot, batch, head, row[:, None], kv_row[None, :], unit, SCORES, DERIVATIVES,
                score_args, MOVING, moves[2], PRECISION,
            )  # fmt: skip
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            do = load_pieces(
                head_of(dout, q_place, head), q_idx, q_mask, VALUE_DIM, VALUE_TILE
            )  # [TILE_Q, VALUE_TILE]
            v = load_pieces(v_head, kv_idx, kv_mask, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
            v_dot = load_pieces(v_move, kv_idx, kv_mask, VALUE_DIM, VALUE_TILE)
            # dP = dO Vᵀ        dṖ = dO V̇ᵀ
            dp, dp_dot = product(do, v, PRECISION), product(do, v_dot, PRECISION)
            keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False)
            ds, dt = gradients_and_tangents(p, p * (t - mean), dp, dp_dot, keep, dropout, delta, delta_dot)
            # dS' and its tangent: back to what the modifier returned
            ds, dt = pull_back_tangents(
                ds, dt, inputs, tangents, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, SECONDS,
                score_args, MOVING, moves[2], MODIFIER + 1,
            )  # fmt: skip
            change = moved_derivative(
                tl.zeros_like(ds), MODIFIER, inputs[MODIFIER], tangents[MODIFIER], batch, head, row[:, None],
                kv_row[None, :], OWN_SECONDS, score_args[MODIFIER], MOVING, moves[2],
            )  # fmt: skip
            if DERIVATIVE is not None:
                dt *= DERIVATIVE(
                    inputs[MODIFIER], batch, head, row[:, None], kv_row[None, :], score_args[MODIFIER]
                )
            dt += ds * change
            lo, hi, _whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
            kept = kept_pairs(
                row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS, mask_args
            )
            dt = tl.where(kept & q_mask[:, None], dt, 0.0)
            total = ADD(total, dt, batch, row, kv_row, sum_args, BUCKETS)
    STORE(grad_ptr, total, program, own, grad_sizes, TILE_Q)


def second_parameter_gradient(
    second: SecondCall,
    modifier: int,
    parameter: Parameter,
    own_seconds: tuple[tuple[int, int, object], ...],
    tensor: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """The tangent of the gradient of `tensor`, in its shape and dtype: `parameter_gradient`."""
    shape = second.tangent.call.shape
    if tensor.numel() == 0 or 0 in shape.scores:
        return torch.zeros_like(tensor)
    walk = walk_arguments(shape, second.ranges, modifier, parameter, tensor, tile, tensor.dtype)
    arguments = second_arguments(second, tile) | walk
    launch(second_parameter_kernel, (math.prod(walk["own"]),), tensor, **arguments, OWN_SECONDS=own_seconds)
    return finished(walk, shape, parameter, tensor, tile, tensor.dtype)
