"""From the dot product to the score: scale and similarity, as the first score modifier.

A kernel computes the dot products q·k. What a caller means by a score is

    dot:         scale · q·k                              scale = 1 by default
    scaled dot:  scale · q·k                              scale = 1/√head_dim (arXiv 1706.03762)
    cosine:      scale · t · q·k / (|q| |k|)              t: an optional temperature a head (arXiv 2111.09883)

A positive number as scale costs nothing: where no modifier follows, it is folded into the exponentials' base.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .numerics import widen
from .problem import Shape
from .scores import BoundScore

EPSILON = 1e-12  # the shortest length a vector is divided by, as in torch.nn.functional.normalize


class Cosine(NamedTuple):
    """similarity=Cosine(temperature): cosine similarity times a number, or a tensor [q_heads]."""

    temperature: float | torch.Tensor = 1.0


@triton.jit
def scale_score(s, batch, head, q_idx, kv_idx, args):
    return s * args[0]


@triton.jit
def tensor_scale_score(s, batch, head, q_idx, kv_idx, args):
    return s * widen(tl.load(args[0]))


@triton.jit
def cosine_score(s, batch, head, q_idx, kv_idx, args):
    q_factor_ptr, k_factor_ptr, q_heads, kv_heads, q_len, kv_len = args
    q_row = (batch.to(tl.int64) * q_heads + head) * q_len
    kv_row = (batch.to(tl.int64) * kv_heads + head // (q_heads // kv_heads)) * kv_len
    return s * tl.load(q_factor_ptr + q_row + q_idx) * tl.load(k_factor_ptr + kv_row + kv_idx)


def inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """1 / max(|row|, ε) of each row of [batch, heads, length, head_dim], in fp32 and contiguous."""
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return lengths.clamp_min(EPSILON).reciprocal().contiguous()


def cosine_factors(
    q: torch.Tensor, k: torch.Tensor, scale: float | torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale · t / |q| of each query row and 1 / |k| of each key row, fp32."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.float()[:, None]
    return inverse_lengths(q) * scale * temperature, inverse_lengths(k)


def default_scale(similarity: str | Cosine, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if similarity == "scaled_dot" else 1.0


def bind_similarity(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Shape,
    similarity: str | Cosine,
    scale: float | torch.Tensor,
    modified: bool,
) -> tuple[tuple[BoundScore, ...], float | None]:
    """The modifiers that turn dot products into scores, and the unit of what they leave, as `softmax_step`
    takes it (None: natural). `modified`: the caller's own modifiers follow."""
    if similarity == "cosine":
        similarity = Cosine()
    if isinstance(similarity, Cosine):
        factors = cosine_factors(q, k, scale, similarity.temperature)
        sizes = (shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len)
        return (BoundScore(cosine_score, (*factors, *sizes)),), None
    if isinstance(scale, torch.Tensor):
        return (BoundScore(tensor_scale_score, (scale,)),), None
    # Maxima of scaled and unscaled products agree only for a positive scale; and the unit must be a number.
    fp32 = torch.finfo(torch.float32)
    if modified or not fp32.tiny <= scale <= fp32.max / 2:
        return (BoundScore(scale_score, (float(scale),)),), None
    return (), float(scale)
