"""What does the backward know before it walks? delta of each row, and the keys that each tile of rows visits.

    delta = Σ_d dO · O - dLSE     [rows]: Σ_j P dP of a row, without walking its keys

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2, line 4; LSE's gradient joins delta.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, rows_of
from ..parts.intervals import intersect_intervals, store_range
from ..parts.pieces import load_pieces, pieces_of, widened
from ..parts.sequences import tiles_of
from .call import Call, function_arguments, programs, sizes_of, tile_count
from .launch import launch
from .walk import own_rows


@triton.jit
def products_of_rows(o, do):
    """Σ_d dO · O of tiles in pieces, [TILE_Q] in fp32. An output of exactly 0 adds nothing, also where a row
    that sees no key is handed NaN."""
    o, do = widened(o), widened(do)
    total = tl.sum(tl.where(o[0] == 0.0, 0.0, o[0] * do[0]), 1)
    for i in tl.static_range(1, len(o)):
        total += tl.sum(tl.where(o[i] == 0.0, 0.0, o[i] * do[i]), 1)
    return total


@triton.jit
def prepare_kernel(
    out,  # (pointer, strides), as for dout
    dout,
    max_ptr,  # a number a row, contiguous, as for the next two: the forward's row statistics
    dlse_ptr,  # or None
    delta_ptr,
    ranges_ptr,  # [.., q_heads, tiles, 4] int32: intervals.py
    sizes,
    layout,
    mask_args,
    INTERVALS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    q_heads, _group, q_rows, _kv_rows = sizes
    batch, head, q_idx, row, where, tile, q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, _kv_place, q_len, kv_len = where
    valid = q_idx < q_len  # [TILE_Q]

    # delta = Σ_d dO · O - dLSE
    o_head, do_head = head_of(out, q_place, head), head_of(dout, q_place, head)
    o = load_pieces(o_head, q_idx, valid, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
    do = load_pieces(do_head, q_idx, valid, VALUE_DIM, VALUE_TILE)
    delta = products_of_rows(o, do)  # [TILE_Q]
    rows = rows_of(q_place, head, q_heads, q_rows) + q_idx
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=valid, other=0.0)
    # A row without key and sink depends on nothing, whatever gradient it is handed.
    row_max = tl.load(max_ptr + rows, mask=valid, other=0.0)
    tl.store(delta_ptr + rows, tl.where(row_max == float("-inf"), 0.0, delta), mask=valid)

    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    tiles = tiles_of(q_rows, layout[0], TILE_Q)
    range_ptr = ranges_ptr + ((q_place[0].to(tl.int64) * q_heads + head) * tiles + tile) * 4
    store_range(range_ptr, lo, hi, whole, kv_len, (q_tile + 1) * TILE_Q > q_len)


# What statistics hand back to a row's scores, of entropy and of max_logit: nothing. statistics.py
NO_GRADIENTS: tuple[tuple[torch.Tensor, ...], ...] = ((), ())


class BackwardCall(NamedTuple):
    """What the kernels of the backward have in common."""

    call: Call
    out: torch.Tensor  # of the forward
    row_max: torch.Tensor  # [blocks, q_heads, rows] fp32 contiguous, as for sum_log2, dlse and delta
    sum_log2: torch.Tensor
    do: torch.Tensor  # as out, any strides
    dlse: torch.Tensor | None
    delta: torch.Tensor
    ranges: torch.Tensor  # [blocks, q_heads, tiles, 4] int32
    tile_q: int  # the rows that one entry of ranges stands for
    of_rows: tuple[tuple[torch.Tensor, ...], ...] = NO_GRADIENTS  # as delta, what statistics hand in


def prepare(
    call: Call,
    out: torch.Tensor,
    statistics: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    tile_q: int,
    of_rows: tuple[tuple[torch.Tensor, ...], ...] = NO_GRADIENTS,
) -> BackwardCall:
    """Compute delta and the ranges of keys that tiles of tile_q rows visit; statistics are the forward's;
    of_rows: (dentropy,) or (), and (dmax, largest) or ()."""
    shape = call.shape
    row_max, sum_log2 = statistics.unbind(0)
    tiles = shape.blocks, shape.q_heads, tile_count(shape, shape.q_len, tile_q)
    delta = torch.empty_like(row_max)
    ranges = torch.empty(*tiles, 4, dtype=torch.int32, device=out.device)
    backward = BackwardCall(call, out, row_max, sum_log2, do, dlse, delta, ranges, tile_q, of_rows)
    grid, arguments = prepare_launch(backward)
    if grid[0]:
        launch(prepare_kernel, grid, out, **arguments)
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
        layout=shape.layout,
        mask_args=functions["mask_args"],
        INTERVALS=functions["INTERVALS"],
        VALUE_DIM=shape.value_dim,
        VALUE_TILE=pieces_of(shape.value_dim),
        TILE_Q=backward.tile_q,
        enable_fp_fusion=True,
    )
    return (programs(shape, shape.q_len, backward.tile_q, shape.q_heads),), arguments
