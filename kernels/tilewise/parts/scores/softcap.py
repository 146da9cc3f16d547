"""Softcap: scores that stay within ±cap."""

from __future__ import annotations

import triton
import triton.language as tl

import tilewise_reference.scores as dense

from ..numerics import LOG2E
from ..shape import Shape
from .score import STATE, BoundScore, Score, Seconds, Twin


@triton.jit
def tanh(x):
    """tanh x in fp32: an odd polynomial near 0, where the exponential form would cancel; never overflows."""
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))  # exp(-2|x|), between 0 and 1
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def softcap_score(s, batch, head, q_idx, kv_idx, args):
    cap = args[0]
    return cap * tanh(s / cap)


@triton.jit
def softcap_derivative(s, batch, head, q_idx, kv_idx, args):
    """1 - tanh² (s / cap) as 4e / (1 + e)², e = exp(-2|s / cap|): nothing cancels where tanh is near 1."""
    e = tl.exp2(tl.abs(s / args[0]) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def softcap_second(s, batch, head, q_idx, kv_idx, args):
    """-2 / cap · tanh (s / cap) · (1 - tanh² (s / cap))."""
    slope = softcap_derivative(s, batch, head, q_idx, kv_idx, args)
    return -2.0 / args[0] * tanh(s / args[0]) * slope


class Softcap(Score):
    """s becomes cap · tanh(s / cap), so that scores stay within ±cap (Gemma 2, arXiv 2408.00118). cap > 0."""

    FIELDS = ("cap",)

    def __init__(self, cap: float) -> None:
        if not (isinstance(cap, (int, float)) and 0 < cap < float("inf")):
            raise ValueError(f"{cap=} must be a finite number above 0; leave Softcap out for no cap")
        self.cap = float(cap)

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(softcap_score, (self.cap,), softcap_derivative)

    def seconds(self) -> Seconds:
        return {(STATE, STATE): softcap_second}

    def twin(self, shape: Shape) -> Twin:
        return dense.softcap(self.cap)
