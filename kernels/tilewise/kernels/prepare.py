"""What does the backward know before it walks? delta of each row, and the keys that each tile of rows visits.

    delta = Σ_d dO · O - dLSE     [rows]: Σ_j P dP of a row, without walking its keys

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2, line 4; LSE's gradient joins delta.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile
from ..parts.intervals import intersect_intervals, store_range
from ..parts.numerics import widen
from ..parts.shape import ceil_div
from .call import Call, function_arguments, on_device_of, power_of_two_tile, sizes_of


@triton.jit
def prepare_kernel(
    out,  # (pointer, strides), as for dout
    dout,
    max_ptr,  # [batch, q_heads, q_len] contiguous, as for the next two: the forward's row statistics
    dlse_ptr,  # or None
    delta_ptr,
    ranges_ptr,  # [batch, q_heads, q_tiles, 4] int32: intervals.py
    sizes,
    mask_args,
    INTERVALS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    q_heads, _group, q_len, kv_len = sizes
    q_tiles = tl.cdiv(q_len, TILE_Q)
    program = tl.program_id(0)
    q_tile = program % q_tiles
    head = (program // q_tiles) % q_heads
    batch = program // q_tiles // q_heads
    q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    valid = q_idx < q_len

    # delta = Σ_d dO · O - dLSE
    o_head, do_head = head_of(out, batch, head), head_of(dout, batch, head)
    o = load_tile(o_head, q_idx, valid, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
    do = load_tile(do_head, q_idx, valid, VALUE_DIM, VALUE_TILE)
    # An output of exactly 0 adds nothing, also where a row that sees no key is handed NaN.
    o, do = widen(o), widen(do)
    delta = tl.sum(tl.where(o == 0.0, 0.0, o * do), 1)  # [TILE_Q]
    row = (batch.to(tl.int64) * q_heads + head) * q_len + q_idx
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=valid, other=0.0)
    # A row without key and sink depends on nothing, whatever gradient it is handed.
    row_max = tl.load(max_ptr + row, mask=valid, other=0.0)
    tl.store(delta_ptr + row, tl.where(row_max == float("-inf"), 0.0, delta), mask=valid)

    lo, hi, whole = intersect_intervals(
        tl.minimum(q_idx, q_len - 1), kv_len, batch, head, INTERVALS, mask_args
    )
    range_ptr = ranges_ptr + ((batch.to(tl.int64) * q_heads + head) * q_tiles + q_tile) * 4
    store_range(range_ptr, lo, hi, whole, kv_len, (q_tile + 1) * TILE_Q > q_len)


class BackwardCall(NamedTuple):
    """What the kernels of the backward have in common."""

    call: Call
    out: torch.Tensor  # of the forward
    row_max: torch.Tensor  # [batch, q_heads, q_len] fp32 contiguous, as for sum_log2, dlse and delta
    sum_log2: torch.Tensor
    do: torch.Tensor  # [batch, q_heads, q_len, value_dim], any strides
    dlse: torch.Tensor | None
    delta: torch.Tensor
    ranges: torch.Tensor  # [batch, q_heads, q_tiles, 4] int32
    tile_q: int  # the rows that one entry of ranges stands for


def prepare(
    call: Call,
    out: torch.Tensor,
    statistics: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    tile_q: int,
) -> BackwardCall:
    """Compute delta and the ranges of keys that tiles of tile_q rows visit; statistics are the forward's."""
    batch, q_heads, q_len, _ = call.shape.scores
    row_max, sum_log2 = statistics.unbind(0)
    q_tiles = ceil_div(q_len, tile_q)
    delta = torch.empty_like(row_max)
    ranges = torch.empty(batch, q_heads, q_tiles, 4, dtype=torch.int32, device=out.device)
    backward = BackwardCall(call, out, row_max, sum_log2, do, dlse, delta, ranges, tile_q)
    grid, arguments = prepare_launch(backward)
    if grid[0]:
        with on_device_of(out):
            prepare_kernel[grid](**arguments)
    return backward


def prepare_launch(backward: BackwardCall) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments of `prepare_kernel`."""
    call = backward.call
    shape, functions = call.shape, function_arguments(call)
    arguments = dict(
        out=(backward.out, backward.out.stride()),
        dout=(backward.do, backward.do.stride()),
        max_ptr=backward.row_max,
        dlse_ptr=backward.dlse,
        delta_ptr=backward.delta,
        ranges_ptr=backward.ranges,
        sizes=sizes_of(shape),
        mask_args=functions["mask_args"],
        INTERVALS=functions["INTERVALS"],
        VALUE_DIM=shape.value_dim,
        VALUE_TILE=power_of_two_tile(shape.value_dim),
        TILE_Q=backward.tile_q,
        enable_fp_fusion=True,
    )
    return (backward.ranges.shape[2] * shape.q_heads * shape.batch,), arguments
