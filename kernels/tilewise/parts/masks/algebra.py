"""Masks that are made of masks: what `&`, `|` and `~` build. combined.py has their device functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

import tilewise_reference.masks as dense

from ..bounds import Bounds
from ..shape import Shape
from .combined import (
    both,
    bounds_of_both,
    bounds_of_either,
    bounds_of_everything,
    bounds_of_opposite,
    bounds_within,
    either,
    limited,
    opposite,
)
from .mask import OPERATORS, BoundMask, Mask, Twin, as_mask


class Combined(Mask):
    """A mask whose parts are masks. Its tensors are theirs, each by its place: "masks[1].ids"."""

    FIELDS = ("masks",)
    masks: tuple[Mask, ...]

    def leaves(self) -> tuple[Mask, ...]:
        return tuple([leaf for mask in self.masks for leaf in mask.leaves()])

    def tensors(self) -> dict[str, torch.Tensor]:
        named = ((i, *item) for i, mask in enumerate(self.masks) for item in mask.tensors().items())
        return {f"masks[{i}].{name}": tensor for i, name, tensor in named}

    def called(self, name: str = "") -> str:
        """A tensor is called what it is called in its own part."""
        if not name:
            return repr(self)
        place, _, own = name.partition("].")
        return self.masks[int(place.removeprefix("masks["))].called(own)

    def misfits(self, shape: Shape) -> list[str]:
        return [f"{mask.called()}: {why}" for mask in self.masks for why in mask.misfits(shape)]

    def extents(self, shape: Shape) -> tuple[int, int]:
        q_lens, kv_lens = zip(*[mask.extents(shape) for mask in self.masks], strict=True)
        return min(q_lens), min(kv_lens)

    def looks(self) -> Any:
        return type(self), *[mask.looks() for mask in self.masks]

    def bounds_of_parts(self, shape: Shape) -> list[Bounds | None]:
        return [bounds_within(mask, shape) for mask in self.masks]


class All(Combined):
    """The pairs that every one of several masks keeps: what `a & b` builds. Kernels are given its parts, one
    by one; its own functions are asked where it stands inside another mask."""

    def __init__(self, *masks: Mask) -> None:
        self.masks = tuple([part for mask in masks for part in mask.parts()])

    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    @property
    def has_gaps(self) -> bool:  # type: ignore[override]
        return any([mask.has_gaps for mask in self.masks])

    @property
    def has_holes(self) -> bool:  # type: ignore[override]
        return any([mask.has_holes for mask in self.masks])

    def rules_out(self) -> bool:
        return any([mask.rules_out() for mask in self.masks])

    def bind(self, shape: Shape) -> BoundMask:
        return joined(both, self.masks, shape)

    def bounds(self, shape: Shape) -> Bounds | None:
        found = self.bounds_of_parts(shape)
        unknown = [
            bounds is None and mask.rules_out() for mask, bounds in zip(self.masks, found, strict=True)
        ]
        if any(unknown) or not self.rules_out():  # only the device knows, or there is none
            return None
        return reduce(bounds_of_both, [bounds or bounds_of_everything() for bounds in found])

    def twin(self, shape: Shape) -> Twin:
        return dense.all_of(*[mask.twin(shape) for mask in self.masks])

    def __repr__(self) -> str:
        return " & ".join([bracketed(mask, AnyOf) for mask in self.masks])


class AnyOf(Combined):
    """The pairs that at least one of several masks keeps: what `a | b` builds.

    masks: masks, bool tensors or `@triton.jit` keep functions. A row visits the hull of what its parts see.
    """

    has_gaps = True

    def __init__(self, *masks: Any) -> None:
        if not masks:
            raise ValueError("AnyOf() must have masks: AnyOf(a, b), which is a | b")
        self.masks = tuple([part for mask in masks for part in alternatives(as_mask(mask))])

    @property
    def has_holes(self) -> bool:  # type: ignore[override]
        """What one part sees may lie far from what another does, unless one sees every tile."""
        return self.rules_out()

    def rules_out(self) -> bool:
        return all([mask.rules_out() for mask in self.masks])

    def bind(self, shape: Shape) -> BoundMask:
        found = joined(either, self.masks, shape)
        return found if shape.is_dense else limited(found, self.extents(shape))

    def bounds(self, shape: Shape) -> Bounds | None:
        found = [bounds for bounds in self.bounds_of_parts(shape) if bounds is not None]
        return reduce(bounds_of_either, found) if len(found) == len(self.masks) else None

    def twin(self, shape: Shape) -> Twin:
        return dense.any_of(*[mask.twin(shape) for mask in self.masks])

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.masks))


class Not(Combined):
    """The pairs that a mask does not keep: what `~a` builds; `~~a` is a, and `~(a | b)` is `~a & ~b`.

    mask: a mask, a bool tensor or a `@triton.jit` keep function. Inside a function that torch.compile traces
    write Not(a): Dynamo does not trace `~` of an object. Where a row of it sees a prefix or a suffix
    of the keys and all of that, as under Causal, the rest is an interval; elsewhere a row visits everything.
    """

    has_gaps = True

    def __init__(self, mask: Any) -> None:
        self.masks = (alone(as_mask(mask)),)

    @property
    def mask(self) -> Mask:
        return self.masks[0]

    @property
    def has_holes(self) -> bool:  # type: ignore[override]
        return self.mask.has_holes

    def rules_out(self) -> bool:
        return self.mask.rules_out()

    def bind(self, shape: Shape) -> BoundMask:
        found = opposite(self.mask.bind(shape), shape)
        return found if shape.is_dense else limited(found, self.extents(shape))

    def bounds(self, shape: Shape) -> Bounds | None:
        found = self.bounds_of_parts(shape)[0]
        return None if found is None else bounds_of_opposite(found, shape.kv_len)

    def twin(self, shape: Shape) -> Twin:
        return dense.negated(self.mask.twin(shape))

    def __repr__(self) -> str:
        return f"~{bracketed(self.mask, All, AnyOf)}"


def joined(
    two: Callable[[BoundMask, BoundMask, Shape], BoundMask], masks: tuple[Mask, ...], shape: Shape
) -> BoundMask:
    return reduce(lambda a, b: two(a, b, shape), [mask.bind(shape) for mask in masks])


def alone(mask: Mask) -> Mask:
    """A mask as a part of another: `All` of one mask is that."""
    parts = mask.parts()
    return parts[0] if len(parts) == 1 else mask


def alternatives(mask: Mask) -> tuple[Mask, ...]:
    mask = alone(mask)
    return mask.masks if isinstance(mask, AnyOf) else (mask,)


def bracketed(mask: Mask, *weaker: type[Mask]) -> str:
    """A part as it is written beside an operator that binds stronger than those."""
    return f"({mask!r})" if isinstance(mask, weaker) else repr(mask)


def negated(mask: Mask) -> Mask:
    if isinstance(mask, Not):
        return mask.mask
    if isinstance(mask, AnyOf):
        return All(*[negated(part) for part in mask.masks])
    return Not(mask)


OPERATORS |= {"&": All, "|": AnyOf, "~": negated}
