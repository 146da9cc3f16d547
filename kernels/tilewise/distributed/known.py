"""Blocks that were found before: every layer of a model asks for the same ones, each step anew."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch

from ..parts.shape import Shape
from ..plan.look import HasNoLookError, put_part
from ..plan.request import Request
from .blocks import Blocks, blocks_of
from .order import Order

KEPT = 64
Seen = list[tuple["weakref.ref[torch.Tensor]", int]]  # a mask's tensors, and how often they had been changed
_known: OrderedDict[Any, tuple[Seen, Blocks]] = OrderedDict()


def known_blocks(request: Request, shape: Shape, q_order: Order, kv_order: Order) -> Blocks:
    """`blocks_of` the request's masks; tensors that are the same, and unchanged, are not read again."""
    words: list[Any] = []
    tensors: list[torch.Tensor] = []
    try:
        for mask in request.masks:
            put_part(mask, words, tensors)
        versions = [x._version for x in tensors]
    except (HasNoLookError, RuntimeError):  # something else in a mask; a tensor made in inference mode
        return blocks_of(request.masks, shape, q_order, kv_order)
    key = tuple(words), tuple([id(x) for x in tensors]), shape[:5], q_order, kv_order
    if key in _known:
        seen, blocks = _known[key]
        if all(ref() is x and v == now for (ref, v), x, now in zip(seen, tensors, versions, strict=True)):
            _known.move_to_end(key)
            return blocks
    blocks = blocks_of(request.masks, shape, q_order, kv_order)
    _known[key] = [(weakref.ref(x), v) for x, v in zip(tensors, versions, strict=True)], blocks
    if len(_known) > KEPT:
        _known.popitem(last=False)
    return blocks
