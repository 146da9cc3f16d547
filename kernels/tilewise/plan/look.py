"""What a call looks like: everything that decides what the host does for it, and no tensor.

Two requests that look alike are answered by the same launches, at other addresses. `look` takes a request
apart as `encoding` does: by the fields of a Request, and by the FIELDS of masks and scores. So a field that
is added is in the look by itself. A part that holds more than its FIELDS say, or something that no look is
known of, has none; its call goes the long way.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

from ..parts.dropout import Dropout
from ..parts.fp8 import Scales
from ..parts.numerics import float32_precision
from ..parts.place import Place
from ..parts.plug import Plug
from ..parts.shape import Cache, Packing, Pages
from ..parts.similarity import Cosine
from . import tiles
from .request import Request

Tensor = torch.Tensor
PARTS = ("masks", "scores")
# In the order of `Request.other_tensors`.
FIELDS = tuple(each.name for each in dataclasses.fields(Request) if each.init and each.name not in PARTS)
fields_of = operator.attrgetter(*FIELDS)


# Hashable; and q, k, v and the other tensors, as `Request.other_tensors` has them.
Look = tuple[tuple[Any, ...], list[Tensor]]


class HasNoLookError(Exception):
    """There is something in a request that no look is known of."""


def look(request: Request, return_lse: bool) -> Look | None:
    """None where there is none."""
    words: list[Any] = [return_lse]
    tensors: list[Tensor] = []
    try:
        for value in fields_of(request):
            if value is None or value is False:
                words.append(value)
            else:
                PUT[type(value)](value, words, tensors)
        for part in request.plugs:  # a score is no mask, by its class
            put_part(part, words, tensors)
    except (KeyError, HasNoLookError):
        return None
    if torch.is_grad_enabled():
        words += [x.requires_grad for x in tensors]
    words += around()
    return tuple(words), tensors


def around() -> tuple[Any, ...]:
    """What the host's work depends on besides the request."""
    forced = tiles._forced
    return (
        tuple(forced.items()) if forced else None, tiles._walks, tiles.reloads, tiles.PROVEN,
        float32_precision(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def of_tensor(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def put_tensor(x: Tensor, words: list[Any], tensors: list[Tensor]) -> None:
    tensors.append(x)
    words += (x.shape, x.stride(), x.dtype, x.device)


def put_word(value: Any, words: list[Any], tensors: list[Tensor]) -> None:
    words.append(value)


def put_number(value: Any, words: list[Any], tensors: list[Tensor]) -> None:
    """1, 1.0 and True are equal, and so are 0.0 and -0.0; to a kernel they are not."""
    words += (type(value), value if value else repr(value))


def put_tuple(value: tuple[Any, ...], words: list[Any], tensors: list[Tensor]) -> None:
    words += (type(value), len(value))
    for each in value:
        put(each, words, tensors)


def put(value: Any, words: list[Any], tensors: list[Tensor]) -> None:
    how = PUT.get(type(value))
    if how is not None:
        how(value, words, tensors)
    elif isinstance(value, KernelInterface):
        words.append(value)
    elif isinstance(value, Plug):
        put_part(value, words, tensors)
    else:
        raise HasNoLookError


def put_part(part: Plug, words: list[Any], tensors: list[Tensor]) -> None:
    """A mask, which may be made of masks, or a score. `_twin` is asked by plain PyTorch alone."""
    kind, holds = type(part), part.__dict__
    words.append(kind)
    if len(holds) != len(kind.FIELDS) + ("_twin" in holds):
        raise HasNoLookError
    for name in kind.FIELDS:
        value = holds[name]
        if value is None:
            words.append(value)
        else:
            put(value, words, tensors)


PUT: dict[type, Callable[[Any, list[Any], list[Tensor]], None]] = {
    Tensor: put_tensor, torch.nn.Parameter: put_tensor,
    type(None): put_word, str: put_word, bool: put_number, int: put_number, float: put_number,
    tuple: put_tuple, Cosine: put_tuple, Dropout: put_tuple, Packing: put_tuple, Cache: put_tuple,
    Pages: put_tuple, Place: put_tuple, Scales: put_tuple, torch.dtype: put_word,
}  # fmt: skip
