"""Scores and their tangents: the device code that forward, rows, keys and parameters share."""

import triton
import triton.language as tl

from ...parts.dropout import drop
from ...parts.pieces import product
from ...parts.scores.tangents import apply_tangents


@triton.jit
def scores_and_tangents(
    a, a_dot, b, b_dot, batch, head, q_idx, kv_idx, unit, SCORES: tl.constexpr, DERIVATIVES: tl.constexpr,
    score_args, MOVING: tl.constexpr, moving_args, PRECISION: tl.constexpr,
):  # fmt: skip
    """S of A Bᵀ, in the unit of the forward, and its tangent in natural units; and what each modifier was
    given of both. Q and K may stand for A and B, or K and Q, with q_idx and kv_idx shaped to match."""
    # S = scores(A Bᵀ)        Ṡ: of Ȧ Bᵀ + A Ḃᵀ
    s = product(a, b, PRECISION)
    t = product(a_dot, b, PRECISION) + product(a, b_dot, PRECISION)
    s, t, inputs, tangents = apply_tangents(
        s, t, batch, head, q_idx, kv_idx, SCORES, DERIVATIVES, score_args, MOVING, moving_args
    )
    if unit is not None:
        t = t * unit
    return s, t, inputs, tangents


@triton.jit
def gradients_and_tangents(p, p_dot, dp, dp_dot, keep, dropout, delta, delta_dot):
    """dS of the last modifier's scores, and its tangent, from those of P and of what arrives, dO Vᵀ and
    dO V̇ᵀ, before dropout."""
    # dS = P · (dP - delta)   dṠ = Ṗ · (dP - delta) + P · (dṖ - deltȧ)
    slope = drop(dp, keep, dropout) - delta
    return p * slope, p_dot * slope + p * (drop(dp_dot, keep, dropout) - delta_dot)
