"""From the dot product to the score: scale and similarity, as the first score modifier.

A kernel computes the dot products q·k. What a caller means by a score is

    dot:         scale · q·k                              scale = 1 by default
    scaled dot:  scale · q·k                              scale = 1/√head_dim (arXiv 1706.03762)
    cosine:      scale · t · q·k / (|q| |k|)              t: an optional temperature a head (arXiv 2111.09883)

Each factor is a modifier of its own, so that each has its derivative beside it. A positive number as scale
costs nothing: where no modifier follows, it is folded into the exponentials' base.

The lengths |q| and |k| are computed once, outside the kernel; the cosine is that of q̂ = q / |q| and k̂. So the
backward multiplies dS by q̂ and k̂ (an `operand`), and turns the sums into gradients of q and k at the end:

    dq = (dq̂ - q̂ (q̂ · dq̂)) / |q|                          what is orthogonal to q (a `project`)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .addressing import page_of, rows_of
from .described import worded
from .fp8 import FP8, Descaled, Scales
from .numerics import round_to, widen
from .pieces import dots, magnitudes, scaled, where_rows, widened
from .scores.score import STATE, BoundScore, Parameter, Score, Seconds, padded_sizes
from .sequences import sequence_at
from .shape import Shape

EPSILON = tl.constexpr(
    1e-12
)  # the shortest length a vector is divided by, as in torch.nn.functional.normalize
SMALLEST_UNIT, LARGEST_UNIT = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2


class Cosine(NamedTuple):
    """similarity=Cosine(temperature): cosine similarity times a number, or a tensor [q_heads]."""

    temperature: float | torch.Tensor = 1.0

    def __repr__(self) -> str:
        return f"Cosine({worded(self.temperature)})"


@triton.jit
def scale_score(s, batch, head, q_idx, kv_idx, args):
    return s * args[0]


@triton.jit
def scale_factor(s, batch, head, q_idx, kv_idx, args):
    return args[0]


@triton.jit
def tensor_scale_score(s, batch, head, q_idx, kv_idx, args):
    return s * tensor_scale_factor(s, batch, head, q_idx, kv_idx, args)


@triton.jit
def tensor_scale_factor(s, batch, head, q_idx, kv_idx, args):
    return widen(tl.load(args[0] + head.to(tl.int64) * args[1]))


@triton.jit
def score_itself(s, batch, head, q_idx, kv_idx, args):
    return s


class Scale(Score):
    """s becomes scale · s. scale: a number, a tensor without dimensions, or one factor a head [q_heads].
    `name` is the argument of `attention` that it comes from."""

    def __init__(self, name: str, scale: float | torch.Tensor) -> None:
        self.name, self.scale = name, scale

    def tensors(self) -> dict[str, torch.Tensor]:
        return {self.name: self.scale} if isinstance(self.scale, torch.Tensor) else {}

    def bind(self, shape: Shape) -> BoundScore:
        if isinstance(self.scale, torch.Tensor):
            stride = self.scale.stride(0) if self.scale.dim() else 0
            return BoundScore(tensor_scale_score, (self.scale, stride), tensor_scale_factor)
        return BoundScore(scale_score, (float(self.scale),), scale_factor)

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        return {
            name: Parameter(score_itself, padded_sizes(tensor[..., None, None]))
            for name, tensor in self.tensors().items()
        }

    def seconds(self) -> Seconds:
        return {(STATE, name): None for name in self.tensors()}


@triton.jit
def cosine_score(s, batch, head, q_idx, kv_idx, args):
    """s / (|q| |k|) of each pair."""
    q_factor_ptr, k_factor_ptr, sizes, layout = args
    q_heads, group, q_rows, kv_rows = sizes
    q_place, kv_place, _q_len, _kv_len = sequence_at(batch, sizes, layout)
    q_first = rows_of(q_place, head, q_heads, q_rows)
    kv_heads, kv_head = q_heads // group, head // group
    if len(layout[1]) == 3 and len(layout[1][2]) > 0:
        table_ptr, table_strides, page_size, page_count = layout[1][2]
        table_ptr += batch.to(tl.int64) * table_strides[0]
        page = page_of(kv_idx, None, (table_ptr, table_strides[1], page_size, page_count))
        k_factors = k_factor_ptr + (page * kv_heads + kv_head) * page_size + kv_idx % page_size
    else:
        k_factors = k_factor_ptr + rows_of(kv_place, kv_head, kv_heads, kv_rows) + kv_idx
    return s * tl.load(q_factor_ptr + q_first + q_idx) * tl.load(k_factors)


@triton.jit
def itself(x):
    return x


@triton.jit
def unchanged(dx, x):
    return dx


@triton.jit
def unit_rows(x):
    """X̂ = X / max(|X|, ε) of each row of a tile in pieces, in x's dtype."""
    wide = widened(x)
    length = tl.maximum(tl.sqrt(dots(wide, wide)), EPSILON)[:, None]
    unit = ()
    for i in tl.static_range(len(x)):
        unit = unit + (round_to(wide[i] / length, x[i].dtype),)  # type: ignore[assignment]
    return unit


@triton.jit
def orthogonal_part(dx, x):
    """dX = (dX̂ - X̂ (X̂ · dX̂)) / |X| of each row, tiles in pieces; rows of at most ε are only divided by ε. A
    row without a gradient gets none, also where x is NaN because nobody looks there."""
    wide = where_rows(magnitudes(dx) > 0.0, widened(x))
    length = tl.sqrt(dots(wide, wide))
    inverse = (1.0 / tl.maximum(length, EPSILON))[:, None]
    unit = scaled(wide, inverse)
    along = tl.where(length > EPSILON, dots(dx, unit), 0.0)[:, None]
    found = ()
    for i in tl.static_range(len(dx)):
        found = found + ((dx[i] - along * unit[i]) * inverse,)  # type: ignore[assignment]
    return found


class Normalised(Score):
    """s becomes s / (|q| |k|): the cosine of the angle between query and key."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.q, self.k = q, k

    def bind(self, shape: Shape) -> BoundScore:
        factors = inverse_lengths(self.q), inverse_lengths(self.k)
        sizes = (shape.q_heads, shape.group, shape.q_len, shape.kv_len)
        return BoundScore(cosine_score, (*factors, sizes, shape.layout))


def inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """1 / max(|row|, ε) of each row of [batch, heads, length, head_dim], in fp32 and contiguous."""
    x = x.bfloat16() if x.dtype == FP8 else x  # in which PyTorch has no norm, and which bf16 holds exactly
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return lengths.clamp_min(EPSILON.value).reciprocal().contiguous()


def default_scale(similarity: str | Cosine, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if similarity == "scaled_dot" else 1.0


class Similarity(NamedTuple):
    """The modifiers that turn dot products into scores; the unit of what they leave, as `softmax_step` takes
    it (None: natural); and the two functions of the backward described above."""

    scores: tuple[Score, ...]
    unit: float | None
    operand: Any = itself
    project: Any = unchanged


def similarity_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    similarity: str | Cosine,
    scale: float | torch.Tensor | None,
    in_natural_units: bool,
    scales: Scales | None = None,
) -> Similarity:
    """The similarity and the scale as modifiers. in_natural_units: what follows, modifiers of the caller or a
    sink, needs scores in natural units. scales: of q and k, if they are fp8; the cosine does not see them."""
    scale = default_scale(similarity, q.shape[3]) if scale is None else scale
    if similarity == "cosine" or isinstance(similarity, Cosine):
        temperature = similarity.temperature if isinstance(similarity, Cosine) else 1.0
        factors = (Scale("scale", scale), Scale("temperature", temperature))
        kept = tuple(f for f in factors if isinstance(f.scale, torch.Tensor) or f.scale != 1.0)
        return Similarity((Normalised(q, k), *kept), None, unit_rows, orthogonal_part)
    own = () if scales is None else (Descaled(scales),)
    # Maxima of scaled and unscaled products agree only for a positive scale; and the unit must be a number.
    if isinstance(scale, torch.Tensor) or in_natural_units or not SMALLEST_UNIT <= scale <= LARGEST_UNIT:
        return Similarity((*own, Scale("scale", scale)), None)
    return Similarity(own, float(scale))
