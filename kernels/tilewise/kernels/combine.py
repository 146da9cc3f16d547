"""Split keys: the results of each part of the keys, joined to that of all of them.

Where rows and heads are few, as in decoding, the keys of a row are split over programs. Each writes the o and
the LSE of its own keys, which is a state of the softmax again, (LSE, 1, o): softmax.py. Their merge, in the
order of the splits, is the result; a split without a key merges to nothing.

Method: Flash-Decoding (Dao, Haziza, Massa & Sizov 2023), FlashAttention-2 with the keys in parallel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.numerics import LOG2E, round_to
from ..parts.shape import ceil_div
from ..parts.softmax import softmax_finish, softmax_merge, softmax_start
from ..parts.statistics import moment_end, moment_join
from .call import NO_STATS, RowStats, power_of_two_tile
from .launch import launch

TILE_ROWS = 16


@triton.jit
def combine_kernel(
    parts_ptr,  # [splits, rows, value_dim] fp32 contiguous; rows: of all batches and heads
    parts_lse_ptr,  # [splits, rows]
    out,  # (pointer, strides of batch, head, row and dim)
    lse_ptr,  # [rows], or None
    entropy,  # (that of parts [splits, rows], that of all keys [rows]) or (), as for max_logit: statistics.py
    max_logit,
    sizes,  # (splits, rows, q_heads, q_len)
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    splits, rows, q_heads, q_len = sizes
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    column = tl.arange(0, VALUE_TILE)
    valid = row < rows
    inside = valid[:, None] & (column < VALUE_DIM)[None, :]
    row_max, row_sum = softmax_start(TILE)
    o = tl.zeros([TILE, VALUE_TILE], tl.float32)
    moment, largest = row_sum * 0.0, row_max
    part = row.to(tl.int64)
    for _ in range(splits):
        lse = tl.load(parts_lse_ptr + part, mask=valid, other=float("-inf"))
        part_o = tl.load(parts_ptr + part[:, None] * VALUE_DIM + column[None, :], mask=inside, other=0.0)
        part_sum = tl.where(lse == float("-inf"), 0.0, 1.0)
        before = row_max, row_sum
        row_max, row_sum, o = softmax_merge(row_max, row_sum, o, lse, part_sum, part_o)
        if len(entropy) > 0:  # H = -moment of weights whose sum is 1
            part_moment = tl.load(entropy[0] + part, mask=valid, other=0.0) * -LOG2E
            moment = moment_join(moment, before[0], before[1], part_moment, lse, part_sum, row_max)
        if len(max_logit) > 0:
            part_max = tl.load(max_logit[0] + part, mask=valid, other=float("-inf"))
            largest = tl.maximum(largest, part_max)
        part += rows
    if len(entropy) > 0:
        tl.store(entropy[1] + row, moment_end(moment, row_sum), mask=valid)
    if len(max_logit) > 0:
        tl.store(max_logit[1] + row, largest, mask=valid)
    o, lse, _ = softmax_finish(row_max, row_sum, o)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=valid)
    out_ptr, strides = out
    batch, head, q_idx = row // (q_heads * q_len), row // q_len % q_heads, row % q_len
    offsets = (
        batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + q_idx.to(tl.int64) * strides[2]
    )
    ptrs = out_ptr + offsets[:, None] + column.to(tl.int64)[None, :] * strides[3]
    tl.store(ptrs, round_to(o, out_ptr.dtype.element_ty), mask=inside)


def launch_combine(
    parts: torch.Tensor,
    parts_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    parts_stats: RowStats = NO_STATS,
    stats: RowStats = NO_STATS,
) -> None:
    """Fill out [blocks, q_heads, q_len, value_dim], lse [blocks, q_heads, q_len] and stats from those of each
    split, [splits, ...] fp32 contiguous."""
    splits, blocks, q_heads, q_len, value_dim = parts.shape
    rows = blocks * q_heads * q_len
    if rows:
        launch(
            combine_kernel,
            (ceil_div(rows, TILE_ROWS),),
            out,
            parts,
            parts_lse,
            (out, out.stride()),
            lse,
            both(parts_stats.entropy, stats.entropy),
            both(parts_stats.max_logit, stats.max_logit),
            (splits, rows, q_heads, q_len),
            VALUE_DIM=value_dim,
            VALUE_TILE=power_of_two_tile(value_dim),
            TILE=TILE_ROWS,
            enable_fp_fusion=True,
        )


def both(parts: torch.Tensor | None, whole: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if parts is None or whole is None else (parts, whole)
