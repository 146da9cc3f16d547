"""What memory does a rank need? Its own part of every tensor, and what its method adds. Of each the most that
any rank has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ....distributed.order import Order
from ....parts.shape import Shape
from ..workload import Allocation
from .traffic import Sizes, heads_of_rank, others
from .whole import Whole

Memory = tuple[Allocation, ...]
ARGUMENT, RESULT, FORWARD, KEPT, BACKWARD, GRADIENT = (
    "argument", "result", "forward", "kept", "backward", "gradient",
)  # fmt: skip
PHASES = (
    {ARGUMENT, RESULT, FORWARD, KEPT},
    {ARGUMENT, RESULT, KEPT, BACKWARD, GRADIENT},
)


def peak(memory: Memory) -> int:
    """The most bytes that are there at one time: in the forward, or in the backward."""
    return max(sum(x.bytes for x in memory if x.kept in phase) for phase in PHASES)


@dataclass(frozen=True)
class Held:
    """The bytes of what one rank has of a call of this shape: so many rows, of all its heads."""

    shape: Shape
    sizes: Sizes
    q_rows: int
    kv_rows: int

    @staticmethod
    def by(whole: Whole, q_order: Order, kv_order: Order, heads: tuple[int, int] | None = None) -> Held:
        shape = whole.shape
        if heads is not None:
            shape = shape._replace(q_heads=heads[0], kv_heads=heads[1])
        return Held(shape, Sizes(shape, whole.request.q.dtype), q_order.rows_each, kv_order.rows_each)

    @property
    def q(self) -> int:
        return self.sizes.queries(self.q_rows, self.shape.head_dim, self.shape.q_heads)

    @property
    def out(self) -> int:
        return self.sizes.queries(self.q_rows, self.shape.value_dim, self.shape.q_heads)

    @property
    def keys(self) -> int:
        return self.sizes.keys(self.kv_rows, self.sizes.element)

    @property
    def statistics(self) -> int:
        return self.sizes.statistics(self.q_rows, self.shape.q_heads)

    @property
    def wide(self) -> int:
        """Times as many bytes as an element has in sums."""
        return self.sizes.sums // self.sizes.element


def own(whole: Whole, q_order: Order, kv_order: Order) -> Iterator[Allocation]:
    """What a rank has by every method."""
    held = Held.by(whole, q_order, kv_order)
    yield Allocation("q, k, v", held.q + held.keys, ARGUMENT)
    yield Allocation("out, lse", held.out + held.statistics, RESULT)
    if whole.work.training:
        yield Allocation("gradients of q, k, v, out", held.q + held.keys + held.out, GRADIENT)


def joined_pieces(held: Held, rows_at_hand: int, training: bool) -> Iterator[Allocation]:
    """What pieces are joined in: the sums of all rows, and those of one piece."""
    wide = held.wide
    yield Allocation("sums of out", wide * held.out + 2 * held.statistics, FORWARD)
    yield Allocation("out of a piece", wide * held.out + 2 * held.statistics, FORWARD)
    if training:
        yield Allocation("row statistics", 2 * held.statistics, KEPT)
        yield Allocation("sums of gradients", wide * (held.q + held.keys), BACKWARD)
        of_piece = wide * held.q + 2 * held.sizes.keys(rows_at_hand, held.sizes.sums)
        yield Allocation("gradients of a piece", of_piece, BACKWARD)


def buffers(held: Held, needed: torch.Tensor, chunk: int, training: bool) -> Iterator[Allocation]:
    """Of a ring: two of what comes, and one of what goes; in the backward, of gradients, two each."""
    rows = int(others(needed).max()) * chunk
    keys, sums = (held.sizes.keys(rows, size) for size in (held.sizes.element, held.sizes.sums))
    yield Allocation("keys under way", 3 * keys, FORWARD)
    if training:
        yield Allocation("keys and gradients under way", 3 * keys + 4 * sums, BACKWARD)


def memory_of_ring(whole: Whole, q_order: Order, kv_order: Order, needed: torch.Tensor) -> Memory:
    held, training = Held.by(whole, q_order, kv_order), whole.work.training
    return (
        *own(whole, q_order, kv_order),
        *joined_pieces(held, kv_order.rows_each, training),
        *buffers(held, needed, kv_order.chunk, training),
    )


def memory_of_all_gather(whole: Whole, q_order: Order, kv_order: Order, needed: torch.Tensor) -> Memory:
    """All that comes, all that goes, and all keys in one piece."""
    held, training = Held.by(whole, q_order, kv_order), whole.work.training
    moved, sizes = others(needed), held.sizes
    rows = int(needed.sum(1).max()) * kv_order.chunk
    under_way = int((moved.sum(0) + moved.sum(1)).max()) * kv_order.chunk
    found = [*own(whole, q_order, kv_order), *joined_pieces(held, rows, training)]
    found.append(Allocation("keys gathered", sizes.keys(rows, sizes.element), FORWARD))
    found.append(Allocation("keys under way", sizes.keys(under_way, sizes.element), FORWARD))
    if training:
        found.append(Allocation("keys gathered again", sizes.keys(rows, sizes.element), BACKWARD))
        found.append(Allocation("gradients under way", sizes.keys(under_way, sizes.sums), BACKWARD))
    return tuple(found)


def exchanged(held: Held, mine: Held, within: int, training: bool) -> Iterator[Allocation]:
    """What changes hands where heads are divided. held: in rows; mine: in heads. Each is there three times
    while it does: as it leaves, as it comes, and in the order of its rows."""
    kept = KEPT if training else FORWARD
    yield Allocation("q, k, v of its heads", mine.q + mine.keys, kept)
    yield Allocation("out, lse of its heads", mine.out + mine.statistics, kept)
    away = (mine.q + mine.keys) * (within - 1) // within
    yield Allocation("rows under way", mine.q + mine.keys + away, FORWARD)
    if training:
        yield Allocation("gradients of its heads", mine.q + mine.keys + mine.out, BACKWARD)
        yield Allocation("gradients under way", mine.q + mine.keys + away, BACKWARD)
        yield Allocation("sums of gradients of heads", held.wide * (held.q + held.keys), BACKWARD)


def memory_of_heads(whole: Whole, q_order: Order, kv_order: Order, within: int) -> Memory:
    held, training = Held.by(whole, q_order, kv_order), whole.work.training
    found = [*own(whole, q_order, kv_order)]
    found += exchanged(held, in_heads(whole, q_order, kv_order, within), within, training)
    if training:
        found.append(Allocation("row statistics", 2 * held.statistics, KEPT))
    return tuple(found)


def in_heads(whole: Whole, q_order: Order, kv_order: Order, within: int) -> Held:
    """What a rank has after rows have been exchanged for heads."""
    found = Held.by(whole, q_order, kv_order, heads_of_rank(whole.shape, within))
    return Held(found.shape, found.sizes, found.q_rows * within, found.kv_rows * within)


def memory_of_both(
    whole: Whole, orders: tuple[Order, Order], within: int, needed: torch.Tensor, chunk: int
) -> Memory:
    """Of a ring of groups that divide heads: chunk and needed are those of the groups."""
    held, mine = Held.by(whole, *orders), in_heads(whole, *orders, within)
    training = whole.work.training
    return (
        *own(whole, *orders),
        *exchanged(held, mine, within, training),
        *joined_pieces(mine, mine.kv_rows, training),
        *buffers(mine, needed, chunk, training),
    )
