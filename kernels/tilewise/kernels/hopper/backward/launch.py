"""A call's backward as the Hopper kernel's arguments: descriptors for the copy engine, and the sums of dQ."""

from __future__ import annotations

from typing import Any

import torch

from ....parts.numerics import INTERPRETED
from ....parts.shape import Shape, ceil_div
from ...call import function_arguments, power_of_two_tile
from ...copies import can_be_copied
from ...finish import launch_finish_dq
from ...launch import cannot_repeat, launch
from ...prepare import BackwardCall
from ...tile import HopperBackwardTile
from ..launch import descriptor
from ..limits import ALIGNMENT, FIRST_COUNTER, HOPPER_COLUMNS, WARPGROUP_ROWS
from .kernel import hopper_backward_kernel

CONSUMER_REGISTERS, OTHER_REGISTERS = 240, 24  # a thread's


def launch_backward(
    backward: BackwardCall,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    tile: HopperBackwardTile,
    deterministic: bool,
) -> None:
    """Fill dq, dk and dv, of the shapes of q, k and v. tile.tile_q is that of `prepare`. deterministic: every
    sum is taken in one order. On CPU tensors the kernel runs in an emulator."""
    if 0 in backward.call.shape.scores:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    sums = empty_sums(backward)
    grid, arguments = backward_launch(backward, sums, dk, dv, tile, deterministic)
    if INTERPRETED:
        from ....gluon_emulator import emulate

        cannot_repeat("the emulator runs it")
        emulate(hopper_backward_kernel, grid, arguments)
    else:
        launch(hopper_backward_kernel, grid, dq, **arguments)
    launch_finish_dq(backward.call, sums, dq)


def empty_sums(backward: BackwardCall) -> torch.Tensor:
    """Zeros [batch, q_heads, tiles, tile_q, head_dim] in fp32, whose rows begin on multiples of 16 bytes."""
    head_dim = backward.call.shape.head_dim
    aligned = ALIGNMENT // 4  # elements of fp32
    columns = ceil_div(head_dim, aligned) * aligned
    rows = *backward.ranges.shape[:3], backward.tile_q
    return backward.delta.new_zeros(*rows, columns)[..., :head_dim]


def backward_columns(shape: Shape) -> int:
    """Columns of a tile of q, k, v or dO: as many of each."""
    return max(HOPPER_COLUMNS, power_of_two_tile(max(shape.head_dim, shape.value_dim)))


def backward_launch(
    backward: BackwardCall,
    sums: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    tile: HopperBackwardTile,
    deterministic: bool,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments with which `hopper_backward_kernel` answers `backward`."""
    call = backward.call
    shape, columns = call.shape, backward_columns(call.shape)
    dq_columns = tile.tile_q * columns // (2 * WARPGROUP_ROWS)  # of a piece, of which a step has two
    tiles = backward.ranges.numel() // 4
    turns = torch.zeros(FIRST_COUNTER + tiles, dtype=torch.int32, device=sums.device)
    arguments = dict(
        q_desc=descriptor(call.q, tile.tile_q, columns),
        k_desc=descriptor(call.k, WARPGROUP_ROWS, columns),
        v_desc=descriptor(call.v, WARPGROUP_ROWS, columns),
        do_desc=descriptor(copyable(backward.do), tile.tile_q, columns),
        dk_desc=descriptor(dk, WARPGROUP_ROWS, columns),
        dv_desc=descriptor(dv, WARPGROUP_ROWS, columns),
        dq_desc=descriptor(sums.flatten(2, 3), WARPGROUP_ROWS, dq_columns),
        numbers=(backward.row_max, backward.sum_log2, backward.delta),
        ranges=backward.ranges,
        counters=turns[FIRST_COUNTER:],
        tickets=turns,
        sizes=(shape.q_heads, shape.group, shape.q_len, shape.kv_len),
        unit=() if call.unit is None else (call.unit,),
        **function_arguments(call),
        DERIVATIVES=tuple([score.derivative for score in call.scores]),
        TILE_Q=tile.tile_q,
        STAGES=tile.num_stages,
        IS_ORDERED=deterministic,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        OTHER_REGISTERS=OTHER_REGISTERS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return (ceil_div(shape.kv_len, tile.tile_kv) * shape.kv_heads * shape.batch,), arguments


def copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where the copy engine cannot take it as it lies: a gradient may be broadcast."""
    if can_be_copied(x):
        return x
    return x.contiguous().clone() if x.is_contiguous() else x.contiguous()
