"""The cosine as a dot product, where it is derived twice: of unit rows, which are derived in PyTorch.

    x̂ = x / |x|        |x| never less than ε: similarity.py
    J(x) g  = (g - x̂ (x̂ · g)) / |x|        the tangent of x̂ along g, and the gradient in x of g at x̂

Kernels see x̂ in fp32. With J's own tangent along ẋ, J(x) g is derived once more for a g that stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from ..parts.similarity import EPSILON, Cosine, Scale
from .request import Request

Tensor = torch.Tensor
T = TypeVar("T")


class Dots(NamedTuple):
    """The request of dot products, and the place in its `other_tensors` of each of the cosine's."""

    request: Request
    places: list[int]


def is_cosine(request: Request) -> bool:
    return request.similarity == "cosine" or isinstance(request.similarity, Cosine)


def as_dots(request: Request) -> Dots:
    """The same call, of unit rows in fp32. A scale and a temperature are its first modifiers."""
    similarity = request.similarity
    factors: dict[str, float | Tensor] = {}
    if request.scale is not None:
        factors["scale"] = request.scale
    if isinstance(similarity, Cosine):
        factors["temperature"] = similarity.temperature
        refuse_part(similarity.temperature, request)
    scores = tuple([Scale(name, factor) for name, factor in factors.items()])
    q, k = unit_rows(request.q), unit_rows(request.k)
    dots = replace(
        request, q=q, k=k, v=request.v.float(), similarity="dot", scale=None, impl="portable",
        scores=(*scores, *request.scores),
    )  # fmt: skip
    own = [name for name, factor in factors.items() if isinstance(factor, Tensor)]
    count = len(request.other_tensors)
    behind = sum([len(score.tensors()) for score in request.scores])
    # The cosine's factors come first of all; here they come right before the callers' modifiers.
    first = count - behind - len(own)
    places = [*range(first, first + len(own)), *range(first), *range(count - behind, count)]
    return Dots(dots, places)


def unit_rows(x: Tensor) -> Tensor:
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPSILON.value)


def refuse_part(temperature: float | Tensor, request: Request) -> None:
    """Raise where the call has some of the heads that masks and scores count, and a temperature for each."""
    place, heads = request.place, request.q.shape[1]
    if isinstance(temperature, Tensor) and place is not None and place.q_heads != heads:
        raise NotImplementedError(
            f"temperature {tuple(temperature.shape)}, one a head, has no second derivative where {heads} of "
            f"{place.q_heads} heads are here: give a number, or impl='torch'"
        )


def in_places(dots: Dots, given: Sequence[T]) -> list[T]:
    """Something of each of the cosine's other tensors, in the order of the dot products'."""
    found = dict(zip(dots.places, given, strict=True))
    return [found[place] for place in range(len(dots.places))]


class Rows(NamedTuple):
    """Rows x: their directions [.., dim], 1 / |x| [.., 1], and which are longer than ε."""

    unit: Tensor
    inverse: Tensor
    are_long: Tensor


def rows_of(x: Tensor, seen: Tensor) -> Rows:
    """seen: something with rows like x's; a row of zeros there says that nobody looks at x's, which may be
    NaN."""
    x = torch.where((seen != 0).any(-1, keepdim=True), x.float(), 0.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = length.clamp_min(EPSILON.value).reciprocal()
    return Rows(x * inverse, inverse, length > EPSILON.value)


def orthogonal(rows: Rows, g: Tensor) -> Tensor:
    """J(x) g."""
    along = torch.where(rows.are_long, (rows.unit * g).sum(-1, keepdim=True), 0.0)
    return (g - along * rows.unit) * rows.inverse


def orthogonal_tangent(rows: Rows, g: Tensor, x_dot: Tensor) -> Tensor:
    """The tangent of J(x) g along ẋ: of 1 / |x|, of x̂ · g and of x̂; rows of at most ε are divided by ε."""
    unit, inverse, are_long = rows
    unit_dot = orthogonal(rows, x_dot)
    along, along_dot = ((u * g).sum(-1, keepdim=True) for u in (unit, unit_dot))
    shrinks = (unit * x_dot).sum(-1, keepdim=True) * inverse
    moved = -shrinks * (g - along * unit) - along_dot * unit - along * unit_dot
    return torch.where(are_long, moved * inverse, 0.0)
