"""Which pairs count? Masks: their device functions, and the objects that a caller combines by `&`, `|`, `~`.

A mask answers on the device with one or both of

    interval(q_idx, batch, head, args) -> lo, hi, whole       per row: the keys lo..hi, and whether all count
    keep(q_idx, kv_idx, batch, head, args) -> bool tile       pair by pair, where an interval is not enough

and, where its pairs leave out whole tiles between those that they need, also with

    coverage(q_idx, kv_first, kv_last, batch, head, args) -> int tile
                                        row by row, of the keys kv_first..kv_last, both inclusive: 0 where the
                                        row sees none of them, 2 where it sees all, for sure; 1 where some, or
                                        where finding out would take longer

intervals.py shows what the kernels make of them. Indices are int32 and always those of valid rows and keys,
so loads need no bounds check. q_idx is [TILE_Q] for an interval. For keep, q_idx and kv_idx have the tile's
two dimensions, one of them of size 1: [TILE_Q, 1] against [1, TILE_KV], and in the backward also the
transpose; coverage is asked about [TILE_Q, 1] rows against [1, N] runs of keys. Where a mask stands inside
`|` or `~`, both ask its interval too (combined.py), which so goes element by element. `args` is the tuple
that `bind` returned. Which pairs count, interval and keep alone decide: a coverage says nothing else, only
sooner. Every mask names its specification, a plain PyTorch function, as its `twin`, and says on the host what
its interval says on the device: its `bounds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..bounds import Bounds
from ..described import shortened
from ..hints import KEEP, mask_hint, with_hint
from ..plug import Plug
from ..shape import Shape

Twin = Callable[..., torch.Tensor]


class BoundMask(NamedTuple):
    """A mask tied to the sizes of one call: its device functions (or None) and their runtime arguments."""

    interval: Any
    keep: Any
    args: tuple[Any, ...]
    coverage: Any = None  # None: what the interval says, and where keep decides, that perhaps some are seen


class Mask(Plug):
    """A rule for which query-key pairs count. Combine rules with `&`, `|` and `~`, nested as you like; on one
    side of `&` and `|` may stand a bool tensor or a keep function.

    `has_gaps` says that a key between two keys seen by a tile of rows may be seen by none of them; the kernel
    then keeps such a key's value, which may be NaN, out of its sums. Intervals whose ends rise by at most one
    key a row, as those of Causal, Window, Prefix and Padding do, leave no gaps, nor do their intersections.

    `has_holes` says that whole tiles between two tiles that a tile of rows needs may be empty, often enough
    that a list of the others is worth its making: coverage.py. The mask then has a `coverage`.
    """

    has_gaps = False
    has_holes = False

    def parts(self) -> tuple[Mask, ...]:
        """The rules that must all hold."""
        return (self,)

    def bind(self, shape: Shape) -> BoundMask:
        raise NotImplementedError(f"{type(self).__name__} defines no bind()")

    def bounds(self, shape: Shape) -> Bounds | None:
        """The interval of every row, in plain PyTorch. None: there is none, or only the device knows it.
        Reads the mask's tensors, so that the host waits for the GPU: tools ask for it, calls do not."""
        return None

    def twin(self, shape: Shape) -> Twin:
        """The same rule as f(batch, head, q_idx, kv_idx) -> bool tensor, in plain PyTorch."""
        raise NotImplementedError(f"{type(self).__name__} defines no twin()")

    def rules_out(self) -> bool:
        """Whether its interval or its coverage says of whole tiles that no pair counts there."""
        return True

    def leaves(self) -> tuple[Mask, ...]:
        return (self,)

    def __and__(self, other: Mask | torch.Tensor) -> Mask:
        return OPERATORS["&"](self, as_mask(other))

    def __rand__(self, other: torch.Tensor) -> Mask:
        return OPERATORS["&"](as_mask(other), self)

    def __or__(self, other: Mask | torch.Tensor) -> Mask:
        return OPERATORS["|"](self, as_mask(other))

    def __ror__(self, other: torch.Tensor) -> Mask:
        return OPERATORS["|"](as_mask(other), self)

    def __invert__(self) -> Mask:
        return OPERATORS["~"](self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{shortened(self)} is a mask and neither true nor false: in place of `and`, `or` and `not` "
            "write &, | and ~, and in place of `if mask` write `if mask is not None`"
        )


# What operators make of masks: algebra.py puts it here, and knows all of them.
OPERATORS: dict[str, Callable[..., Mask]] = {}
# What else a caller may give for a mask, and the mask that it means: the files of those masks add to it.
MEANINGS: list[tuple[type, Callable[[Any], Mask]]] = []


def as_mask(given: Any) -> Mask:
    """The mask that a caller means by a Mask, a bool tensor or a `@triton.jit` keep function."""
    if isinstance(given, Mask):
        return given
    for kind, mask in MEANINGS:
        if isinstance(given, kind):
            return mask(given)
    wanted = (
        f"mask={shortened(given)} must be a tilewise mask, a bool tensor or a @triton.jit function {KEEP}"
    )
    raise ValueError(with_hint(wanted, mask_hint(given)))
