"""Rules on caches: lengths, pages, splits, and what is written into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...parts.rotary import RotaryTable
from ...parts.shape import INTS, computed_in
from ..request import Request
from . import sharding

Tensor = torch.Tensor


def lengths_fit(r: Request) -> str | None:
    if r.cache is None:
        return None
    given, batch = r.cache.kv_lens, r.shape.batch
    if not isinstance(given, Tensor) or given.dtype not in INTS:
        what = given.dtype if isinstance(given, Tensor) else repr(given)
        return f"kv_lens={what} must be a tensor of dtype torch.int32 or torch.int64"
    if tuple(given.shape) != (batch,):
        return f"kv_lens.shape={tuple(given.shape)} must be [batch] = [{batch}]"
    return None


def pages_fit(r: Request) -> str | None:
    if r.cache is None or r.cache.pages is None:
        return None
    table, page_size, count = r.cache.pages
    if table.dtype not in INTS:
        return f"pages.dtype={table.dtype} must be torch.int32 or torch.int64"
    if table.shape[0] != r.shape.batch:
        return f"pages.shape={tuple(table.shape)} must be [batch, max_pages], with {r.shape.batch} for batch"
    if page_size < 1 or count < 1:
        return f"the cache has {count} pages of {page_size} rows, and must have one of one at least"
    return None


def split_size_fits(r: Request) -> str | None:
    size = None if r.cache is None else r.cache.split_size
    if size is None or (isinstance(size, int) and size >= 16 and size % 16 == 0):
        return None
    return f"split_size={size!r} must be None (as suits the chip) or a multiple of 16, in keys"


def cache_has_no_gradient(r: Request) -> str | None:
    if r.cache is None or not r.needs_gradient:
        return None
    named = [*r.qkv().items(), *r.other_tensors]
    name = next(name for name, tensor in named if tensor.requires_grad)
    name = {"k": "cache_k", "v": "cache_v"}.get(name, name)
    return no_gradient(name)


def no_gradient(name: str) -> str:
    return (
        f"{name} requires a gradient, and cached_attention has none: use torch.no_grad(), or attention or "
        "packed_attention to train"
    )


def new_misfits(r: Request, new_k: Any, new_v: Any, rotary: RotaryTable | None) -> Iterator[str]:
    """What is wrong with the keys and values that are to be written into the cache of a request."""
    yield from rotary_misfits(r, rotary)
    if new_k is None and new_v is None:
        return
    shape = r.shape
    for name, new, cache in (("new_k", new_k, r.k), ("new_v", new_v, r.v)):
        if not isinstance(new, Tensor):
            yield f"{name}={new!r} must be a tensor: new_k and new_v come together"
            return
        packed = r.packing is not None
        rows = shape.q_len if packed else (new_k.shape[2] if new_k.dim() == 4 else "new_len")
        wanted: tuple[Any, ...] = (shape.batch, shape.kv_heads, rows, cache.shape[3])
        if packed:
            wanted = (rows, shape.kv_heads, cache.shape[3])
        if tuple(new.shape) != wanted:
            yield f"{name}.shape={tuple(new.shape)} must be [{', '.join(map(str, wanted))}]"
        yield from sharding.new_misfits(r, name, new, cache)
        if new.dtype != cache.dtype or new.device != cache.device:
            yield f"{name} is {new.dtype} on {new.device}, the cache {cache.dtype} on {cache.device}"
        if new.requires_grad and torch.is_grad_enabled():
            yield no_gradient(name)


def rotary_misfits(r: Request, rotary: RotaryTable | None) -> Iterator[str]:
    if rotary is None:
        return
    if not isinstance(rotary, RotaryTable):
        yield f"rotary={rotary!r} must be what Rotary.table(positions) gives"
        return
    positions, pairs = rotary.cos.shape
    if 2 * pairs > r.shape.head_dim:
        yield f"rotary turns {2 * pairs} dimensions, and head_dim={r.shape.head_dim}"
    if positions < r.shape.kv_len:
        room = r.shape.kv_len
        yield f"rotary has {positions} positions, and the cache room for {room}: give table({room})"
    in_double = r.q.dtype == torch.float64
    if rotary.cos.dtype != computed_in(r.q.dtype) and (in_double or rotary.cos.dtype == torch.float64):
        wanted = computed_in(r.q.dtype)
        yield f"rotary is in {rotary.cos.dtype}, q in {r.q.dtype}: give a table in {wanted}"
    if rotary.cos.device != r.q.device:
        yield f"rotary is on {rotary.cos.device}, q on {r.q.device}: move it with .to(q.device)"
