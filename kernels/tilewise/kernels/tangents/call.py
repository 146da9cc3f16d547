"""A call and the direction along which it is derived, ready for the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...parts.scores.tangents import Moving
from ..call import Call, shared_arguments
from ..tile import Tile


class TangentCall(NamedTuple):
    """What the kernels of tangents have in common."""

    call: Call
    row_max: (
        torch.Tensor
    )  # [blocks, q_heads, rows] fp32 contiguous, as for sum_log2: the forward's statistics
    sum_log2: torch.Tensor
    q: torch.Tensor  # the tangents of q, k and v: their shapes and dtype, any strides
    k: torch.Tensor
    v: torch.Tensor
    moving: tuple[Moving, ...]  # the parameters of scores that move too
    derivatives: tuple[Any, ...]  # of the call's scores


def tangent_arguments(tangent: TangentCall, tile: Tile) -> dict[str, Any]:
    """What the kernels of tangents take alike. `moves`: the tangents of q, k and v, as `call` has these, and
    what the functions in MOVING are given; `statistics`: row_max and sum_log2."""
    of_qkv = tangent.q, tangent.k, tangent.v
    return shared_arguments(tangent.call) | dict(
        moves=(
            of_qkv,
            tuple([x.stride() for x in of_qkv]),
            tuple([each.args for each in tangent.moving]),
        ),
        statistics=(tangent.row_max, tangent.sum_log2),
        DERIVATIVES=tangent.derivatives,
        MOVING=tuple([(each.modifier, each.read, each.derivative) for each in tangent.moving]),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


class SecondCall(NamedTuple):
    """What the kernels of the backward's tangents have in common."""

    tangent: TangentCall
    do: torch.Tensor  # as the forward's out, any strides
    mean: torch.Tensor  # [blocks, q_heads, rows] fp32 contiguous, as for the next two: the tangent of LSE
    delta: torch.Tensor
    delta_dot: torch.Tensor
    ranges: torch.Tensor  # [blocks, q_heads, tiles, 4] int32: prepare.py
    seconds: tuple[Any, ...]  # of the scores' derivatives by what they are given: SECONDS


def second_arguments(second: SecondCall, tile: Tile) -> dict[str, Any]:
    """The same; `rows` is dO, with its strides, and three numbers a row."""
    return tangent_arguments(second.tangent, tile) | dict(
        rows=((second.do, second.do.stride()), second.mean, second.delta, second.delta_dot),
        SECONDS=second.seconds,
    )
