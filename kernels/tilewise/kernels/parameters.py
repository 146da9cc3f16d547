"""Gradients of what scores are made of: bias, slopes, tables, scales.

A pair's score depends on one element of such a parameter, so the element's gradient is a sum over its pairs:

    dparameter[e] = Σ_{pairs that read e} dS · ∂score/∂e

One kernel takes this sum for one parameter. A program owns some elements and walks, step by step, the tiles
of pairs that read them; it recomputes S and dS there as the backward does, and adds the products pair by
pair:

    which pairs read one element      a program owns       its steps                      what it writes
    one pair of each batch or head    a tile of pairs      the batches and heads          the tile
    all keys of a row                 a tile of rows       the tiles of keys              a sum a row
    all rows of a key                 a tile of keys       the tiles of rows              a sum a key
    all pairs at one distance         a diagonal of tiles  the batches, down the diagonal a sum a bucket

On a diagonal of square tiles, the pair (i, j) of every tile has the same distance, which is why pairs can be
added before they are sorted into buckets. Sums that remain (over rows of a slope, say) are PyTorch's. No
atomics: the same inputs give the same bits. Beyond the gradient itself, memory is linear in length.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.intervals import intersect_intervals, kept_pairs, visits_and_full
from ..parts.numerics import matmul, round_to
from ..parts.scores.score import Parameter, apply_scores, pull_back
from ..parts.shape import Shape, ceil_div
from ..parts.softmax import softmax_probabilities
from .backward import backward_arguments
from .call import on_device_of
from .prepare import BackwardCall
from .tile import Tile

# ---- Walks: where a program is at a step, (batch, head, q_tile, kv_tile); and what it writes in the end.
# pairs = (batches, heads, q_tiles, kv_tiles) of all pairs; own = those of what programs own.


@triton.jit
def walk_pairs(program, step, pairs, own):
    """Own: [batches or 1, heads or 1, q_tiles, kv_tiles]. Steps: what is 1 there and more in pairs."""
    kv_tile, q_tile = program % own[3], program // own[3] % own[2]
    head, batch = program // own[3] // own[2] % own[1], program // own[3] // own[2] // own[1]
    steps_of_heads = pairs[1] // own[1]
    return batch + step // steps_of_heads, head + step % steps_of_heads, q_tile, kv_tile


@triton.jit
def walk_keys(program, step, pairs, own):
    """Own: [batches, heads, q_tiles, 1]."""
    q_tile, head = program % own[2], program // own[2] % own[1]
    return program // own[2] // own[1], head, q_tile, step


@triton.jit
def walk_rows(program, step, pairs, own):
    """Own: [batches, heads, 1, kv_tiles]."""
    kv_tile, head = program % own[3], program // own[3] % own[1]
    return program // own[3] // own[1], head, step, kv_tile


@triton.jit
def walk_diagonal(program, step, pairs, own):
    """Own: [1, heads, 1, diagonals], the first through the bottom left tile. Steps: batches, tiles down."""
    diagonal, head = program % own[3], program // own[3]
    q_tile = step % pairs[2]
    return step // pairs[2], head, q_tile, q_tile + diagonal - (pairs[2] - 1)


@triton.jit
def store_pairs(grad_ptr, total, program, own, q_len, kv_len, store_args, TILE: tl.constexpr):
    kv_tile, q_tile = program % own[3], program // own[3] % own[2]
    row = q_tile * TILE + tl.arange(0, TILE)
    column = kv_tile * TILE + tl.arange(0, TILE)
    ptr = grad_ptr + (program // own[3] // own[2]).to(tl.int64) * q_len * kv_len
    ptrs = ptr + row.to(tl.int64)[:, None] * kv_len + column[None, :]
    inside = (row < q_len)[:, None] & (column < kv_len)[None, :]
    tl.store(ptrs, round_to(total, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_row_sums(grad_ptr, total, program, own, q_len, kv_len, store_args, TILE: tl.constexpr):
    row = program % own[2] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (program // own[2]).to(tl.int64) * q_len + row
    tl.store(ptrs, tl.sum(total, 1), mask=row < q_len)


@triton.jit
def store_key_sums(grad_ptr, total, program, own, q_len, kv_len, store_args, TILE: tl.constexpr):
    column = program % own[3] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (program // own[3]).to(tl.int64) * kv_len + column
    tl.store(ptrs, tl.sum(total, 0), mask=column < kv_len)


@triton.jit
def store_bucket_sums(grad_ptr, total, program, own, q_len, kv_len, store_args, TILE: tl.constexpr):
    """The sum of the pairs in each bucket, [buckets], of the program's diagonal."""
    buckets_ptr, buckets, max_distance, shift = store_args
    q_tiles = tl.cdiv(q_len, TILE)
    diagonal = program % own[3] - (q_tiles - 1)
    distance = diagonal * TILE + tl.arange(0, TILE)[None, :] - tl.arange(0, TILE)[:, None] - shift
    distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
    bucket = tl.load(buckets_ptr + max_distance + distance)  # [TILE, TILE]
    for i in range(buckets):
        in_bucket = tl.where(bucket == i, total, 0.0)
        tl.store(grad_ptr + program.to(tl.int64) * buckets + i, tl.sum(tl.sum(in_bucket, 1), 0))


# ---- The kernel


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
    DERIVATIVES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    ranges_ptr,
    grad_ptr,
    steps,
    pairs,
    own,
    store_args,
    MODIFIER: tl.constexpr,  # the parameter's place in SCORES
    DERIVATIVE: tl.constexpr,  # of that modifier, with respect to the parameter; None: it is 1
    WALK: tl.constexpr,
    STORE: tl.constexpr,
):
    tl.static_assert(TILE_Q == TILE_KV, "diagonals need square tiles")
    pointers, strides, sizes, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    dout, max_ptr, sum_ptr, delta_ptr = rows
    q_heads, group, q_len, kv_len = sizes
    program = tl.program_id(0)
    q_tiles = tl.cdiv(q_len, TILE_Q)
    total = tl.zeros([TILE_Q, TILE_KV], tl.float32)
    for step in range(steps):
        batch, head, q_tile, kv_tile = WALK(program, step, pairs, own)
        kv_start = kv_tile * TILE_KV
        range_ptr = ranges_ptr + (batch.to(tl.int64) * q_heads + head) * q_tiles * 4
        visits, _full = visits_and_full(range_ptr, q_tile, q_tiles, kv_start, kv_start + TILE_KV)
        if visits & (kv_tile >= 0):
            q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
            row = tl.minimum(q_idx, q_len - 1)
            kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
            kv_row = tl.minimum(kv_idx, kv_len - 1)
            q_mask, kv_mask = q_idx < q_len, kv_idx < kv_len
            q_head, do_head = head_of(queries, batch, head), head_of(dout, batch, head)
            k_head, v_head = head_of(keys, batch, head // group), head_of(values, batch, head // group)
            q = load_tile(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
            do = load_tile(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
            k = load_tile(k_head, kv_idx, kv_mask, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_tile(v_head, kv_idx, kv_mask, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
            rows_ptr = (batch.to(tl.int64) * q_heads + head) * q_len
            row_max = tl.load(max_ptr + rows_ptr + row)[:, None]  # [TILE_Q, 1]
            sum_log2 = tl.load(sum_ptr + rows_ptr + row)[:, None]
            delta = tl.load(delta_ptr + rows_ptr + row)[:, None]

            # S = scores(Q Kᵀ)
            s = matmul(q, tl.trans(k), tl.zeros([TILE_Q, TILE_KV], tl.float32), PRECISION)
            s, inputs = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            # dP = dO Vᵀ
            dp = matmul(do, tl.trans(v), tl.zeros([TILE_Q, TILE_KV], tl.float32), PRECISION)
            dp = drop(dp, dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False), dropout)
            # dS = P · (dP - delta), and back to what the modifier returned
            ds = pull_back(
                p * (dp - delta), inputs, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, score_args,
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
            total += tl.where(kept & q_mask[:, None], ds, 0.0)
    STORE(grad_ptr, total, program, own, q_len, kv_len, store_args, TILE_Q)


class Plan(NamedTuple):
    """How the sum of one parameter is cut into programs: see the table at the head of this file."""

    walk: Any
    store: Any
    store_args: tuple[Any, ...]
    own: tuple[int, int, int, int]
    steps: int
    sums: tuple[int, ...]  # the shape of what the programs write


def plan(parameter: Parameter, tensor: torch.Tensor, shape: Shape, pairs: tuple[int, int, int, int]) -> Plan:
    """The walk that fits a parameter. pairs: batches, heads, q_tiles and kv_tiles."""
    batches, heads, q_tiles, kv_tiles = pairs
    if parameter.buckets is not None:
        buckets, diagonals = tensor.shape[1], q_tiles + kv_tiles - 1
        args = (parameter.buckets, buckets, parameter.buckets.shape[0] // 2, parameter.shift)
        own, steps = (1, heads, 1, diagonals), batches * q_tiles
        return Plan(walk_diagonal, store_bucket_sums, args, own, steps, (heads, diagonals, buckets))
    of_batch, of_heads, of_rows, of_keys = parameter.sizes
    if of_rows > 1 and of_keys > 1:
        own, steps = (of_batch, of_heads, q_tiles, kv_tiles), batches // of_batch * (heads // of_heads)
        return Plan(walk_pairs, store_pairs, (), own, steps, parameter.sizes)
    if of_keys == 1:
        own = (batches, heads, q_tiles, 1)
        return Plan(walk_keys, store_row_sums, (), own, kv_tiles, (batches, heads, shape.q_len, 1))
    own = (batches, heads, 1, kv_tiles)
    return Plan(walk_rows, store_key_sums, (), own, q_tiles, (batches, heads, 1, shape.kv_len))


def parameter_gradient(
    backward: BackwardCall, modifier: int, parameter: Parameter, tensor: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """The gradient of `tensor`, in its shape and dtype; `modifier` is the place in the chain of the one that
    reads it. The tile is square, of the rows that backward.ranges was made for."""
    shape = backward.call.shape
    if tensor.numel() == 0 or 0 in shape.scores:
        return torch.zeros_like(tensor)
    tiles = ceil_div(shape.q_len, tile.tile_q), ceil_div(shape.kv_len, tile.tile_kv)
    pairs = (shape.batch, shape.q_heads, *tiles)
    walk, store, store_args, own, steps, sums = plan(parameter, tensor, shape, pairs)
    # Pairs are written as they are; sums are added up once more, and rounded after that.
    dtype = tensor.dtype if store is store_pairs else torch.float32
    grad = torch.empty(sums, dtype=dtype, device=tensor.device)
    arguments = backward_arguments(backward, tile) | dict(
        ranges_ptr=backward.ranges,
        grad_ptr=grad,
        steps=steps,
        pairs=pairs,
        own=own,
        store_args=store_args,
        MODIFIER=modifier,
        DERIVATIVE=parameter.derivative,
        WALK=walk,
        STORE=store,
    )
    with on_device_of(grad):
        parameter_kernel[(math.prod(own),)](**arguments)
    total = grad.sum(1) if parameter.buckets is not None else grad.sum_to_size(parameter.sizes)
    return total.to(tensor.dtype).reshape(tensor.shape)
