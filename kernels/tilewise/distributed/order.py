"""Which rows of a sequence does each rank hold?

The sequence is cut into chunks of one length, and every rank holds some of them, in the order of their rows:

    "zigzag"        2R chunks; rank r holds chunks r and 2R - 1 - r
    "contiguous"    R chunks; rank r holds chunk r

Under a causal mask a row sees as many keys as it has rows before it. In the zig-zag every rank holds an early
chunk and the late one that makes up for it, so all have the same work (Llama 3, arXiv 2407.21783, section
3.3.2); in contiguous order the last rank has nearly twice the mean. Where every row sees about as much, both
are balanced.

Ranks that stand one behind the other hold, together, what one rank of fewer would: the zig-zag of 4 ranks is,
two by two, the zig-zag of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ORDERS = ("zigzag", "contiguous")


class Order(NamedTuple):
    """held: for each rank the numbers of its chunks, rising. All chunks have one length."""

    length: int
    held: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def chunks(self) -> int:
        return sum(map(len, self.held))

    @property
    def chunk(self) -> int:
        """The rows of one chunk."""
        return self.length // self.chunks

    @property
    def rows_each(self) -> int:
        """The rows of one rank."""
        return self.length // self.ranks

    def start(self, chunk: int) -> int:
        """The first row of a chunk."""
        return chunk * self.chunk

    def rows(self, rank: int) -> list[tuple[int, int]]:
        """The rows start..stop of each chunk that a rank holds."""
        return [(self.start(chunk), self.start(chunk + 1)) for chunk in self.held[rank]]

    def of(self, ranks: Sequence[int]) -> Order:
        """What some ranks hold, alone: chunks keep their numbers."""
        return Order(self.rows_each * len(ranks), tuple([self.held[rank] for rank in ranks]))

    def together(self, groups: Sequence[Sequence[int]]) -> Order:
        """The order of groups of ranks, each of which has the rows of all its ranks. Chunks that stand side
        by side in every group are one."""
        held = [tuple(sorted([chunk for rank in group for chunk in self.held[rank]])) for group in groups]
        size = len(groups[0])
        starts = [chunks[::size] for chunks in held]
        are_runs = all(
            first % size == 0 and chunks[i * size : (i + 1) * size] == tuple(range(first, first + size))
            for chunks, firsts in zip(held, starts, strict=True)
            for i, first in enumerate(firsts)
        )
        if are_runs:
            held = [tuple([first // size for first in firsts]) for firsts in starts]
        return Order(self.length, tuple(held))

    def part(self, rank: int, chunk: int) -> slice:
        """Where a chunk is among the rows that the rank holds."""
        first = self.held[rank].index(chunk) * self.chunk
        return slice(first, first + self.chunk)


def order_of(length: int, ranks: int, order: str = "zigzag", *, name: str = "length") -> Order:
    """The order of a sequence of so many rows. Raises ValueError, with `name` for what has this length, for
    an order that is not one, and for rows that do not divide."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {ORDERS}")
    chunks = 2 * ranks if order == "zigzag" else ranks
    if length % chunks:
        next_length = -(-length // chunks) * chunks
        each = "two chunks" if order == "zigzag" else "one chunk"
        raise ValueError(
            f"{name}={length} must be a multiple of {chunks}, {each} a rank ({order=}, {ranks=}): pad the "
            f"sequence to {next_length} and mask the rest with tilewise.Padding({length})"
        )
    if order == "zigzag":
        return Order(length, tuple([(rank, chunks - 1 - rank) for rank in range(ranks)]))
    return Order(length, tuple([(rank,) for rank in range(ranks)]))
