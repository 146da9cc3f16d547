"""What is a score? Score modifiers: their device functions, and the objects that a caller passes.

A modifier is, on the device,

    score(s, batch, head, q_idx, kv_idx, args) -> s            s: a tile of scores in fp32, natural units

called for each tile, in the caller's order, after the dot product. Indices are int32 and always those of
valid rows and keys, so loads need no bounds check; q_idx and kv_idx have the tile's two dimensions, one of
them of size 1. The forward's tiles are [TILE_Q, TILE_KV], the backward's also [TILE_KV, TILE_Q]: a modifier
broadcasts its indices and does not care. `args` is the tuple that `bind` returned.

The backward needs two kinds of derivatives, functions of the same arguments, s being the modifier's input:

    derivative(s, batch, head, q_idx, kv_idx, args)            ∂score/∂s            None: it is 1
    Parameter.derivative(s, batch, head, q_idx, kv_idx, args)  ∂score/∂parameter    None: it is 1

Every modifier names its specification, a plain PyTorch function, as its `twin`. The scale and the similarity
are modifiers too, so a kernel knows of nothing but `apply_scores` and `pull_back`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl

import tilewise_reference.scores as dense

from .numerics import LOG2E, widen
from .problem import FLOATS, Shape, broadcast_strides, check_dtype, misfits, tensors_within

Twin = Callable[..., torch.Tensor]
AXES = "bhqk"  # batch, query head, query, key: what a dimension of a parameter may follow


class BoundScore(NamedTuple):
    """A modifier tied to the sizes of one call: its device functions and their runtime arguments."""

    score: Any
    args: tuple[Any, ...]
    derivative: Any = None


class Parameter(NamedTuple):
    """A tensor that a modifier reads, and how a pair's score depends on the element that the pair reads.

    sizes: the tensor's along batch, query heads, queries and keys, 1 where pairs share an element; or
    buckets: int32 [2 · max_distance + 1], for a table [q_heads, buckets] read by the distance between key and
    query; `shift` as in `Shape.shift`.
    """

    derivative: Any
    sizes: tuple[int, ...] = ()
    buckets: torch.Tensor | None = None
    shift: int = 0


@triton.jit
def apply_scores(s, batch, head, q_idx, kv_idx, SCORES: tl.constexpr, score_args):
    """S under all modifiers, in order, and what each of them was given: (S, inputs)."""
    inputs = ()
    for i in tl.static_range(len(SCORES)):
        inputs = inputs + (s,)  # type: ignore[assignment]
        s = SCORES[i](s, batch, head, q_idx, kv_idx, score_args[i])
    return s, inputs


@triton.jit
def pull_back(
    ds, inputs, batch, head, q_idx, kv_idx, DERIVATIVES: tl.constexpr, score_args, DOWN_TO: tl.constexpr
):
    """dS before modifier DOWN_TO, from dS after the last one: the chain rule, in reverse order."""
    for i in tl.static_range(len(DERIVATIVES) - 1, DOWN_TO - 1, -1):
        if DERIVATIVES[i] is not None:
            ds = ds * DERIVATIVES[i](inputs[i], batch, head, q_idx, kv_idx, score_args[i])
    return ds


class Score:
    """A change to scores before the mask and the softmax."""

    # The attributes that make up the object, by which `encoding` takes it apart and builds it again.
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the device functions read, by argument name."""
        return {}

    def misfits(self, shape: Shape) -> list[str]:
        """Why this modifier cannot serve a call of this shape; empty if it can."""
        return []

    def looks(self) -> Any:
        """What rules look at besides the shapes, dtypes and devices of `tensors`; hashable."""
        return type(self)

    def bind(self, shape: Shape) -> BoundScore:
        raise NotImplementedError(f"{type(self).__name__} defines no bind()")

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Those of `tensors` that have a gradient."""
        return {}

    def no_gradient(self) -> str | None:
        """Why scores cannot be differentiated through this modifier; None if they can."""
        return None

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


def padded_sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a tensor that broadcasts to four dimensions, in four dimensions."""
    return (1,) * (4 - tensor.dim()) + tuple(tensor.shape)


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


@triton.jit
def softcap_derivative(s, batch, head, q_idx, kv_idx, args):
    """1 - tanh² (s / cap) as 4e / (1 + e)², e = exp(-2|s / cap|): nothing cancels where tanh is near 1."""
    e = tl.exp2(tl.abs(s / args[0]) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


class Softcap(Score):
    """s becomes cap · tanh(s / cap), so that scores stay within ±cap (Gemma 2, arXiv 2408.00118). cap > 0."""

    FIELDS = ("cap",)

    def __init__(self, cap: float) -> None:
        if not (isinstance(cap, (int, float)) and 0 < cap < float("inf")):
            raise ValueError(f"{cap=} must be a finite number above 0; leave Softcap out for no cap")
        self.cap = float(cap)

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(softcap_score, (self.cap,), softcap_derivative)

    def twin(self, shape: Shape) -> Twin:
        return dense.softcap(self.cap)


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

    FIELDS = ("bias",)

    def __init__(self, bias: torch.Tensor) -> None:
        check_dtype("bias", bias, FLOATS)
        self.bias = bias

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"bias": self.bias}

    def misfits(self, shape: Shape) -> list[str]:
        return misfits("bias", self.bias, shape.scores)

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(bias_score, (self.bias, broadcast_strides(self.bias, shape.scores)))

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        return {"bias": Parameter(None, padded_sizes(self.bias))}

    def twin(self, shape: Shape) -> Twin:
        return dense.additive_bias(self.bias)


# ---- UserScore: a function of the caller's own


class UserScore(Score):
    """A modifier from the caller's own module-level `@triton.jit` functions.

    score(s, batch, head, q_idx, kv_idx, args) -> s, on tiles as described at the head of this file.
    args: a tuple of tensors, ints and floats, handed on to every function, for none can close over values.
    twin(s, batch, head, q_idx, kv_idx, *args) -> s, optional: the same rule in plain PyTorch, needed for CPU
        tensors outside the interpreter.
    derivative(s, batch, head, q_idx, kv_idx, args) -> ∂score/∂s at the input s, needed for gradients.
    parameters: for the tensors among args that are trained, {position: (axes, derivative)}. axes names what
        each of the tensor's dimensions follows, in this order: "b" batch, "h" query head, "q" query, "k" key
        (so "h" for [q_heads]; "" for a tensor without dimensions); derivative is ∂score/∂element.
    """

    FIELDS = ("score", "args", "derivative", "_parameters")

    def __init__(
        self,
        score: Any,
        args: tuple[Any, ...] = (),
        *,
        twin: Twin | None = None,
        derivative: Any = None,
        parameters: Mapping[int, tuple[str, Any]] | None = None,
    ) -> None:
        self.score, self.args, self._twin, self.derivative = score, tuple(args), twin, derivative
        self._parameters = tuple((i, axes, function) for i, (axes, function) in (parameters or {}).items())
        for position, axes, _ in self._parameters:
            if not (0 <= position < len(self.args) and isinstance(self.args[position], torch.Tensor)):
                raise ValueError(
                    f"parameters has the key {position}, which must be the position of a tensor in args"
                )
            if list(axes) != [axis for axis in AXES if axis in axes]:
                raise ValueError(
                    f"parameters[{position}]: axes {axes!r} must be letters of {AXES!r} in this order"
                )

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_within("args", self.args)

    def misfits(self, shape: Shape) -> list[str]:
        found = []
        for i, axes, _ in self._parameters:
            wanted = tuple(shape.scores[AXES.index(axis)] for axis in axes)
            if tuple(self.args[i].shape) != wanted:
                found.append(
                    f"args[{i}].shape={tuple(self.args[i].shape)} must be {wanted}, by its axes {axes!r}"
                )
        return found

    def looks(self) -> Any:
        positions = tuple([(i, axes) for i, axes, _ in self._parameters])
        return type(self), self._twin is None, self.derivative is None, len(self.args), positions

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(self.score, self.args, self.derivative)

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        sizes = dict(zip(AXES, shape.scores, strict=True))
        return {
            f"args[{i}]": Parameter(function, tuple(sizes[axis] if axis in axes else 1 for axis in AXES))
            for i, axes, function in self._parameters
        }

    def no_gradient(self) -> str | None:
        if self.derivative is not None:
            return None
        return (
            f"UserScore({self.score.__name__}) has no derivative: give UserScore(..., derivative=f) with a "
            "@triton.jit function f(s, batch, head, q_idx, kv_idx, args) -> ∂score/∂s"
        )

    def twin(self, shape: Shape) -> Twin:
        if self._twin is None:
            raise ValueError(
                f"UserScore({self.score.__name__}) has no twin, which plain PyTorch needs: give "
                "UserScore(..., twin=f) with f(s, batch, head, q_idx, kv_idx, *args) -> s"
            )
        twin = self._twin
        return lambda s, batch, head, q_idx, kv_idx: twin(s, batch, head, q_idx, kv_idx, *self.args)
