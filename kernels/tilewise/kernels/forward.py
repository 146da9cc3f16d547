"""The forward pass: O = softmax(scores(Q Kᵀ)) V, a tile at a time; the score matrix never exists in memory.

    S   = scores(Q Kᵀ)              [TILE_Q, TILE_KV]    scale, similarity and modifiers: parts/scores/
    S   = -inf where masked                              only in tiles that a mask cuts:  parts/masks/
    P   = exp(S - row_max)                               the softmax state:               parts/softmax.py
    O   = (Σ P V) / row_sum         [TILE_Q, value_dim]
    LSE = row_max + ln row_sum      [TILE_Q]

Each program owns one tile of query rows of one head and walks the key tiles that its mask allows: walk.py.

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, rows_of, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.fp8 import shrunk, stretched
from ..parts.intervals import intersect_intervals, kept_pairs, kv_range
from ..parts.numerics import INTERPRETED, round_to, widen
from ..parts.pieces import (
    are_wide,
    load_pieces,
    product,
    products,
    rounded,
    scaled,
    store_pieces,
    where_rows,
    zero_pieces,
)
from ..parts.scores.score import apply_scores
from ..parts.sequences import is_of_a_sequence
from ..parts.shape import Shape
from ..parts.softmax import softmax_end, softmax_join, softmax_start, softmax_step
from ..parts.statistics import statistics_join, statistics_start, statistics_step, store_statistics
from .call import NO_STATS, Call, RowStats, Split, programs, shared_arguments
from .copies import copies_of
from .coverage import Lists, list_keys
from .launch import launch
from .tile import Tile
from .walk import (
    in_pieces,
    keys_of_split,
    listed_keys,
    load_keys,
    once_more,
    own_group,
    step_keys,
    steps_of,
    walked,
)


@triton.jit
def forward_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,  # a function or None for each mask
    KEEPS: tl.constexpr,  # a function or None for each mask
    SCORES: tl.constexpr,  # a function for each modifier
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # the pieces that hold HEAD_DIM columns: pieces.py; what is beyond reads as 0
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    out,  # (pointer, strides)
    lse_ptr,  # a number a row, contiguous, or None, as for the next two
    max_ptr,
    sum_ptr,
    sink_ptr,  # [q_heads], or None
    sink_stride,
    k_copy,  # what the copy engine knows of K and V, a descriptor for each piece: copies.py; or None
    k_copy_2,
    v_copy,
    v_copy_2,
    split,  # (), or keys of a split and strides of `out` and `lse_ptr` from one to the next
    stats,  # what else is known of a row, and asked for: statistics.py
    lists,  # of the tiles that each program visits: coverage.py; or ()
    v_share,  # what V's numbers stand for, where they are fp8: fp8.py; or None, as for the next two
    v_largest,
    v_peak,
    IS_GROUPED: tl.constexpr,  # a tile of rows holds those of all heads of a group
    HAS_GAPS: tl.constexpr,  # some key inside a row tile's range may be seen by none of its rows
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    q_heads, group, q_rows, _kv_rows = sizes
    batch, head, head_column, kv_head, q_idx, row, where, tile, q_tile = own_group(
        sizes, layout, TILE_Q, IS_GROUPED
    )
    q_place, kv_place, q_len, kv_len = where
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    if len(lists) > 0:
        span = listed_keys(lo, hi, kv_len, lists, split)
    else:
        lo, hi, whole = keys_of_split(lo, hi, whole, kv_len, split, TILE_KV)
        span = kv_range(lo, hi, whole, kv_len, TILE_KV)

    q_head = head_of(queries, q_place, head_column)
    q = load_pieces(q_head, q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    k_walk = walked(keys, in_pieces(k_copy, k_copy_2), kv_place, kv_head, layout)
    v_walk = walked(values, in_pieces(v_copy, v_copy_2), kv_place, kv_head, layout)
    row_max, row_sum = softmax_start(TILE_Q)
    known = statistics_start(stats, TILE_Q)
    o = zero_pieces(TILE_Q, VALUE_TILE)  # [TILE_Q, VALUE_TILE]

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(k_walk, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_keys(
                v_walk, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE
            )  # [TILE_KV, VALUE_TILE]

            # S = scores(Q Kᵀ)
            s = product(q, k, PRECISION)  # [TILE_Q, TILE_KV]
            s, _ = apply_scores(s, batch, head_column, row[:, None], kv_row[None, :], SCORES, score_args)
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head_column,
                    KEEPS, mask_args,
                )  # fmt: skip
                s = tl.where(kept, s, float("-inf"))
                if HAS_GAPS:  # 0 · NaN is NaN: the value of a key that no row sees must not enter the sum
                    seen = tl.max(kept.to(tl.int32), 0) != 0
                    v = where_rows(seen, v)

            before = row_max, row_sum
            row_max, row_sum, p, rescale = softmax_step(s, row_max, row_sum, unit)
            known = statistics_step(known, stats, s, kv_idx, before, row_max, unit)
            p = drop(p, dropout_keep(batch, head_column, q_idx, kv_start, dropout, TILE_KV, False), dropout)
            p = stretched(p, v_share, v_largest, v_peak, batch, kv_head, kv_row, sizes, layout)
            p = round_to(p, v[0].dtype)
            # O = O · rescale + P V
            o = products(p, v, scaled(o, rescale[:, None]), PRECISION)  # [TILE_Q, VALUE_TILE]

    max_score = row_max  # of keys alone
    if sink_ptr is not None:
        # A sink is the state of one more key of each sequence, whose value is 0.
        tl.static_assert(unit is None, "a sink's logit is in natural units")
        sink = widen(tl.load(sink_ptr + head.to(tl.int64) * sink_stride))
        members = group if IS_GROUPED else 1
        has_sink = is_of_a_sequence(tile, sizes, layout, members, TILE_Q) & (tl.program_id(1) == 0)
        sink_max = tl.where(has_sink, tl.zeros_like(row_max) + sink, float("-inf"))
        sink_sum = tl.full([TILE_Q], 1.0, tl.float32)
        before = row_max, row_sum
        row_max, row_sum, rescale, _ = softmax_join(row_max, row_sum, sink_max, sink_sum)
        known = statistics_join(known, stats, before, (sink_max, sink_sum), row_max)
        o = scaled(o, rescale[:, None])
    natural_max = row_max
    if unit is not None:
        natural_max = row_max * unit
    factor, lse, sum_log2 = softmax_end(natural_max, row_sum)
    factor = shrunk(factor, v_largest, v_peak, batch, kv_head, sizes, layout)
    o = scaled(o, factor[:, None])

    if are_wide(VALUE_TILE) and not IS_GROUPED:
        q_idx = once_more(q_tile, kv_len, TILE_Q)
    valid = q_idx < q_len
    rows = rows_of(q_place, head, q_heads, q_rows) + q_idx
    out_ptr, out_strides = out
    if len(split) > 0:
        out_ptr += tl.program_id(1).to(tl.int64) * split[1]
        lse_ptr += tl.program_id(1).to(tl.int64) * split[2]
        if max_ptr is not None:
            max_ptr += tl.program_id(1).to(tl.int64) * split[2]
            sum_ptr += tl.program_id(1).to(tl.int64) * split[2]
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, lse, mask=valid)
    if max_ptr is not None:
        tl.store(max_ptr + rows, row_max, mask=valid)
        tl.store(sum_ptr + rows, sum_log2, mask=valid)
    store_statistics(stats, known, max_score, row_sum, unit, rows, valid, split)
    o = rounded(o, out_ptr.dtype.element_ty)
    o_head = head_of((out_ptr, out_strides), q_place, head_column)
    store_pieces(o_head, o, q_idx, valid, VALUE_DIM, VALUE_TILE)


# Triton 3.6.0 cannot translate for AMD a loop with tiles of a bias or a mask in flight beside fewer than 64
# rows: it leaves a conversion between two equal layouts in the code. 3.9.0 can.
TRANSLATES_ALL = [int(number) for number in re.findall(r"\d+", triton.__version__)[:2]] >= [3, 9]


def stages_in_flight(call: Call, tile: Tile) -> int:
    """The tile's stages, or one where Triton can translate no more."""
    loads_tiles = call.scores or any([mask.keep is not None for mask in call.masks])
    if TRANSLATES_ALL or INTERPRETED or not loads_tiles or tile.tile_q >= 64:
        return tile.num_stages
    is_amd = triton.runtime.driver.active.get_current_target().backend == "hip"
    return 1 if is_amd else tile.num_stages


def forward_launch(
    call: Call,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    statistics: torch.Tensor | None,
    tile: Tile,
    split: Split | None = None,
    stats: RowStats = NO_STATS,
    lists: Lists = (),
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The grid and the arguments with which `forward_kernel` answers `call`; with splits, out and lse have a
    first dimension for them."""
    row_max, row_sum = (None, None) if statistics is None else statistics.unbind(0)
    arguments = shared_arguments(call) | dict(
        out=(out, out.stride()[-4:]),
        lse_ptr=lse,
        max_ptr=row_max,
        sum_ptr=row_sum,
        sink_ptr=call.sink,
        **copies_of(call, tile),
        sink_stride=0 if call.sink is None else call.sink.stride(0),
        split=() if split is None or lse is None else (split.size, out.stride(0), lse.stride(0)),
        stats=stats.given(),
        lists=lists,
        v_share=call.v_scales.share,
        v_largest=call.v_scales.largest,
        v_peak=call.v_scales.peak,
        IS_GROUPED=call.is_grouped,
        HAS_GAPS=call.has_gaps,
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=stages_in_flight(call, tile),
    )
    grid = rows_programs(call.shape, call.is_grouped, tile.tile_q)
    return (grid,) if split is None else (grid, split.programs), arguments


def rows_programs(shape: Shape, is_grouped: bool, tile_q: int) -> int:
    """How many tiles of rows there are; is_grouped: one holds those of all heads of a group."""
    if is_grouped:
        return programs(shape, shape.q_len * shape.group, tile_q, shape.kv_heads)
    return programs(shape, shape.q_len, tile_q, shape.q_heads)


def launch_forward(
    call: Call,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    statistics: torch.Tensor | None,
    tile: Tile,
    split: Split | None = None,
    stats: RowStats = NO_STATS,
) -> None:
    """Fill out [batch, q_heads, q_len, value_dim], lse [batch, q_heads, q_len] and, for the backward,
    statistics [2, batch, q_heads, q_len]: `softmax.softmax_probabilities`; with packed sequences 1 for batch
    and all tokens for q_len. lse, statistics and what stats ask for are fp32 and contiguous. With splits,
    out, lse and stats have a first dimension for them, and each is the result of its own keys."""
    lists: Lists = ()
    if split is None or split.size == 0:  # in splits of a given size no tile goes first: `keys_of_split`
        count = rows_programs(call.shape, call.is_grouped, tile.tile_q)
        lists = list_keys(call, tile, count, call.is_grouped)
    grid, arguments = forward_launch(call, out, lse, statistics, tile, split, stats, lists)
    if grid[0]:
        launch(forward_kernel, grid, out, **arguments)
