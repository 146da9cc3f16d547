"""Gradients of what scores are made of: bias, slopes, tables, scales.

A pair's score depends on one element of such a parameter, so the element's gradient is a sum over its pairs:

    dparameter[e] = Σ_{pairs that read e} dS · ∂score/∂e

One kernel takes this sum for one parameter: a program owns some elements and walks the tiles of pairs that
read them, as parameter_walks.py plans it; it recomputes S and dS there as the backward does, and adds the
products pair by pair.

Sums that remain (over the tiles of a head, say) are PyTorch's, or `sequence_sums_kernel`'s where only the
device knows which tiles are a sequence's. No atomics: the same inputs give the same bits. Beyond the gradient
itself, memory is linear in length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, rows_of, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.intervals import intersect_intervals, kept_pairs, visits_and_full
from ..parts.pieces import load_pieces, product
from ..parts.scores.score import Parameter, apply_scores, pull_back
from ..parts.sequences import first_tile, sequence_at, tiles_of
from ..parts.shape import Shape, next_power_of_two
from ..parts.softmax import softmax_probabilities
from ..parts.statistics import add_statistics, load_row_gradients
from .backward import backward_arguments
from .call import sizes_of
from .launch import launch
from .parameter_walks import EACH_PAIR, ONE, plan
from .prepare import BackwardCall
from .tile import Tile


@triton.jit
def parameter_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    rows,  # dO and three numbers a row: `backward_arguments`
    of_rows,  # and those that statistics hand in: statistics.py
    DERIVATIVES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    ranges_ptr,
    grad_ptr,
    grad_sizes,
    pairs,
    own,
    sum_args,
    MODIFIER: tl.constexpr,  # the parameter's place in SCORES
    DERIVATIVE: tl.constexpr,  # of that modifier, with respect to the parameter; None: it is 1
    BUCKETS: tl.constexpr,  # how many sums of buckets there are, up to a power of two
    BEGIN: tl.constexpr,  # a walk, by its two functions
    AT: tl.constexpr,
    START: tl.constexpr,  # a sum, by its three
    ADD: tl.constexpr,
    STORE: tl.constexpr,
):
    tl.static_assert(TILE_Q == TILE_KV, "a program may own a tile of either")
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    dout, max_ptr, sum_ptr, delta_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    range_tiles = tiles_of(q_rows, layout[0], TILE_Q)
    program = tl.program_id(0)
    begin, steps = BEGIN(program, own, pairs, sizes, layout, TILE_Q)
    total = START(TILE_Q, BUCKETS)
    for step in range(steps):
        batch, head, q_tile, kv_tile = AT(begin, step, own, pairs)
        q_place, kv_place, q_len, kv_len = sequence_at(batch, sizes, layout)
        kv_start = kv_tile * TILE_KV
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
            q_head, do_head = head_of(queries, q_place, head), head_of(dout, q_place, head)
            k_head, v_head = head_of(keys, kv_place, head // group), head_of(values, kv_place, head // group)
            q = load_pieces(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
            do = load_pieces(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
            k = load_pieces(k_head, kv_idx, kv_mask, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_pieces(v_head, kv_idx, kv_mask, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
            rows_ptr = rows_of(q_place, head, q_heads, q_rows)
            row_max = tl.load(max_ptr + rows_ptr + row)[:, None]  # [TILE_Q, 1]
            sum_log2 = tl.load(sum_ptr + rows_ptr + row)[:, None]
            delta = tl.load(delta_ptr + rows_ptr + row)[:, None]

            # S = scores(Q Kᵀ)
            s = product(q, k, PRECISION)
            s, inputs = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            # dP = dO Vᵀ
            dp = product(do, v, PRECISION)
            dp = drop(dp, dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False), dropout)
            # dS = P · (dP - delta), and back to what the modifier returned
            gradients = load_row_gradients(of_rows, rows_ptr, row, None)
            ds = add_statistics(
                p * (dp - delta), p, s, kv_idx[None, :], row_max, sum_log2, unit, gradients, False
            )
            ds = pull_back(
                ds, inputs, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, score_args,
                MODIFIER + 1,
            )  # fmt: skip
            if DERIVATIVE is not None:
                ds *= DERIVATIVE(
                    inputs[MODIFIER], batch, head, row[:, None], kv_row[None, :], score_args[MODIFIER]
                )
            lo, hi, _whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
            kept = kept_pairs(
                row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS, mask_args
            )
            ds = tl.where(kept & q_mask[:, None], ds, 0.0)
            total = ADD(total, ds, batch, row, kv_row, sum_args, BUCKETS)
    STORE(grad_ptr, total, program, own, grad_sizes, TILE_Q)


@triton.jit
def sequence_sums_kernel(sums_ptr, grad_ptr, q_heads, sizes, layout, TILE: tl.constexpr):
    """From sums of all tiles [q_heads, tiles] those of each sequence [batch, q_heads]."""
    batch, head = tl.program_id(0) // q_heads, tl.program_id(0) % q_heads
    q_place, _kv_place, q_len, _kv_len = sequence_at(batch, sizes, layout)
    first = first_tile(q_place, batch, layout, TILE)
    sums_ptr += head.to(tl.int64) * tiles_of(sizes[2], layout[0], TILE) + first
    total = tl.zeros([128], tl.float32)
    for start in range(0, tl.cdiv(q_len, TILE), 128):
        tile = start + tl.arange(0, 128)
        total += tl.load(sums_ptr + tile, mask=tile < tl.cdiv(q_len, TILE), other=0.0)
    tl.store(grad_ptr + tl.program_id(0), tl.sum(total, 0))


def parameter_gradient(
    backward: BackwardCall, modifier: int, parameter: Parameter, tensor: torch.Tensor, tile: Tile,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gradient of `tensor`, in its shape and, unless one is given, its dtype; `modifier` is the place in
    the chain of the one that reads it. The tile is square, of the rows that backward.ranges was made for."""
    shape, dtype = backward.call.shape, dtype or tensor.dtype
    if tensor.numel() == 0 or 0 in shape.scores:
        return torch.zeros_like(tensor, dtype=dtype)
    walk = walk_arguments(shape, backward.ranges, modifier, parameter, tensor, tile, dtype)
    launch(parameter_kernel, (math.prod(walk["own"]),), tensor, **backward_arguments(backward, tile), **walk)
    return finished(walk, shape, parameter, tensor, tile, dtype)


def walk_arguments(
    shape: Shape, ranges: torch.Tensor, modifier: int, parameter: Parameter, tensor: torch.Tensor, tile: Tile,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """What a kernel of a parameter's sums is told of them; of `grad_ptr`, which it fills, `finished` makes
    the gradient in this dtype."""
    walk, kept, own, sums, sizes = plan(parameter, tensor, shape, tile.tile_q)
    # Pairs are written as they are; sums are added up once more, and rounded after that.
    grad = torch.empty(sums, dtype=dtype if kept is EACH_PAIR else torch.float32, device=tensor.device)
    buckets = parameter.buckets
    return dict(
        ranges_ptr=ranges,
        grad_ptr=grad,
        grad_sizes=sizes,
        pairs=(shape.batch, shape.q_heads),
        own=own,
        sum_args=() if buckets is None else (buckets, buckets.shape[0] // 2, parameter.shift_args),
        MODIFIER=modifier,
        DERIVATIVE=parameter.derivative,
        BUCKETS=1 if buckets is None else next_power_of_two(tensor.shape[1]),
        BEGIN=walk.begin,
        AT=walk.at,
        START=kept.start,
        ADD=kept.add,
        STORE=kept.store,
    )


def finished(
    walk: dict[str, Any], shape: Shape, parameter: Parameter, tensor: torch.Tensor, tile: Tile,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The gradient of `tensor` from what the programs of `walk_arguments` wrote."""
    grad: torch.Tensor = walk["grad_ptr"]
    if parameter.buckets is not None:
        total = grad.sum((0, 2))
    elif walk["STORE"] is ONE.store and shape.packing is not None and parameter.sizes[0] > 1:
        total = sequence_sums(grad, shape, tile.tile_q).sum_to_size(parameter.sizes)
    else:
        total = grad.sum_to_size(parameter.sizes)
    return total.to(dtype).reshape(tensor.shape)


def sequence_sums(sums: torch.Tensor, shape: Shape, tile: int) -> torch.Tensor:
    """From a sum a tile [1, q_heads, tiles, 1] one a packed sequence [batch, q_heads, 1, 1]."""
    grad = sums.new_empty(shape.batch, shape.q_heads, 1, 1)
    given = (sums, grad, shape.q_heads, sizes_of(shape), shape.layout)
    launch(sequence_sums_kernel, (grad.numel(),), grad, *given, TILE=tile)
    return grad
