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

What is derived once more (tangents.py) needs second derivatives too, again functions of the same arguments:
`Score.seconds` names those that are not 0.

Every modifier names its specification, a plain PyTorch function, as its `twin`. The scale and the similarity
are modifiers too, so a kernel knows of nothing but `apply_scores` and `pull_back`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..described import shortened
from ..hints import SCORE, score_hint, with_hint
from ..plug import Plug
from ..shape import Shape

Twin = Callable[..., torch.Tensor]


AXES = "bhqk"  # batch, query head, query, key: what a dimension of a parameter may follow


STATE = "s"  # what a modifier is given, among the names of its parameters

# By what a modifier is derived twice, its input or parameters by name in either order, and ∂²score of both.
Seconds = dict[tuple[str, str], Any]


class BoundScore(NamedTuple):
    """A modifier tied to the sizes of one call: its device functions and their runtime arguments."""

    score: Any
    args: tuple[Any, ...]
    derivative: Any = None


class Parameter(NamedTuple):
    """A tensor that a modifier reads, and how a pair's score depends on the element that the pair reads.

    sizes: the tensor's along batch, query heads, queries and keys, 1 where pairs share an element; or
    buckets: int32 [2 · max_distance + 1], for a table [q_heads, buckets] read by the distance between key and
    query; `shift_args` as in `Shape.shift_args`.
    """

    derivative: Any
    sizes: tuple[int, ...] = ()
    buckets: torch.Tensor | None = None
    shift_args: tuple[Any, ...] = (0,)


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


class Score(Plug):
    """A change to scores before the mask and the softmax."""

    def bind(self, shape: Shape) -> BoundScore:
        raise NotImplementedError(f"{type(self).__name__} defines no bind()")

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Those of `tensors` that have a gradient."""
        return {}

    def no_gradient(self) -> str | None:
        """Why scores cannot be differentiated through this modifier; None if they can."""
        return None

    def seconds(self) -> Seconds:
        """The second derivatives that are not 0, by STATE and names in `parameters`; None where one is 1."""
        return {}

    def no_seconds(self) -> str | None:
        """Why they are not known; None if they are."""
        return None

    def twin(self, shape: Shape) -> Twin:
        """The same rule as f(s, batch, head, q_idx, kv_idx) -> s, in plain PyTorch."""
        raise NotImplementedError(f"{type(self).__name__} defines no twin()")


# What else a caller may give for a modifier, and the one that it means: the files of those scores add to it.
MEANINGS: list[tuple[type, Callable[[Any], Score]]] = []


def as_scores(given: Any) -> tuple[Score, ...]:
    """The modifiers meant by None, a Score, a `@triton.jit` function, or a sequence of these."""
    if given is None:
        return ()
    if isinstance(given, Score):
        return (given,)
    for kind, score in MEANINGS:
        if isinstance(given, kind):
            return (score(given),)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(score for each in given for score in as_scores(each))
    wanted = (
        f"score={shortened(given)} must be a tilewise score, a @triton.jit function {SCORE}, or a sequence "
        "of these"
    )
    raise ValueError(with_hint(wanted, score_hint(given)))


def padded_sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a tensor that broadcasts to four dimensions, in four dimensions."""
    return (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
