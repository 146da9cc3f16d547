"""How is the sum of one parameter's gradient cut into programs? Walks over pairs, and what is kept of them.

A program owns some elements of the parameter and walks, step by step, the tiles of pairs that read them:

    which pairs read one element      a program owns     its steps                  what it writes
    one pair of each batch or head    a tile of pairs    the batches and heads      the tile
    all keys of a row                 a tile of rows     the tiles of keys          a sum a row
    all rows of a key                 a tile of keys     the tiles of rows          a sum a key
    all pairs of a head               a tile of rows     the tiles of keys          one sum
    all pairs at one distance         a tile of rows     the tiles of keys          a sum a bucket
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..parts.numerics import round_to
from ..parts.scores.score import Parameter
from ..parts.sequences import row_shift, sequence_at, tile_of_rows
from ..parts.shape import Shape, ceil_div
from .call import tile_count

# ---- Walks: which pairs a program visits. `begin` says where it begins, (batch, head, q_tile, kv_tile), and
# how many steps it takes; `at` where it is after some steps.
# own: the sizes of what programs own, (batches or 1, heads or 1, tiles of rows or 1, tiles of keys or 1).
# Tiles of rows are numbered inside a sequence where a sum is kept for each position, and as sequences.py
# numbers all tiles where not.


@triton.jit
def begin_pairs(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """Steps: the batches and heads that share an element; pairs: (batches, heads) of all pairs."""
    kv_tile, q_tile = program % own[3], program // own[3] % own[2]
    head, batch = program // own[3] // own[2] % own[1], program // own[3] // own[2] // own[1]
    return (batch, head, q_tile, kv_tile), (pairs[0] // own[0]) * (pairs[1] // own[1])


@triton.jit
def at_pairs(begin, step, own, pairs):
    steps_of_heads = pairs[1] // own[1]
    return begin[0] + step // steps_of_heads, begin[1] + step % steps_of_heads, begin[2], begin[3]


@triton.jit
def begin_row(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of rows at its place inside a sequence."""
    q_tile, head, batch = program % own[2], program // own[2] % own[1], program // own[2] // own[1]
    _q_place, _kv_place, _q_len, kv_len = sequence_at(batch, sizes, layout)
    return (batch, head, q_tile, q_tile * 0), tl.cdiv(kv_len, TILE)


@triton.jit
def begin_tile(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of rows by its number."""
    head = program // own[2] % own[1]
    block = program // own[2] // own[1]
    batch, q_tile, where = tile_of_rows(program % own[2], block, sizes, layout, 1, TILE)
    return (batch, head, q_tile, q_tile * 0), tl.cdiv(where[3], TILE)


@triton.jit
def at_key(begin, step, own, pairs):
    return begin[0], begin[1], begin[2], step


@triton.jit
def begin_key(program, own, pairs, sizes, layout, TILE: tl.constexpr):
    """A tile of keys at its place inside a sequence."""
    kv_tile, head, batch = program % own[3], program // own[3] % own[1], program // own[3] // own[1]
    _q_place, _kv_place, q_len, _kv_len = sequence_at(batch, sizes, layout)
    return (batch, head, kv_tile * 0, kv_tile), tl.cdiv(q_len, TILE)


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
def store_pairs(grad_ptr, total, program, own, sizes, TILE: tl.constexpr):
    kv_tile, q_tile = program % own[3], program // own[3] % own[2]
    row = q_tile * TILE + tl.arange(0, TILE)
    column = kv_tile * TILE + tl.arange(0, TILE)
    ptr = grad_ptr + (program // own[3] // own[2]).to(tl.int64) * sizes[0] * sizes[1]
    ptrs = ptr + row.to(tl.int64)[:, None] * sizes[1] + column[None, :]
    inside = (row < sizes[0])[:, None] & (column < sizes[1])[None, :]
    tl.store(ptrs, round_to(total, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_row_sums(grad_ptr, total, program, own, sizes, TILE: tl.constexpr):
    row = program % own[2] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (program // own[2]).to(tl.int64) * sizes[0] + row
    tl.store(ptrs, tl.sum(total, 1), mask=row < sizes[0])


@triton.jit
def store_key_sums(grad_ptr, total, program, own, sizes, TILE: tl.constexpr):
    column = program % own[3] * TILE + tl.arange(0, TILE)
    ptrs = grad_ptr + (program // own[3]).to(tl.int64) * sizes[1] + column
    tl.store(ptrs, tl.sum(total, 0), mask=column < sizes[1])


@triton.jit
def store_sum(grad_ptr, total, program, own, sizes, TILE: tl.constexpr):
    tl.store(grad_ptr + program, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def store_bucket_sums(grad_ptr, total, program, own, sizes, TILE: tl.constexpr):
    """sizes: (buckets, 1)."""
    bucket = tl.arange(0, total.shape[0])
    tl.store(grad_ptr + program.to(tl.int64) * sizes[0] + bucket, total, mask=bucket < sizes[0])


# ---- Plans


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
