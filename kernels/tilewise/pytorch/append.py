"""Into a cache: the library ops `tilewise::append_to_cache` and `tilewise::turn_queries`, and plain PyTorch.

A graph sees that the first changes the cache; its other results come back as tensors of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..kernels.append import launch_append, launch_turn
from ..parts.rotary import RotaryTable
from ..parts.shape import Cache, Packing, Pages, computed_in
from ..plan.implementation import implementation
from ..plan.request import Request
from .ops import library
from .pieces import filled_rows
from .replayed import repeat

Tensor = torch.Tensor
WHERE = "Tensor kv_lens, Tensor? pages, Tensor? q_offsets"
TABLE = "bool interleaved, str impl"
library.define(
    f"append_to_cache(Tensor(a!) k, Tensor(b!) v, Tensor new_k, Tensor new_v, {WHERE}, Tensor? cos, "
    f"Tensor? sin, {TABLE}) -> ()"
)
library.define(f"turn_queries(Tensor q, Tensor k, {WHERE}, Tensor cos, Tensor sin, {TABLE}) -> Tensor")


def append(request: Request, new_k: Tensor, new_v: Tensor, rotary: RotaryTable | None) -> Request:
    """Write new_k and new_v [blocks, kv_heads, rows, dim] behind what the request's cache holds; the request
    after that."""
    cache = request.cache
    assert cache is not None
    cos, sin, interleaved = (None, None, False) if rotary is None else rotary
    given = (*where(request), cos, sin, interleaved, implementation(request))
    call = torch.ops.tilewise.append_to_cache if torch.compiler.is_compiling() else append_to_cache
    call(request.k, request.v, new_k, new_v, *given)
    return replace(request, cache=cache._replace(kv_lens=lengths_after(request, new_k)))


def lengths_after(request: Request, new_k: Tensor) -> Tensor:
    """kv_lens once new_k [blocks, kv_heads, rows, head_dim] is in the cache."""
    cache, packing = request.cache, request.packing
    assert cache is not None
    added: Any = new_k.shape[2] if packing is None else packing.q_offsets.diff()
    return (cache.kv_lens + added).to(cache.kv_lens.dtype)


def turn_queries(request: Request, rotary: RotaryTable) -> Request:
    """The request with its queries turned by their positions: the last stands at the last key."""
    given = (*where(request), *rotary, implementation(request))
    call = torch.ops.tilewise.turn_queries if torch.compiler.is_compiling() else turned_queries
    return replace(request, q=call(request.q, request.k, *given))


def where(request: Request) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the ops take to know where rows are: kv_lens, pages and q_offsets."""
    cache, packing = request.cache, request.packing
    assert cache is not None
    table = None if cache.pages is None else cache.pages.table
    return cache.kv_lens, table, None if packing is None else packing.q_offsets


def places(
    k: Tensor, kv_lens: Tensor, table: Tensor | None, q_offsets: Tensor | None
) -> tuple[Packing | None, Cache]:
    pages = None if table is None else Pages(table, k.shape[2], k.shape[0])
    return None if q_offsets is None else Packing(q_offsets, None), Cache(kv_lens, pages)


def append_to_cache(
    k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, kv_lens: Tensor, table: Tensor | None,
    q_offsets: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool, impl: str,
) -> None:  # fmt: skip
    if impl != "torch":
        repeat(append_step, (k, v, new_k, new_v, kv_lens, table, q_offsets, cos, sin), interleaved)
        return
    _, cache = places(k, kv_lens, table, q_offsets)
    rotary = rotary_of(interleaved, cos, sin)
    for batch, rows in enumerate(rows_of_sequences(new_k, q_offsets)):
        ones_k, ones_v = new_k[rows], new_v[rows]
        length, count = int(kv_lens[batch]), ones_k.shape[2]
        if rotary is not None:
            ones_k = turned(ones_k, torch.arange(length, length + count, device=k.device), rotary)
        block, row = filled_rows(cache, batch, length, count, k)
        for x, ones in ((k, ones_k), (v, ones_v)):
            x.transpose(1, 2)[block, row] = ones[0, :, : len(row)].transpose(0, 1).to(x.dtype)


def append_step(
    interleaved: bool, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, kv_lens: Tensor,
    table: Tensor | None, q_offsets: Tensor | None, cos: Tensor | None, sin: Tensor | None,
) -> tuple[()]:  # fmt: skip
    """What the kernel does, to be repeated."""
    packing, cache = places(k, kv_lens, table, q_offsets)
    launch_append(new_k, new_v, k, v, packing, cache, rotary_of(interleaved, cos, sin))
    return ()


def rotary_of(interleaved: bool, cos: Tensor | None, sin: Tensor | None) -> RotaryTable | None:
    return None if cos is None or sin is None else RotaryTable(cos, sin, interleaved)


def turn_step(
    interleaved: bool, q: Tensor, k: Tensor, kv_lens: Tensor, table: Tensor | None,
    q_offsets: Tensor | None, cos: Tensor, sin: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    """The same of `turn_queries`."""
    packing, cache = places(k, kv_lens, table, q_offsets)
    out = torch.empty_like(q)
    launch_turn(q, out, k, packing, cache, RotaryTable(cos, sin, interleaved))
    return (out,)


def turned_queries(
    q: Tensor, k: Tensor, kv_lens: Tensor, table: Tensor | None, q_offsets: Tensor | None, cos: Tensor,
    sin: Tensor, interleaved: bool, impl: str,
) -> Tensor:  # fmt: skip
    if impl != "torch":
        (turned_q,) = repeat(turn_step, (q, k, kv_lens, table, q_offsets, cos, sin), interleaved)
        assert turned_q is not None
        return turned_q
    rotary, out = RotaryTable(cos, sin, interleaved), q.clone()
    for batch, rows in enumerate(rows_of_sequences(q, q_offsets)):
        one = q[rows]
        first = int(kv_lens[batch]) - one.shape[2]
        position = torch.arange(first, first + one.shape[2], device=q.device).clamp(min=0)
        out[rows] = turned(one, position, rotary)
    return out


def rows_of_sequences(x: Tensor, q_offsets: Tensor | None) -> list[tuple[slice, ...]]:
    """Where the rows of each sequence are in x [blocks, heads, rows, dim]."""
    everything = slice(None)
    if q_offsets is None:
        return [(slice(batch, batch + 1),) for batch in range(x.shape[0])]
    starts = q_offsets.tolist()
    return [(everything, everything, slice(*starts[b : b + 2])) for b in range(len(starts) - 1)]


def turned(x: Tensor, position: Tensor, rotary: RotaryTable) -> Tensor:
    """x [1, heads, rows, dim] turned by the positions [rows], in x's dtype, by way of fp32 (fp64)."""
    position = position.clamp(max=rotary.cos.shape[0] - 1)
    cos, sin = rotary.cos[position], rotary.sin[position]
    pairs = cos.shape[1]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    sizes, axis = ((pairs, 2), -1) if rotary.is_interleaved else ((2, pairs), -2)
    a, b = turning.to(computed_in(x.dtype)).unflatten(-1, sizes).unbind(axis)
    both = torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2)
    return torch.cat((both.to(x.dtype), rest), -1)


for key in ("CPU", "CUDA"):
    library.impl("append_to_cache", append_to_cache, key)
    library.impl("turn_queries", turned_queries, key)
torch.library.register_fake("tilewise::append_to_cache", lambda *_: None, lib=library)
torch.library.register_fake("tilewise::turn_queries", lambda q, *_: torch.empty_like(q), lib=library)
