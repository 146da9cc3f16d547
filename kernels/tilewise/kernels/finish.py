"""dQ as the caller gets it, from its sums in fp32: times `unit`, projected, rounded, in any strides.

Where one walk makes dQ, dK and dV, no program sees all of a row's shares: they are summed in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile, store_tile
from ..parts.numerics import round_to
from ..parts.sequences import tiles_of
from .call import Call, on_device_of, power_of_two_tile, programs, sizes_of
from .walk import own_rows


@triton.jit
def finish_dq_kernel(
    sums_ptr,  # [blocks, q_heads, tiles, TILE_Q, head_dim] fp32, tiles by the numbers they have in prepare.py
    queries,  # (pointer, strides), as for dqueries
    dqueries,
    sizes,
    layout,
    unit,
    PROJECT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    q_heads, _group, q_rows, _kv_rows = sizes
    _batch, head, q_idx, _row, where, tile, _q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, valid = where[0], q_idx < where[2]
    tiles = tiles_of(q_rows, layout[0], TILE_Q)
    first = ((q_place[0].to(tl.int64) * q_heads + head) * tiles + tile) * TILE_Q
    sum_head = sums_ptr + first * HEAD_DIM, HEAD_DIM, 1
    dq = load_tile(sum_head, tl.arange(0, TILE_Q), valid, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    q = load_tile(head_of(queries, q_place, head), q_idx, valid, HEAD_DIM, HEAD_TILE)
    if unit is not None:
        dq *= unit
    dq = round_to(PROJECT(dq, q), dqueries[0].dtype.element_ty)
    store_tile(head_of(dqueries, q_place, head), dq, q_idx, valid, HEAD_DIM, HEAD_TILE)


def launch_finish_dq(call: Call, sums: torch.Tensor, dq: torch.Tensor) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim] from sums [blocks, q_heads, tiles, tile_q, head_dim]."""
    shape, tile_q = call.shape, sums.shape[3]
    grid = programs(shape, shape.q_len, tile_q, shape.q_heads)
    if grid:
        with on_device_of(dq):
            finish_dq_kernel[(grid,)](
                sums_ptr=sums,
                queries=(call.q, call.q.stride()),
                dqueries=(dq, dq.stride()),
                sizes=sizes_of(shape),
                layout=shape.layout,
                unit=call.unit,
                PROJECT=call.project,
                HEAD_DIM=shape.head_dim,
                HEAD_TILE=power_of_two_tile(shape.head_dim),
                TILE_Q=tile_q,
                num_warps=8 if tile_q * shape.head_dim > 4096 else 4,
                enable_fp_fusion=True,
            )
