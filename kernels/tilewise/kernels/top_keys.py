"""The keys with the largest weights of each row, and these weights.

A program owns a tile of rows and walks the keys that its mask allows, as the forward does: walk.py. Of each
row it keeps the TOP_K largest scores seen so far and their keys. From each tile of scores it takes the
largest one of each row as long as one of them is larger than the smallest that is kept, which it then
replaces: TOP_K times at most, and after a few tiles mostly not at all. Equal scores: the smaller key comes
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, rows_of, tensors_of
from ..parts.intervals import intersect_intervals, kept_pairs, kv_range
from ..parts.pieces import load_pieces, product
from ..parts.scores.score import apply_scores
from ..parts.shape import next_power_of_two
from ..parts.softmax import softmax_probabilities
from ..parts.statistics import NO_KEY
from .call import Call, programs, shared_arguments
from .launch import launch
from .tile import Tile
from .walk import load_keys, own_rows, step_keys, steps_of, walked


@triton.jit
def first_largest(s, keys):
    """The largest score of each row, and its key: the smallest, of several. Without a score -inf and
    NO_KEY."""
    score = tl.max(s, 1)  # [TILE_Q]
    is_largest = (s == score[:, None]) & (s > float("-inf"))
    return score, tl.min(tl.where(is_largest, keys, NO_KEY), 1)


@triton.jit
def keep_largest(kept_s, kept_keys, s, kv_idx):
    """The largest of those that are kept [TILE_Q, SLOTS] and of the scores s [TILE_Q, TILE_KV] of other
    keys. A slot that is no row's to use holds inf."""
    slot = tl.arange(0, kept_s.shape[1])[None, :]
    goes_on = s.shape[0] > 0
    while goes_on:
        score, key = first_largest(s, kv_idx[None, :])
        least = tl.min(kept_s, 1)  # [TILE_Q]
        last = tl.max(tl.where(kept_s == least[:, None], kept_keys, -1), 1)  # the largest key of several
        is_larger = (score > least) | ((score == least) & (key < last))
        is_last = (kept_s == least[:, None]) & (kept_keys == last[:, None])
        place = tl.min(tl.where(is_last, slot, kept_s.shape[1]), 1)  # empty slots are alike
        is_replaced = (slot == place[:, None]) & is_larger[:, None]
        kept_s = tl.where(is_replaced, score[:, None], kept_s)
        kept_keys = tl.where(is_replaced, key[:, None], kept_keys)
        s = tl.where(kv_idx[None, :] == key[:, None], float("-inf"), s)
        goes_on = tl.max(is_larger.to(tl.int32)) != 0
    return kept_s, kept_keys


@triton.jit
def top_keys_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    max_ptr,  # a number a row, contiguous: the forward's row statistics
    sum_ptr,
    keys_ptr,  # TOP_K numbers a row, contiguous: int64, and fp32
    weights_ptr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # as many, up to a power of two
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, _dropout, mask_args, score_args = call
    queries, keys, _values = tensors_of(pointers, strides)
    q_heads, group, q_rows, _kv_rows = sizes
    batch, head, q_idx, row, where, _tile, _q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, kv_place, q_len, kv_len = where
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    span = kv_range(lo, hi, whole, kv_len, TILE_KV)

    q = load_pieces(
        head_of(queries, q_place, head), q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE
    )  # [TILE_Q, HEAD_TILE]
    k_walk = walked(keys, (), kv_place, head // group, layout)
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([TILE_Q, SLOTS], tl.int32)
    kept_s = tl.where(slot < TOP_K, float("-inf"), float("inf"))  # [TILE_Q, SLOTS]
    kept_keys = tl.full([TILE_Q, SLOTS], NO_KEY, tl.int32)

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            _kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(
                k_walk, _kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE
            )  # [TILE_KV, HEAD_TILE]
            # S = scores(Q Kᵀ)
            s = product(q, k, PRECISION)  # [TILE_Q, TILE_KV]
            s, _ = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                    mask_args,
                )  # fmt: skip
                s = tl.where(kept, s, float("-inf"))
            kept_s, kept_keys = keep_largest(kept_s, kept_keys, s, kv_idx)

    valid = q_idx < q_len
    rows = rows_of(q_place, head, q_heads, q_rows) + q_idx
    row_max = tl.load(max_ptr + rows, mask=valid, other=0.0)  # [TILE_Q]
    sum_log2 = tl.load(sum_ptr + rows, mask=valid, other=0.0)
    kept_s = tl.where(slot < TOP_K, kept_s, float("-inf"))
    for i in range(TOP_K):
        score, key = first_largest(kept_s, kept_keys)
        kept_s = tl.where(kept_keys == key[:, None], float("-inf"), kept_s)
        is_key = score > float("-inf")
        p = tl.where(is_key, softmax_probabilities(score, row_max, sum_log2, unit), 0.0)
        key = tl.where(is_key, key.to(tl.int64) + kv_place[1], -1)
        tl.store(keys_ptr + rows.to(tl.int64) * TOP_K + i, key, mask=valid)
        tl.store(weights_ptr + rows.to(tl.int64) * TOP_K + i, p, mask=valid)


def launch_top_keys(
    call: Call, statistics: torch.Tensor, top_keys: torch.Tensor, top_weights: torch.Tensor, tile: Tile
) -> None:
    """Fill top_keys int64 and top_weights fp32, [blocks, q_heads, q rows, top_k] contiguous. statistics: the
    forward's [2, blocks, q_heads, q rows]."""
    shape, top_k = call.shape, top_keys.shape[3]
    row_max, sum_log2 = statistics.unbind(0)
    arguments = shared_arguments(call) | dict(
        max_ptr=row_max,
        sum_ptr=sum_log2,
        keys_ptr=top_keys,
        weights_ptr=top_weights,
        TOP_K=top_k,
        SLOTS=next_power_of_two(top_k),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    if grid:
        launch(top_keys_kernel, (grid,), top_keys, **arguments)
