"""dQ as the caller gets it, from its sums in fp32: times `unit`, projected, rounded, in any strides.

Where one walk makes dQ, dK and dV, no program sees all of a row's shares: they are summed in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_tile, store_tile
from ..parts.numerics import round_to
from .call import Call, on_device_of, power_of_two_tile, sizes_of
from .walk import own_rows

TILE_ROWS = 32  # the kernel reads and writes once what it owns: any few rows do


@triton.jit
def finish_dq_kernel(
    sums,  # (pointer, strides), as for the next two
    queries,
    dqueries,
    sizes,
    unit,
    PROJECT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    # Which sequence a row belongs to does not matter here.
    _block, head, q_idx, _row, where, _tile, _q_tile = own_rows(sizes, ((), ()), TILE_Q)
    place, valid = where[0], q_idx < where[2]
    dq = load_tile(head_of(sums, place, head), q_idx, valid, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    q = load_tile(head_of(queries, place, head), q_idx, valid, HEAD_DIM, HEAD_TILE)
    if unit is not None:
        dq *= unit
    dq = round_to(PROJECT(dq, q), dqueries[0].dtype.element_ty)
    store_tile(head_of(dqueries, place, head), dq, q_idx, valid, HEAD_DIM, HEAD_TILE)


def launch_finish_dq(call: Call, sums: torch.Tensor, dq: torch.Tensor) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim] from sums of the same shape, fp32."""
    blocks, q_heads, rows, head_dim = sums.shape
    grid = -(-rows // TILE_ROWS) * q_heads * blocks
    if grid:
        with on_device_of(dq):
            finish_dq_kernel[(grid,)](
                sums=(sums, sums.stride()),
                queries=(call.q, call.q.stride()),
                dqueries=(dq, dq.stride()),
                sizes=sizes_of(call.shape),
                unit=call.unit,
                PROJECT=call.project,
                HEAD_DIM=head_dim,
                HEAD_TILE=power_of_two_tile(head_dim),
                TILE_Q=TILE_ROWS,
                enable_fp_fusion=True,
            )
