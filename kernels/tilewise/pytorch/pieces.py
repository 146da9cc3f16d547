"""A call on packed sequences or a cache as one call a sequence: how plain PyTorch answers it.

The host reads offsets and lengths for it, which waits for a GPU; so here bad ones are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..parts.shape import Cache, Packing, computed_in
from ..plan.request import Request
from .dequantized import own_scales

Tensor = torch.Tensor
Answer = Callable[[Request, int], tuple[Tensor, Tensor]]


def by_sequence(request: Request, answer: Answer) -> tuple[Tensor, Tensor]:
    """out [blocks, q_heads, rows, value_dim] and lse [blocks, q_heads, rows] of a request. `answer` is given
    the request that is left of each sequence, a batch of 1, and the sequence's number. Rows of no sequence
    give 0 and -inf."""
    shape = request.shape
    results = []
    for batch, one in enumerate(sequences(request)):
        check_extents(request, one.q.shape[2], one.k.shape[2], batch)
        results.append(answer(one, batch))
    if request.packing is None:
        return join(results, 0, request)
    before, behind = int(request.packing.q_offsets[0]), shape.q_len - int(request.packing.q_offsets[-1])
    return join([nothing(request, results, before), *results, nothing(request, results, behind)], 2, request)


def join(results: list[tuple[Tensor, Tensor]], axis: int, request: Request) -> tuple[Tensor, Tensor]:
    if not results:  # a batch of 0
        sizes = request.q.shape[:3]
        lse = request.q.new_zeros(sizes, dtype=computed_in(request.q.dtype))
        return lse.new_zeros(*sizes, request.shape.value_dim), lse
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=axis), torch.cat(lses, dim=axis)


def nothing(request: Request, like: list[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """What rows of no sequence give."""
    out, lse = like[0]
    sizes = (1, request.shape.q_heads, rows)
    return out.new_zeros(*sizes, request.shape.value_dim), lse.new_full(sizes, -torch.inf)


def sequences(request: Request) -> Iterator[Request]:
    """The dense request that is left of each sequence. Raises ValueError for offsets, lengths or pages that
    lead out of the tensors."""
    packing, cache, shape = request.packing, request.cache, request.shape
    q_starts = kv_starts = None
    if packing is not None:
        kv_rows = shape.kv_len if cache is None else None
        reasons = offset_errors(packing, shape.q_len, kv_rows)
        if reasons:
            raise ValueError("; ".join(reasons))
        q_starts, kv_starts = (offsets.tolist() for offsets in packing.offsets())
    for batch in range(shape.batch):
        own_q = partial(rows_of_sequence, starts=q_starts, batch=batch)
        own_kv = partial(rows_of_sequence, starts=kv_starts, batch=batch)
        if cache is not None:
            own_kv = partial(filled, cache=cache, batch=batch, capacity=shape.kv_len)
        q, k, v = own_q(request.q), own_kv(request.k), own_kv(request.v)
        scales = own_scales(request, batch, (own_q, own_kv, own_kv))
        place = None
        if request.place is not None:  # the part has some heads of each sequence, and all of its rows
            place = request.place._replace(q_len=q.shape[2], kv_len=k.shape[2])
        yield replace(request, q=q, k=k, v=v, packing=None, cache=None, place=place, scales=scales)


def rows_of_sequence(x: Tensor, starts: list[int] | None, batch: int) -> Tensor:
    """The rows of a sequence, [1, heads, rows, dim], of x, whose rows are packed if there are starts."""
    return x[batch : batch + 1] if starts is None else x[:, :, starts[batch] : starts[batch + 1]]


def filled(x: Tensor, cache: Cache, batch: int, capacity: int) -> Tensor:
    """What a sequence has in a cache, [1, kv_heads, kv_len, dim]."""
    length = int(cache.kv_lens[batch])
    if not 0 <= length <= capacity:
        raise ValueError(f"kv_lens[{batch}]={length} must be from 0 to the cache's capacity, {capacity}")
    if cache.pages is None:
        return x[batch : batch + 1, :, :length]
    table, size, count = cache.pages
    pages = table[batch, : -(-length // size)].long()
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < count:
        raise ValueError(f"pages[{batch}]={pages.tolist()} must be from 0 to {count - 1}")
    return x[pages].transpose(0, 1).flatten(1, 2)[None, :, :length]


def filled_rows(cache: Cache, batch: int, first: int, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows first .. first + count - 1 of a sequence are in x [blocks, heads, rows, dim]: the block and
    the row of each that there is room for."""
    capacity = x.shape[2] if cache.pages is None else cache.pages.table.shape[1] * cache.pages.page_size
    row = torch.arange(first, max(first, min(first + count, capacity)), device=x.device)
    if cache.pages is None:
        return torch.full_like(row, batch), row
    table, size, _ = cache.pages
    return table[batch].long()[row // size], row % size


def check_extents(request: Request, q_len: int, kv_len: int, batch: int) -> None:
    """Raise ValueError for a mask or score whose tensor is shorter than the sequence."""
    for part in request.plugs:
        q_extent, kv_extent = part.extents(request.whole)
        if q_len > q_extent or kv_len > kv_extent:
            raise ValueError(
                f"{part.called()} has tensors for {q_extent} queries and {kv_extent} keys, and sequence "
                f"{batch} has {q_len} and {kv_len}: they must be as long as the longest sequence"
            )


def offset_errors(packing: Packing, q_rows: int, kv_rows: int | None = None) -> list[str]:
    """What is wrong with the offsets of tensors of q_rows and kv_rows (None: as many) tokens."""
    found = []
    named = {"q_offsets": (packing.q_offsets, q_rows)}
    if packing.kv_offsets is not None:
        named["kv_offsets"] = (packing.kv_offsets, q_rows if kv_rows is None else kv_rows)
    for name, (offsets, rows) in named.items():
        starts: list[int] = offsets.tolist()
        falls = [i for i in range(1, len(starts)) if starts[i] < starts[i - 1]]
        if falls:
            i = falls[0]
            found.append(
                f"{name}[{i}]={starts[i]} is below {name}[{i - 1}]={starts[i - 1]}: offsets must not decrease"
            )
        outside = [i for i, start in enumerate(starts) if not 0 <= start <= rows]
        if outside:
            i = outside[0]
            found.append(f"{name}[{i}]={starts[i]} is outside the {rows} tokens of the tensor")
    return found
