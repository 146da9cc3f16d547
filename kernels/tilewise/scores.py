"""What is a score? Score modifiers: their device functions, and the objects that a caller passes.

A modifier is, on the device,

    score(s, batch, head, q_idx, kv_idx, args) -> s          s [TILE_Q, TILE_KV] in fp32, natural units

called for each tile, in the caller's order, after the dot product. Indices are int32, q_idx [TILE_Q, 1] and
kv_idx [1, TILE_KV], and always those of valid rows and keys, so loads need no bounds check. `args` is the
tuple that `bind` returned. Every modifier names its specification, a plain PyTorch function, as its `twin`.

The scale and the similarity are modifiers too, so a kernel knows of nothing but `apply_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

import tilewise_reference.scores as dense

from .numerics import LOG2E, widen
from .problem import FLOATS, Align, Shape, broadcast_strides, check_align, check_dtype, misfits

Twin = Callable[..., torch.Tensor]


class BoundScore(NamedTuple):
    """A modifier tied to the sizes of one call: its device function and that function's runtime arguments."""

    score: Any
    args: tuple[Any, ...]


@triton.jit
def apply_scores(s, batch, head, q_idx, kv_idx, SCORES: tl.constexpr, score_args):
    """S under all modifiers, in order; q_idx [TILE_Q] and kv_idx [TILE_KV] are valid rows and keys."""
    for i in tl.static_range(len(SCORES)):
        s = SCORES[i](s, batch, head, q_idx[:, None], kv_idx[None, :], score_args[i])
    return s


class Score:
    """A change to scores before the mask and the softmax."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the device function reads, by argument name."""
        return {}

    def misfits(self, shape: Shape) -> list[str]:
        """Why this modifier cannot serve a call of this shape; empty if it can."""
        return []

    def bind(self, shape: Shape) -> BoundScore:
        raise NotImplementedError(f"{type(self).__name__} defines no bind()")

    def twin(self, shape: Shape) -> Twin:
        """The same rule as f(s, batch, head, q_idx, kv_idx) -> s, in plain PyTorch."""
        raise NotImplementedError(f"{type(self).__name__} defines no twin()")


def as_scores(given: Any) -> tuple[Score, ...]:
    """The modifiers meant by None, a Score, a `@triton.jit` function, or a sequence of these."""
    if given is None:
        return ()
    if isinstance(given, Score):
        return (given,)
    if isinstance(given, triton.runtime.KernelInterface):
        return (UserScore(given),)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(score for each in given for score in as_scores(each))
    raise ValueError(
        f"score={given!r} must be a tilewise score, a @triton.jit function "
        "score(s, batch, head, q_idx, kv_idx, args), or a sequence of these"
    )


# ---- Softcap


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


class Softcap(Score):
    """s becomes cap · tanh(s / cap), so that scores stay within ±cap (Gemma 2, arXiv 2408.00118). cap > 0."""

    def __init__(self, cap: float) -> None:
        if not (isinstance(cap, (int, float)) and 0 < cap < float("inf")):
            raise ValueError(f"{cap=} must be a finite number above 0; leave Softcap out for no cap")
        self.cap = float(cap)

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(softcap_score, (self.cap,))

    def twin(self, shape: Shape) -> Twin:
        return dense.softcap(self.cap)


# ---- ALiBi


@triton.jit
def alibi_score(s, batch, head, q_idx, kv_idx, args):
    slopes_ptr, strides, shift = args
    slope = tl.load(slopes_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1])
    return s - widen(slope) * tl.abs(kv_idx - q_idx - shift).to(tl.float32)


class ALiBi(Score):
    """s becomes s - slope · |key position - query position| (arXiv 2108.12409).

    slopes: tensor [q_heads] or [batch, q_heads]; `alibi_slopes(q_heads)` gives the paper's.
    align: where the queries stand among the keys, as in `Causal`.
    """

    def __init__(self, slopes: torch.Tensor, align: Align = "bottom_right") -> None:
        check_align(align)
        check_dtype("slopes", slopes, FLOATS)
        self.slopes, self.align = slopes, align

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"slopes": self.slopes}

    def misfits(self, shape: Shape) -> list[str]:
        return misfits("slopes", self.slopes, shape.scores[:2])

    def bind(self, shape: Shape) -> BoundScore:
        strides = broadcast_strides(self.slopes, shape.scores[:2])
        return BoundScore(alibi_score, (self.slopes, strides, shape.shift(self.align)))

    def twin(self, shape: Shape) -> Twin:
        return dense.alibi(self.slopes, shape.q_len, shape.kv_len, self.align)


def alibi_slopes(q_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The slopes of the ALiBi paper (section 3), [q_heads] fp32: 2^(-8/n), 2^(-16/n), … for n heads; where n
    is no power of two, those of the power of two below it and every other one of the power above."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 1 << (q_heads.bit_length() - 1)
    slopes = geometric(below) + geometric(2 * below)[::2][: q_heads - below]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


# ---- Relative position


@triton.jit
def relative_score(s, batch, head, q_idx, kv_idx, args):
    table_ptr, max_distance, shift = args  # [q_heads, 2 · max_distance + 1], by key position - query position
    distance = tl.minimum(tl.maximum(kv_idx - q_idx - shift, -max_distance), max_distance)
    row_ptr = table_ptr + head.to(tl.int64) * (2 * max_distance + 1) + max_distance
    return s + widen(tl.load(row_ptr + distance))


class RelativePosition(Score):
    """s becomes s + table[head, bucket(key position - query position)], with the buckets of T5
    (arXiv 1910.10683): one a distance when near, logarithmic up to max_distance, one for all beyond.

    table: tensor [q_heads, buckets] (T5 checkpoints store its transpose). bidirectional: half of the buckets
    serve keys after the query; else those share the bucket of distance 0. `align` as in `Causal`.
    """

    def __init__(
        self,
        table: torch.Tensor,
        max_distance: int = 128,
        bidirectional: bool = True,
        align: Align = "bottom_right",
    ) -> None:
        check_align(align)
        check_dtype("table", table, FLOATS)
        if table.dim() != 2:
            raise ValueError(f"table.shape={tuple(table.shape)} must be [q_heads, buckets]")
        self.table, self.max_distance = table, max_distance
        self.bidirectional, self.align = bidirectional, align
        # Beyond max_distance the bucket stays the same, so one bucket a distance up to it says everything.
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = dense.t5_bucket(distances, table.shape[1], max_distance, bidirectional)
        self.buckets = buckets.to(table.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"table": self.table}

    def misfits(self, shape: Shape) -> list[str]:
        if self.table.shape[0] == shape.q_heads:
            return []
        return [
            f"table.shape={tuple(self.table.shape)} must be [{shape.q_heads}, buckets], a row a query head"
        ]

    def bind(self, shape: Shape) -> BoundScore:
        by_distance = self.table.index_select(1, self.buckets).contiguous()
        return BoundScore(relative_score, (by_distance, self.max_distance, shape.shift(self.align)))

    def twin(self, shape: Shape) -> Twin:
        return dense.relative_position(
            self.table, shape.q_len, shape.kv_len, self.max_distance, self.bidirectional, self.align
        )


# ---- Bias


@triton.jit
def bias_score(s, batch, head, q_idx, kv_idx, args):
    ptr, strides = args
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    bias = tl.load(ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3])
    return s + widen(bias)


class Bias(Score):
    """s becomes s + bias. bias: fp16, bf16 or fp32 tensor that broadcasts to [batch, q_heads, q_len, kv_len],
    with any strides and alignment. `attention(..., bias=b)` is Bias(b) after all other modifiers."""

    def __init__(self, bias: torch.Tensor) -> None:
        check_dtype("bias", bias, FLOATS)
        self.bias = bias

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"bias": self.bias}

    def misfits(self, shape: Shape) -> list[str]:
        return misfits("bias", self.bias, shape.scores)

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(bias_score, (self.bias, broadcast_strides(self.bias, shape.scores)))

    def twin(self, shape: Shape) -> Twin:
        bias = self.bias.expand(shape.scores)
        return lambda s, batch, head, q_idx, kv_idx: s + bias[batch, head, q_idx, kv_idx].to(s.dtype)


# ---- UserScore: a function of the caller's own


class UserScore(Score):
    """A modifier from the caller's own module-level `@triton.jit` function.

    score(s, batch, head, q_idx, kv_idx, args) -> s, on tiles as described at the head of this file.
    args: a tuple of tensors, ints and floats, handed on to it. Functions cannot close over values.
    twin(s, batch, head, q_idx, kv_idx, *args) -> s, optional: the same rule in plain PyTorch, needed for CPU
        tensors outside the interpreter.
    """

    def __init__(self, score: Any, args: tuple[Any, ...] = (), *, twin: Twin | None = None) -> None:
        self.score, self.args, self._twin = score, tuple(args), twin

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"args[{i}]": arg for i, arg in enumerate(self.args) if isinstance(arg, torch.Tensor)}

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(self.score, self.args)

    def twin(self, shape: Shape) -> Twin:
        if self._twin is None:
            raise ValueError(
                f"UserScore({self.score.__name__}) has no twin, which plain PyTorch needs: give "
                "UserScore(..., twin=f) with f(s, batch, head, q_idx, kv_idx, *args) -> s"
            )
        twin = self._twin
        return lambda s, batch, head, q_idx, kv_idx: twin(s, batch, head, q_idx, kv_idx, *self.args)
