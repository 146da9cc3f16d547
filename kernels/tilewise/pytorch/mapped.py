"""torch.vmap over attention and its derivatives: many calls as one.

A mapped dimension is folded into batch: m calls of b sequences are one of m · b, of which masks, scores and
dropout are asked as if the same b sequences came again and again (`Place.period`). Tensors that are not
mapped are the same for all: they are repeated, but those of masks and scores are not.

Where that is not what was asked, the calls are made one after another: mapped tensors of masks and scores,
gradients of scores' parameters (each call's own), packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..parts.place import Place
from ..plan.request import Request
from .encoding import Encoded, decode, encode

Tensor = torch.Tensor
Words = tuple[Any, ...]
Dims = Sequence[Any]


def forward(
    function: Any, size: int, dims: Dims, q: Tensor, k: Tensor, v: Tensor, words: Words, *tensors: Tensor
) -> Any:
    if not can_fold((q, k, v), dims, words, tensors, dims[4:]):
        return one_by_one(function, size, dims, (q, k, v, words, *tensors))
    given, words, others = repeated((q, k, v), dims, size, words, tensors)
    out, lse, statistics = function.apply(*given, words, *others)
    return (unfolded(out, size), unfolded(lse, size), unfolded(statistics, size, 1)), (0, 0, 1)


def backward(function: Any, size: int, dims: Dims, words: Words, *given: Any) -> Any:
    """given: do, dlse, and what was saved."""
    words, needs = words[:-1], words[-1]
    if any(needs[:3]) and any(needs[3:]):
        return in_two(backward, function, size, dims, words, needs, given)
    if any(needs[3:]) or not saved_can_fold(dims[3:], words, given[2:]):
        return one_by_one(function, size, dims, ((*words, needs), *given))
    do, dlse = (folded(x, dim, size) for x, dim in zip(given[:2], dims[1:3], strict=True))
    words, *saved = folded_saved(dims[3:], size, words, given[2:])
    return all_unfolded(function.apply((*words, needs), do, dlse, *saved), size)


def tangent(function: Any, size: int, dims: Dims, words: Words, *given: Any) -> Any:
    """given: what was saved, and tangents."""
    count = (len(given) + 2) // 2
    saved, u, saved_dims, u_dims = given[:count], given[count:], dims[1 : 1 + count], dims[1 + count :]
    if any_mapped(u_dims[3:]) or not saved_can_fold(saved_dims, words, saved):
        return one_by_one(function, size, dims, (words, *given))
    words, *saved = folded_saved(saved_dims, size, words, saved)
    u = (*[folded(x, dim, size) for x, dim in zip(u[:3], u_dims, strict=False)], *u[3:])
    out, lse = function.apply(words, *saved, *u)
    return (unfolded(out, size), unfolded(lse, size)), (0, 0)


def second(function: Any, size: int, dims: Dims, words: Words, *given: Any) -> Any:
    """given: do, dlse, the tangent of lse, what was saved, and tangents."""
    words, needs = words[:-1], words[-1]
    if any(needs[:3]) and any(needs[3:]):
        return in_two(second, function, size, dims, words, needs, given)
    count = (len(given) - 3 + 2) // 2
    arrived, saved, u = given[:3], given[3 : 3 + count], given[3 + count :]
    saved_dims, u_dims = dims[4 : 4 + count], dims[4 + count :]
    if any(needs[3:]) or any_mapped(u_dims[3:]) or not saved_can_fold(saved_dims, words, saved):
        return one_by_one(function, size, dims, ((*words, needs), *given))
    arrived = tuple([folded(x, dim, size) for x, dim in zip(arrived, dims[1:4], strict=True)])
    words, *saved = folded_saved(saved_dims, size, words, saved)
    u = (*[folded(x, dim, size) for x, dim in zip(u[:3], u_dims, strict=False)], *u[3:])
    return all_unfolded(function.apply((*words, needs), *arrived, *saved, *u), size)


def in_two(
    rule: Any, function: Any, size: int, dims: Dims, words: Words, needs: list[bool], given: Sequence[Any]
) -> Any:
    """The gradients of q, k and v, of all calls at once, and then those of the other tensors, of each."""
    some, some_dims = rule(function, size, dims, (*words, needs[:3] + [False] * len(needs[3:])), *given)
    more, more_dims = rule(function, size, dims, (*words, [False] * 3 + needs[3:]), *given)
    return (*some, *more), (*some_dims, *more_dims)


def all_unfolded(grads: Sequence[Tensor], size: int) -> Any:
    return tuple([unfolded(x, size) for x in grads]), (0,) * len(grads)


# ---- Folding


def any_mapped(dims: Dims) -> bool:
    return any([dim is not None for dim in dims])


def saved_can_fold(dims: Dims, words: Words, saved: Sequence[Any]) -> bool:
    return can_fold(saved[:3], dims, words, saved[5:], dims[5:])


def can_fold(
    qkv: Sequence[Tensor], dims: Dims, words: Words, tensors: Sequence[Tensor], other_dims: Dims
) -> bool:
    """Whether calls that share all tensors but q, k and v are one call of more sequences."""
    return not any_mapped(other_dims) and one_of(qkv, dims, words, tensors).shape.is_dense


def one_of(qkv: Sequence[Tensor], dims: Dims, words: Words, tensors: Sequence[Tensor]) -> Request:
    """The request of one of the calls."""
    q, k, v = (selected(x, dim, 0) for x, dim in zip(qkv, dims, strict=False))
    return decode(q, k, v, Encoded(list(tensors), *words))


def repeated(
    qkv: Sequence[Tensor], dims: Dims, size: int, words: Words, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Words, list[Tensor]]:
    """q, k and v of all calls, and the words and other tensors of their request."""
    request = one_of(qkv, dims, words, tensors)
    shape, place = request.shape, request.place
    if place is None:
        place = Place(shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len)
    if not place.period:
        place = place._replace(period=shape.batch)
    q, k, v = given = [repeated_rows(x, dim, size) for x, dim in zip(qkv, dims, strict=False)]
    encoded = encode(replace(request, q=q, k=k, v=v, place=place))
    return given, encoded[1:], encoded.tensors


def folded_saved(dims: Dims, size: int, words: Words, saved: Sequence[Any]) -> Any:
    """Words and what was saved of all calls."""
    given, words, others = repeated(saved[:3], dims, size, words, saved[5:])
    results = folded(saved[3], dims[3], size), folded(saved[4], dims[4], size, 1)
    return words, *given, *results, *others


def folded(x: Tensor | None, dim: int | None, size: int, axis: int = 0) -> Tensor | None:
    return None if x is None else repeated_rows(x, dim, size, axis)


def repeated_rows(x: Tensor, dim: int | None, size: int, axis: int = 0) -> Tensor:
    """x of all calls, as one with more along `axis`; x that is not mapped, once for each."""
    x = (
        x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
        if dim is None
        else x.movedim(dim, axis)
    )
    return x.flatten(axis, axis + 1)


def unfolded(x: Tensor, size: int, axis: int = 0) -> Tensor:
    return x.unflatten(axis, (size, x.shape[axis] // size))


# ---- One call after another


def selected(x: Any, dim: int | None, i: int) -> Any:
    return x if dim is None else x.select(dim, i)


def one_by_one(function: Any, size: int, dims: Dims, given: Sequence[Any]) -> Any:
    found = [
        function.apply(*[selected(x, dim, i) for x, dim in zip(given, flat(dims, given), strict=True)])
        for i in range(size)
    ]
    return tuple([torch.stack(parts) for parts in zip(*found, strict=True)]), (0,) * len(found[0])


def flat(dims: Dims, given: Sequence[Any]) -> list[int | None]:
    """The dimension of each tensor; what is none has none, whatever PyTorch says of its structure."""
    return [dim if isinstance(x, Tensor) else None for x, dim in zip(given, dims, strict=True)]
