"""The keys and values of sequences that come, go and grow, in pages that are handed out as they are needed.

What is kept of a sequence, on the host: its length and the numbers of its pages. Row j is row
j mod page_size of its page number j div page_size. Sequences that begin alike may share pages: whoever writes
into one that others have too gets a copy first (PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cached import cached_attention
from .core import check_positive
from .kv_cache import CacheFull


class PagedKVCache:
    """Keys and values of all layers of a model, with room for `pages` pages of `page_size` rows.

    k:      [layers, pages, page_size, kv_heads, head_dim]: a pool a layer, all with the same page numbers, so
            that one table serves them all.
    v:      the same with value_dim (head_dim if None).

        cache = PagedKVCache(pages=100, page_size=16, kv_heads=2, head_dim=64, layers=4)
        a, b = cache.allocate(), cache.allocate()
        step = cache.step([a, b], new_lens=[5, 3])           # of prompts of 5 and 3 tokens
        for layer in range(4):
            out = step.attend(q, k, v, layer=layer, mask=Causal())       # packed, [8, heads, 64]

    A method that needs pages takes all that it needs, or raises CacheFull and takes none.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        check_positive(
            pages=pages, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
            layers=layers,
        )  # fmt: skip
        pool = (layers, pages, page_size, kv_heads)
        self.k = torch.empty(*pool, head_dim, dtype=dtype, device=device)
        self.v = torch.empty(*pool, value_dim, dtype=dtype, device=device)
        self.layers, self.page_size = layers, page_size
        self._free = list(range(pages))[::-1]
        self._users = [0] * pages  # how many sequences have each page
        self._pages: dict[int, list[int]] = {}
        self._lens: dict[int, int] = {}
        self._next = 0

    # ---- Sequences

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """The number of a new sequence, which has no row and no page. No number comes twice."""
        return self._add([], 0)

    def length(self, sequence: int) -> int:
        """How many rows a sequence has."""
        self._check(sequence)
        return self._lens[sequence]

    def fork(self, sequence: int, length: int | None = None) -> int:
        """The number of a new sequence that begins with the first `length` rows of another, all if None. It
        shares their pages and takes none: one that is filled in part is copied when either writes to it."""
        rows = self.length(sequence)
        length = rows if length is None else length
        if not 0 <= length <= rows:
            raise ValueError(f"{length=} must be from 0 to the {rows} rows of sequence {sequence}")
        pages = self._pages[sequence][: self._pages_of(length)]
        for page in pages:
            self._users[page] += 1
        return self._add(list(pages), length)

    def free(self, sequence: int) -> None:
        """Forget a sequence. Pages that nobody else has can be taken again; what is in them stays there."""
        self._check(sequence)
        del self._lens[sequence]
        for page in reversed(self._pages.pop(sequence)):
            self._release(page)

    # ---- Rows

    def reserve(self, sequences: Sequence[int], rows: int | Sequence[int]) -> None:
        """Take the pages for `rows` more rows of each sequence, or of one as many as the list has at its
        place, without counting the rows yet. What is reserved already is not taken again.

        Raises CacheFull where too few pages are free, and ValueError for a sequence that is not in the cache
        or is named twice.
        """
        wanted = self._ends(sequences, rows)
        users, shared, missing = dict[int, int](), list[tuple[list[int], int]](), 0
        for sequence, end in wanted.items():
            pages, count = self._pages[sequence], self._pages_of(end)
            for index in range(self._lens[sequence] // self.page_size, min(count, len(pages))):
                page = pages[index]
                left = users.setdefault(page, self._users[page])
                if left > 1:  # the last of several that write to it has it to itself
                    users[page] = left - 1
                    shared.append((pages, index))
            missing += max(count - len(pages), 0)
        needed = missing + len(shared)
        if needed > len(self._free):
            raise CacheFull(
                f"pages needed: {needed}, free: {len(self._free)} of {len(self._users)}; free() a sequence, "
                "or make the cache with more pages"
            )
        self._unshare(shared)
        for sequence, end in wanted.items():
            pages = self._pages[sequence]
            pages += [self._take() for _ in range(self._pages_of(end) - len(pages))]

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """kv_lens int32 [batch] and pages int32 [batch, max_pages] of these sequences on the device, as
        `cached_attention` takes them."""
        for sequence in sequences:
            self._check(sequence)
        tables = [self._pages[sequence] for sequence in sequences]
        width = max([1, *map(len, tables)])
        padded = [table + [0] * (width - len(table)) for table in tables]
        lens = [self._lens[sequence] for sequence in sequences]
        return self._on_device(lens), self._on_device(padded).view(len(lens), width)

    def step(self, sequences: Sequence[int], new_lens: int | Sequence[int] = 1) -> Step:
        """One step of a model: pages for new_lens more rows of each sequence, and tensors that all layers
        share. A list, with a number a sequence, stands for rows that come packed. Raises as `reserve`."""
        self.reserve(sequences, new_lens)
        return Step(self, sequences, new_lens)

    def attend(
        self,
        sequences: Sequence[int],
        q: Tensor,
        new_k: Tensor,
        new_v: Tensor,
        *,
        new_lens: Sequence[int] | None = None,
        **arguments: Any,
    ) -> Any:
        """`Step.attend` of a step made for this call: with one layer, all that a step is. new_lens: the new
        rows of each sequence, where q, new_k and new_v are packed, [tokens, heads, dim]; if None they are
        [batch, heads, rows, dim]. Raises as `reserve` and `Step.attend` do."""
        step = self.step(sequences, new_k.shape[-2] if new_lens is None else new_lens)
        return step.attend(q, new_k, new_v, **arguments)

    # ---- Pages

    def _add(self, pages: list[int], length: int) -> int:
        number = self._next
        self._pages[number], self._lens[number] = pages, length
        self._next += 1
        return number

    def _check(self, sequence: int) -> None:
        if sequence not in self._lens:
            raise ValueError(f"sequence {sequence!r} is not in the cache: allocate() gives new ones")

    def _ends(self, sequences: Sequence[int], rows: int | Sequence[int]) -> dict[int, int]:
        """The length that each sequence has after so many more rows."""
        more = [rows] * len(sequences) if isinstance(rows, int) else list(rows)
        if len(more) != len(sequences) or min(more, default=0) < 0:
            raise ValueError(f"{rows} new rows must be one number, or one a sequence for {len(sequences)}")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is named twice in {list(sequences)}: fork() makes it two")
        return {each: self.length(each) + count for each, count in zip(sequences, more, strict=True)}

    def _pages_of(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def _unshare(self, shared: list[tuple[list[int], int]]) -> None:
        """Put a copy in the place of each of these pages: the place is in a sequence's list."""
        if not shared:
            return
        old = [pages[index] for pages, index in shared]
        new = [self._take() for _ in shared]
        sources, targets = self._on_device(old).long(), self._on_device(new).long()
        for pool in (self.k, self.v):
            pool[:, targets] = pool[:, sources]
        for (pages, index), page in zip(shared, new, strict=True):
            self._release(pages[index])
            pages[index] = page

    def _on_device(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.k.device)


class Step:
    """New rows of some sequences on their way through the layers of a model. `PagedKVCache.step` makes it.

    kv_lens, pages: as `PagedKVCache.batch` gives them, before the new rows. kv_lens are the positions of the
        first of them.
    q_offsets: None, or int32 [batch + 1] where the rows are packed.

    The rows count once the last layer has them: a step that is broken off leaves the sequences as they were.
    """

    def __init__(self, cache: PagedKVCache, sequences: Sequence[int], new_lens: int | Sequence[int]) -> None:
        self._cache = cache
        self._begins = {each: cache.length(each) for each in sequences}
        self._ends = cache._ends(sequences, new_lens)
        self.kv_lens, self.pages = cache.batch(sequences)
        self.q_offsets = None
        if not isinstance(new_lens, int):
            self.q_offsets = cache._on_device([sum(new_lens[:i]) for i in range(len(new_lens) + 1)])

    def attend(self, q: Tensor, new_k: Tensor, new_v: Tensor, *, layer: int = 0, **arguments: Any) -> Any:
        """`cached_attention` of a layer's q to what its pool holds of the sequences and to new_k and new_v,
        which are in it afterwards.

        arguments: those of `cached_attention`, as mask and rotary; the result is as there. Raises ValueError
        where the rows are not as many as the step was made for, or the sequences have changed since.
        """
        cache = self._cache
        if not 0 <= layer < cache.layers:
            raise ValueError(f"{layer=} must be from 0 to {cache.layers - 1}")
        if any(cache.length(each) != length for each, length in self._begins.items()):
            raise ValueError("the sequences have grown since this step was made: a step serves once")
        rows = [self._ends[each] - length for each, length in self._begins.items()]
        given = new_k.shape[-2 if self.q_offsets is None else 0]
        if given != (max(rows, default=0) if self.q_offsets is None else sum(rows)):
            raise ValueError(f"new_k.shape={tuple(new_k.shape)} has {given} rows, and the step is for {rows}")
        found = cached_attention(
            q, cache.k[layer], cache.v[layer], kv_lens=self.kv_lens, pages=self.pages, new_k=new_k,
            new_v=new_v, q_offsets=self.q_offsets, **arguments,
        )  # fmt: skip
        if layer == cache.layers - 1:
            cache._lens.update(self._ends)
        return found
