"""Tangents of scores: how they change when what they are made of moves, and how their gradients do.

Along a direction in which the dot products move by ṫ and the parameters by θ̇, the chain of modifiers gives

    s' = f(s, θ)            ṫ' = ∂f/∂s ṫ + Σ ∂f/∂θ θ̇                        forwards
    dS = dS' ∂f/∂s          dṪ = dṪ' ∂f/∂s + dS' (∂²f/∂s² ṫ + Σ ∂²f/∂s∂θ θ̇)  backwards

where a dot stands for the derivative along that direction. Each modifier brings its derivatives: score.py. A
parameter's tangent is read like the parameter: by the pair's place, or by its distance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..addressing import load_pairs
from ..numerics import widen
from ..shape import FAR
from .relative_position import at_distance
from .score import STATE, Parameter, Seconds

OF_STATE = tl.constexpr(-1)  # in place of a parameter's number: the modifier's input


# ---- Device functions
#
# MOVING: the parameters that have a tangent, (modifier, read, derivative) each, and for `read` its arguments.
# SECONDS: (modifier, number in MOVING or OF_STATE, function) for each ∂²f/∂s∂x; no function (None): it is 1.


@triton.jit
def at_pair(batch, head, q_idx, kv_idx, args):
    """What a tensor with an element a pair holds; 0 beyond it."""
    ptr, strides, limits = args
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]
    return widen(load_pairs(ptrs, q_idx, kv_idx, limits, 0.0))


@triton.jit
def apply_tangents(
    s, t, batch, head, q_idx, kv_idx, SCORES: tl.constexpr, DERIVATIVES: tl.constexpr, score_args,
    MOVING: tl.constexpr, moving_args,
):  # fmt: skip
    """S and its tangent under all modifiers, in order, and what each of them was given: (S, Ṫ, inputs,
    tangents)."""
    inputs = ()
    tangents = ()
    for i in tl.static_range(len(SCORES)):
        inputs = inputs + (s,)  # type: ignore[assignment]
        tangents = tangents + (t,)  # type: ignore[assignment]
        if DERIVATIVES[i] is not None:
            t = t * DERIVATIVES[i](s, batch, head, q_idx, kv_idx, score_args[i])
        for j in tl.static_range(len(MOVING)):
            if MOVING[j][0] == i:
                move = MOVING[j][1](batch, head, q_idx, kv_idx, moving_args[j])
                if MOVING[j][2] is not None:
                    move = move * MOVING[j][2](s, batch, head, q_idx, kv_idx, score_args[i])
                t = t + move
        s = SCORES[i](s, batch, head, q_idx, kv_idx, score_args[i])
    return s, t, inputs, tangents


@triton.jit
def moved_derivative(
    x, i, s, t, batch, head, q_idx, kv_idx, SECONDS: tl.constexpr, args, MOVING: tl.constexpr, moving_args
):
    """x + the tangent of a derivative of modifier i, whose SECONDS these are, at its input s."""
    for j in tl.static_range(len(SECONDS)):
        if SECONDS[j][0] == i:
            if SECONDS[j][1] == OF_STATE:
                move = t
            else:
                move = MOVING[SECONDS[j][1]][1](batch, head, q_idx, kv_idx, moving_args[SECONDS[j][1]])
            if SECONDS[j][2] is not None:
                move = move * SECONDS[j][2](s, batch, head, q_idx, kv_idx, args)
            x = x + move
    return x


@triton.jit
def pull_back_tangents(
    ds, dt, inputs, tangents, batch, head, q_idx, kv_idx, DERIVATIVES: tl.constexpr, SECONDS: tl.constexpr,
    score_args, MOVING: tl.constexpr, moving_args, DOWN_TO: tl.constexpr,
):  # fmt: skip
    """dS and its tangent before modifier DOWN_TO, from those after the last one, in reverse order."""
    for i in tl.static_range(len(DERIVATIVES) - 1, DOWN_TO - 1, -1):
        change = moved_derivative(
            tl.zeros_like(ds), i, inputs[i], tangents[i], batch, head, q_idx, kv_idx, SECONDS, score_args[i],
            MOVING, moving_args,
        )  # fmt: skip
        if DERIVATIVES[i] is not None:
            slope = DERIVATIVES[i](inputs[i], batch, head, q_idx, kv_idx, score_args[i])
            dt = dt * slope + ds * change
            ds = ds * slope
        else:
            dt = dt + ds * change
    return ds, dt


# ---- The host's side


class Moving(NamedTuple):
    """A parameter that has a tangent: whose it is, and how the device reads it."""

    modifier: int
    name: str
    read: Any
    args: tuple[Any, ...]
    derivative: Any


def moving(modifier: int, name: str, parameter: Parameter, tangent: torch.Tensor) -> Moving:
    """`tangent` has the parameter's shape; `parameter` as the kernels of this call read it."""
    if parameter.buckets is not None:
        table = tangent.index_select(1, parameter.buckets).contiguous()
        args: tuple[Any, ...] = (table, parameter.buckets.shape[0] // 2, parameter.shift_args)
        return Moving(modifier, name, at_distance, args, parameter.derivative)
    tangent = tangent.reshape(parameter.sizes)
    strides = tuple([0 if n == 1 else s for n, s in zip(tangent.shape, tangent.stride(), strict=True)])
    limits = tuple([FAR if n == 1 else n for n in parameter.sizes[2:]])
    return Moving(modifier, name, at_pair, (tangent, strides, limits), parameter.derivative)


Second = tuple[int, int, Any]  # of SECONDS


def seconds_by(of: str, seconds: Seconds, modifier: int, moving: tuple[Moving, ...]) -> list[Second]:
    """The tangent of a modifier's derivative by `of`, STATE or the name of a parameter, as SECONDS: what is
    derived once more by its input, and by those of its parameters that move."""
    found: list[Second] = []
    numbers = {each.name: j for j, each in enumerate(moving) if each.modifier == modifier}
    numbers[STATE] = OF_STATE.value
    for (a, b), function in seconds.items():
        other = b if a == of else a if b == of else None
        if other is not None and other in numbers:
            found.append((modifier, numbers[other], function))
    return found
