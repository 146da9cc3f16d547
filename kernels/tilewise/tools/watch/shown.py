"""What of a call is shown: one sequence, one head of queries, and of each tensor their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...parts.shape import Pages
from ...plan.request import Request

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shown:
    """A sequence of the batch and a head of queries. Where a call has a cache, the forward's tiles hold the
    rows of all heads of a group, and all of them are shown: row r is query r div group of its head r mod
    group."""

    batch: int
    head: int
    group: int  # query heads that share a head of keys
    is_grouped: bool
    q_first: int  # the place of the sequence's rows among those of all
    q_len: int
    kv_first: int
    kv_len: int
    head_dim: int
    value_dim: int
    q_heads: int
    q_rows: int  # of all sequences
    is_packed: bool

    @property
    def kv_head(self) -> int:
        return self.head // self.group

    @property
    def heads(self) -> range:
        """Of queries."""
        first = self.kv_head * self.group
        return range(first, first + self.group) if self.is_grouped else range(self.head, self.head + 1)

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows and keys that are shown."""
        return self.q_len * len(self.heads), self.kv_len

    @property
    def merged_rows(self) -> list[int]:
        """The rows that are shown, as the kernel that merges splits counts those of all: by heads."""
        block = 0 if self.is_packed else self.batch
        return [
            (block * self.q_heads + head) * self.q_rows + self.q_first + row
            for head in self.heads
            for row in range(self.q_len)
        ]

    def by_heads(self, rows: Tensor) -> Tensor:
        """Of what is shown, first all rows of the first head."""
        return rows.unflatten(0, (self.q_len, len(self.heads))).transpose(0, 1).flatten(0, 1)


def shown_of(request: Request, batch: int, head: int) -> Shown:
    """Raises ValueError where the call has no such sequence or head."""
    shape, packing, cache = request.shape, request.packing, request.cache
    for name, given, count in (("batch", batch, shape.batch), ("head", head, shape.q_heads)):
        if not 0 <= given < count:
            raise ValueError(f"{name}={given} must be from 0 to {count - 1}: the call has {count}")
    q_first, q_len, kv_first, kv_len = 0, shape.q_len, 0, shape.kv_len
    if packing is not None:
        (q_first, q_len), of_keys = (_sequence(offsets, batch) for offsets in packing.offsets())
        if cache is None:
            kv_first, kv_len = of_keys
    if cache is not None:
        kv_len = int(cache.kv_lens[batch])
    if 0 in (q_len, kv_len):
        raise ValueError(f"{q_len=} and {kv_len=} of batch={batch}: there must be a row and a key to watch")
    return Shown(
        batch, head, shape.group, cache is not None, q_first, q_len, kv_first, kv_len, shape.head_dim,
        shape.value_dim, shape.q_heads, request.q.shape[2], packing is not None,
    )  # fmt: skip


def _sequence(offsets: Tensor, batch: int) -> tuple[int, int]:
    first, stop = offsets[batch : batch + 2].tolist()
    return first, stop - first


def _in_pages(pages: Pages, shown: Shown) -> tuple[Tensor, Tensor]:
    """The page of each key that is shown, and its place there."""
    key = torch.arange(shown.kv_len)
    return pages.table[shown.batch].long()[key // pages.page_size], key % pages.page_size


def query_rows(x: Tensor, shown: Shown) -> Tensor:
    """Of a tensor [batch, q_heads, rows, dim] or, of a number a row, [batch, q_heads, rows]: what is shown,
    [rows, dim] or [rows]."""
    rows = x[
        0 if shown.is_packed else shown.batch, list(shown.heads), shown.q_first : shown.q_first + shown.q_len
    ]
    return rows.transpose(0, 1).flatten(0, 1)


def key_rows(x: Tensor, shown: Shown, request: Request) -> Tensor:
    """The same of one along keys, [kv_len, dim]; a cache's pages are put together."""
    if request.cache is not None and request.cache.pages is not None:
        page, place = _in_pages(request.cache.pages, shown)
        return x[page, shown.kv_head, place]
    batch = 0 if request.packing is not None and request.cache is None else shown.batch
    return x[batch, shown.kv_head, shown.kv_first : shown.kv_first + shown.kv_len]


def identity_values(request: Request, shown: Shown) -> Tensor:
    """Values with which attention hands out its weights: that of a key is 1 at the key's own place, as wide
    as what is shown has keys."""
    k, size = request.k, shown.kv_len
    v = k.new_zeros((*k.shape[:3], size))
    if request.cache is not None and request.cache.pages is not None:
        page, place = _in_pages(request.cache.pages, shown)
        v[page, :, place, torch.arange(size)] = 1
    else:
        v[:, :, shown.kv_first : shown.kv_first + size] = torch.eye(size, dtype=v.dtype)
    return v
