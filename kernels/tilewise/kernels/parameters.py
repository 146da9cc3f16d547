"""Gradients of what scores are made of: bias, slopes, tables, scales.

A pair's score depends on one element of such a parameter, so the element's gradient is a sum over its pairs:

    dparameter[e] = Σ_{pairs that read e} dS · ∂score/∂e

One kernel takes this sum for one parameter. A program owns some elements and walks, step by step, the tiles
of pairs that read them; it recomputes S and dS there as the backward does, and adds the products pair by
pair:

    which pairs read one element      a program owns     its steps                  what it writes
    one pair of each batch or head    a tile of pairs    the batches and heads      the tile
    all keys of a row                 a tile of rows     the tiles of keys          a sum a row
    all rows of a key                 a tile of keys     the tiles of rows          a sum a key
    all pairs of a head               a tile of rows     the tiles of keys          one sum
    all pairs at one distance         a tile of rows     the tiles of keys          a sum a bucket

Sums that remain (over the tiles of a head, say) are PyTorch's, or `sequence_sums_kernel`'s where only the
device knows which tiles are a sequence's. No atomics: the same inputs give the same bits. Beyond the gradient
itself, memory is linear in length.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile, rows_of, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.intervals import intersect_intervals, kept_pairs, visits_and_full
from ..parts.numerics import matmul, round_to
from ..parts.scores.score import Parameter, apply_scores, pull_back
from ..parts.sequences import first_tile, row_shift, sequence_at, tile_of_rows, tiles_of
from ..parts.shape import Shape, ceil_div, next_power_of_two
from ..parts.softmax import softmax_probabilities
from .backward import backward_arguments
from .call import on_device_of, sizes_of, tile_count
from .prepare import BackwardCall
from .tile import Tile

# ---- Walks: which pairs a program visits. `begin` says where it begins, (batch, head, q_tile, kv_tile), how
# many steps it takes, and the number of its sum among those of its head; `at` where it is after some steps.
# own: the sizes of what programs own, (batches or 1, heads or 1, tiles of rows or 1, tiles of keys or 1).
# Tiles of rows are numbered inside a sequence where a sum is kept for each position, and as sequences.py
# numbers all tiles where not.


@triton.jit
def begin_pairs(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """Steps: the batches and heads that share an element; pairs: (batches, heads) of all pairs."""
    kv_tile, q_tile = program % own[3], program // own[3] % own[2]
    head, batch = program // own[3] // own[2] % own[1], program // own[3] // own[2] // own[1]
    return (batch, head, q_tile, kv_tile), (pairs[0] // own[0]) * (pairs[1] // own[1]), program


@triton.jit
def at_pairs(begin, step, own, pairs):
    steps_of_heads = pairs[1] // own[1]
    return begin[0] + step // steps_of_heads, begin[1] + step % steps_of_heads, begin[2], begin[3]


@triton.jit
def begin_row(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of rows at its place inside a sequence."""
    q_tile, head, batch = program % own[2], program // own[2] % own[1], program // own[2] // own[1]
    _q_place, _kv_place, _q_len, kv_len = sequence_at(batch, sizes, layout)
    return (batch, head, q_tile, q_tile * 0), tl.cdiv(kv_len, TILE), program


@triton.jit
def begin_tile(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of rows by its number."""
    head = program // own[2] % own[1]
    block = program // own[2] // own[1]
    batch, q_tile, where = tile_of_rows(program % own[2], block, sizes, layout, 1, TILE)
    return (batch, head, q_tile, q_tile * 0), tl.cdiv(where[3], TILE), program


@triton.jit
def at_key(begin, step, own, pairs):
    return begin[0], begin[1], begin[2], step


@triton.jit
def begin_key(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of keys at its place inside a sequence."""
    kv_tile, head, batch = program % own[3], program // own[3] % own[1], program // own[3] // own[1]
    _q_place, _kv_place, q_len, _kv_len = sequence_at(batch, sizes, layout)
    return (batch, head, kv_tile * 0, kv_tile), tl.cdiv(q_len, TILE), program


@triton.jit
def at_row(begin, step, own, pairs):
    return begin[0], begin[1], step, begin[3]


# ---- Sums: what is kept of each tile of products, and what of that is written.
# sizes: of the gradient along queries and keys.


@triton.jit
def start_pairs(TILE: tl.constexpr, BUCKETS: tl.constexpr):
    return tl.zeros([TILE, TILE], tl.float32)


@triton.jit
def add_pairs(total, ds, batch, row, kv_row, sum_args, BUCKETS: tl.constexpr):
    return total + ds


@triton.jit
def start_buckets(TILE: tl.constexpr, BUCKETS: tl.constexpr):
    return tl.zeros([BUCKETS], tl.float32)


@triton.jit
def add_buckets(total, ds, batch, row, kv_row, sum_args, BUCKETS: tl.constexpr):
    """A tile far from the diagonal lies in one bucket; one near it takes a sum for each that it reaches."""
    buckets_ptr, max_distance, shift_args = sum_args
    distance = kv_row[None, :] - row[:, None] - row_shift(batch, shift_args)
    distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
    bucket = tl.load(buckets_ptr + max_distance + distance)  # [TILE, TILE]
    for i in range(tl.min(bucket), tl.max(bucket) + 1):
        in_bucket = tl.where(bucket == i, ds, 0.0)
        total += tl.where(tl.arange(0, BUCKETS) == i, tl.sum(tl.sum(in_bucket, 1), 0), 0.0)
    return total


@triton.jit
def store_pairs(grad_ptr, total, number, own, sizes, TILE: tl.constexpr):
    kv_tile, q_tile = number % own[3], number // own[3] % own[2]
    row = q_tile * TILE + tl.arange(0, TILE)
    column = kv_tile * TILE + tl.arange(0, TILE)
    ptr = grad_ptr + (number // own[3] // own[2]).to(tl.int64) * sizes[0] * sizes[1]
    ptrs = ptr + row.to(tl.int64)[:, None] * sizes[1] + column[None, :]
    inside = (row < sizes[0])[:, None] & (column < sizes[1])[None, :]
    tl.store(ptrs, round_to(total, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_row_sums(grad_ptr, total, number, own, sizes, TILE: tl.constexpr):
    row = number % own[2] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (number // own[2]).to(tl.int64) * sizes[0] + row
    tl.store(ptrs, tl.sum(total, 1), mask=row < sizes[0])


@triton.jit
def store_key_sums(grad_ptr, total, number, own, sizes, TILE: tl.constexpr):
    column = number % own[3] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (number // own[3]).to(tl.int64) * sizes[1] + column
    tl.store(ptrs, tl.sum(total, 0), mask=column < sizes[1])


@triton.jit
def store_sum(grad_ptr, total, number, own, sizes, TILE: tl.constexpr):
    tl.store(grad_ptr + number, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def store_bucket_sums(grad_ptr, total, number, own, sizes, TILE: tl.constexpr):
    """sizes: (buckets, 1)."""
    bucket = tl.arange(0, total.shape[0])
    tl.store(grad_ptr + number.to(tl.int64) * sizes[0] + bucket, total, mask=bucket < sizes[0])


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
    begin, steps, number = BEGIN(tl.program_id(0), own, pairs, sizes, layout, TILE_Q)
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
            q = load_tile(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
            do = load_tile(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
            k = load_tile(k_head, kv_idx, kv_mask, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_tile(v_head, kv_idx, kv_mask, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
            rows_ptr = rows_of(q_place, head, q_heads, q_rows)
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
            ds = tl.where(kept & q_mask[:, None], ds, 0.0)
            total = ADD(total, ds, batch, row, kv_row, sum_args, BUCKETS)
    STORE(grad_ptr, total, number, own, grad_sizes, TILE_Q)


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


class Walk(NamedTuple):
    """Which pairs a program visits: see the table at the head of this file."""

    begin: Any
    at: Any


class Sum(NamedTuple):
    """What a program keeps of them, and writes."""

    start: Any
    add: Any
    store: Any


PAIRS, ROW, TILE = Walk(begin_pairs, at_pairs), Walk(begin_row, at_key), Walk(begin_tile, at_key)
KEY = Walk(begin_key, at_row)
EACH_PAIR = Sum(start_pairs, add_pairs, store_pairs)
EACH_ROW, EACH_KEY = EACH_PAIR._replace(store=store_row_sums), EACH_PAIR._replace(store=store_key_sums)
ONE = EACH_PAIR._replace(store=store_sum)
EACH_BUCKET = Sum(start_buckets, add_buckets, store_bucket_sums)


class Plan(NamedTuple):
    """How the sum of one parameter is cut into programs."""

    walk: Walk
    sum: Sum
    own: tuple[int, int, int, int]
    sums: tuple[int, ...]  # the shape of what the programs write
    sizes: tuple[int, int] = (1, 1)  # of that, along queries and keys; or how many buckets, and 1


def plan(parameter: Parameter, tensor: torch.Tensor, shape: Shape, tile: int) -> Plan:
    """The walk and the sum that fit a parameter, with square tiles of `tile` rows."""
    of_batch, of_heads, of_rows, of_keys = parameter.sizes or (1, 1, 1, 1)
    q_tiles, kv_tiles = ceil_div(of_rows, tile), ceil_div(of_keys, tile)
    batch, heads = shape.batch, shape.q_heads
    if of_rows > 1 and of_keys > 1:
        own, sizes = (of_batch, of_heads, q_tiles, kv_tiles), (of_rows, of_keys)
        return Plan(PAIRS, EACH_PAIR, own, parameter.sizes, sizes)
    if of_rows > 1:
        return Plan(ROW, EACH_ROW, (batch, heads, q_tiles, 1), (batch, heads, of_rows, 1), (of_rows, 1))
    if of_keys > 1:
        return Plan(KEY, EACH_KEY, (batch, heads, 1, kv_tiles), (batch, heads, 1, of_keys), (1, of_keys))
    tiles = (shape.blocks, heads, tile_count(shape, shape.q_len, tile))
    if parameter.buckets is not None:
        return Plan(TILE, EACH_BUCKET, (*tiles, 1), (*tiles, tensor.shape[1]), (tensor.shape[1], 1))
    return Plan(TILE, ONE, (*tiles, 1), (*tiles, 1))


def parameter_gradient(
    backward: BackwardCall, modifier: int, parameter: Parameter, tensor: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """The gradient of `tensor`, in its shape and dtype; `modifier` is the place in the chain of the one that
    reads it. The tile is square, of the rows that backward.ranges was made for."""
    shape = backward.call.shape
    if tensor.numel() == 0 or 0 in shape.scores:
        return torch.zeros_like(tensor)
    walk, kept, own, sums, sizes = plan(parameter, tensor, shape, tile.tile_q)
    # Pairs are written as they are; sums are added up once more, and rounded after that.
    dtype = tensor.dtype if kept is EACH_PAIR else torch.float32
    grad = torch.empty(sums, dtype=dtype, device=tensor.device)
    buckets = parameter.buckets
    arguments = backward_arguments(backward, tile) | dict(
        ranges_ptr=backward.ranges,
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
    with on_device_of(grad):
        parameter_kernel[(math.prod(own),)](**arguments)
    if buckets is not None:
        total = grad.sum((0, 2))
    elif kept is ONE and shape.packing is not None and parameter.sizes[0] > 1:
        total = sequence_sums(grad, shape, tile.tile_q).sum_to_size(parameter.sizes)
    else:
        total = grad.sum_to_size(parameter.sizes)
    return total.to(tensor.dtype).reshape(tensor.shape)


def sequence_sums(sums: torch.Tensor, shape: Shape, tile: int) -> torch.Tensor:
    """From a sum a tile [1, q_heads, tiles, 1] one a packed sequence [batch, q_heads, 1, 1]."""
    grad = sums.new_empty(shape.batch, shape.q_heads, 1, 1)
    with on_device_of(grad):
        sequence_sums_kernel[(grad.numel(),)](
            sums, grad, shape.q_heads, sizes_of(shape), shape.layout, TILE=tile
        )
    return grad
