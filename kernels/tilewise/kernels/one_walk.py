"""The backward pass in one walk: dK and dV in registers, dQ in memory, five products a tile and not seven.

`dqkv_kernel` owns a tile of keys (█) and walks the tiles of rows that visit it (▒), as `dkv_kernel` does, of
which it has the code. S and dP are there, so dQ costs one product more, dS K, where `dq_kernel` computes both
again. But no program has all of a row's shares: they are added in memory in fp32, in turns (turns.py), or,
where the same bits each run are not asked for, as they come.

                     keys ──►
    rows             · █ · · ·
      │              · ▒ · · ·  ▲
      ▼              · ▒ · · ·  │  in turns, the last rows first
                   dqkv_kernel, causal

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .backward import backward_arguments, sum_over_rows
from .call import programs
from .finish import launch_finish_dq
from .launch import launch
from .prepare import BackwardCall
from .tile import Tile
from .turns import FIRST_COUNTER, take_number


@triton.jit
def dqkv_kernel(
    call,  # this and what follows: as for dkv_kernel
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    rows,
    of_rows,
    ranges_ptr,
    dkeys,
    dvalues,
    sums_ptr,  # of dQ, a block a tile of rows: [blocks, q_heads, tiles, TILE_Q, head_dim] fp32
    turns,  # turns.py
    DERIVATIVES: tl.constexpr,
    OPERAND: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    sum_over_rows(
        take_number(turns), call, INTERVALS, KEEPS, SCORES, HEAD_DIM, VALUE_DIM, HEAD_TILE, VALUE_TILE,
        PRECISION, rows, of_rows, ranges_ptr, (), dkeys, dvalues, (sums_ptr, turns), DERIVATIVES, OPERAND,
        PROJECT, HAS_GAPS, TILE_Q, TILE_KV, "dkv",
    )  # fmt: skip


def launch_dqkv(
    backward: BackwardCall,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    tile: Tile,
    deterministic: bool,
) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim], dk [batch, kv_heads, kv_len, head_dim] and
    dv [batch, kv_heads, kv_len, value_dim]. tile.tile_q is that of `prepare`."""
    shape = backward.call.shape
    blocks, q_heads, tiles, _ = backward.ranges.shape
    sums = dq.new_zeros((blocks, q_heads, tiles, tile.tile_q, shape.head_dim), dtype=torch.float32)
    turns: tuple[torch.Tensor, ...] = ()
    if deterministic:
        turns = (dq.new_zeros(FIRST_COUNTER.value + blocks * q_heads * tiles, dtype=torch.int32),)
    arguments = backward_arguments(backward, tile) | dict(
        ranges_ptr=backward.ranges,
        dkeys=(dk, dk.stride()),
        dvalues=(dv, dv.stride()),
        sums_ptr=sums,
        turns=turns,
        OPERAND=backward.call.operand,
        PROJECT=backward.call.project,
        HAS_GAPS=backward.call.has_gaps,
    )
    grid = programs(shape, shape.kv_len, tile.tile_kv, shape.kv_heads)
    if grid:
        launch(dqkv_kernel, (grid,), dk, **arguments)
    launch_finish_dq(backward.call, sums, dq)
