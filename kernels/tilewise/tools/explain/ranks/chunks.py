"""What do the chunks of a sequence have to do with one another? The blocks that `distributed.blocks` says are
seen, each with its time and its pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....distributed.blocks import blocks_of
from ....distributed.order import Order
from ....parts.shape import Shape
from ..coverage import Rows
from .pieces import Times
from .whole import Whole

NOT_SEEN, FULL, ASKED, BLIND, FIRST_CUT = range(5)  # classes of blocks


@dataclass(frozen=True)
class Chunks:
    """seen [q_chunks, kv_chunks]: as the run knows it. classes int32, the same: of each block its place in
    `times`; blocks of one class take the same time."""

    q_order: Order
    kv_order: Order
    seen: torch.Tensor
    classes: torch.Tensor
    times: Times

    @property
    def ranks(self) -> int:
        return self.q_order.ranks

    def by_ranks(self, of_classes: torch.Tensor) -> torch.Tensor:
        """A number of each class, summed over the blocks of the queries of a rank and the keys of another,
        [ranks of queries, ranks of keys]."""
        found = torch.zeros(self.ranks, self.ranks, dtype=of_classes.dtype, device="cpu")
        for q_chunks in held(self.q_order).unbind(1):
            rows = self.classes[q_chunks]
            for kv_chunks in held(self.kv_order).unbind(1):
                found += of_classes[rows[:, kv_chunks]]
        return found

    def needed(self) -> torch.Tensor:
        """How many chunks of the keys of a rank are seen by queries of another, int64 [ranks of queries,
        ranks of keys]: those that travel, but for a rank's own."""
        needs = self.seen[held(self.q_order)].any(1)
        return needs[:, held(self.kv_order)].sum(2)


def held(order: Order) -> torch.Tensor:
    """The chunks of every rank, [ranks, chunks of a rank]."""
    return torch.tensor(order.held, device="cpu")


def chunks_of(whole: Whole, q_order: Order, kv_order: Order, heads: tuple[int, int]) -> Chunks:
    """The blocks of a call of so many heads of queries and of keys."""
    seen = blocks_of(whole.readable_masks, whole.shape, q_order, kv_order).seen
    classes = classes_of(whole.rows, seen, q_order, kv_order)
    cut = (classes == FIRST_CUT).nonzero()
    classes[cut[:, 0], cut[:, 1]] = FIRST_CUT + torch.arange(len(cut), dtype=torch.int32, device="cpu")
    # One block of each of the other classes, if there is one.
    places = torch.cat([torch.zeros(FIRST_CUT, 2, dtype=torch.int64, device="cpu"), cut])
    exists = torch.ones(len(places), dtype=torch.bool, device="cpu")
    for name in range(FIRST_CUT):
        of_class = classes == name
        exists[name] = name != NOT_SEEN and bool(of_class.any())
        place = int(of_class.flatten().to(torch.uint8).argmax())
        places[name] = torch.tensor(divmod(place, classes.shape[1]), device="cpu")
    q_heads, kv_heads = heads
    shape = whole.shape._replace(
        q_heads=q_heads, kv_heads=kv_heads, q_len=q_order.chunk, kv_len=kv_order.chunk
    )
    found = whole.times(shape, places[exists, 0], places[exists, 1] * kv_order.chunk)
    times = Times(*(spread(column, exists) for column in (found.forward, found.backward, found.pairs)))
    return Chunks(q_order, kv_order, seen, classes, times)


def spread(column: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """The numbers of those that exist, and 0 for the others."""
    found = torch.zeros(len(exists), dtype=column.dtype, device="cpu")
    found[exists] = column
    return found


def classes_of(rows: Rows, seen: torch.Tensor, q_order: Order, kv_order: Order) -> torch.Tensor:
    """The class of every block; those that are cut are all FIRST_CUT. Every pair of a FULL block counts; all
    rows of an ASKED one reach over all of its keys, and a mask is asked; nobody in a BLIND one sees a key,
    which the run does not know."""
    start = torch.arange(kv_order.chunks, device="cpu") * kv_order.chunk
    stop = start + kv_order.chunk

    def by_chunk(x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, rows] -> [chunks, 1, rows of all batches and heads]"""
        return x.unflatten(2, (q_order.chunks, q_order.chunk)).movedim(2, 0).flatten(1)[:, None]

    lo, hi, whole = map(by_chunk, (rows.lo, rows.hi, rows.whole))
    sees = lo < hi
    covered = (lo.amax(2) <= start) & (hi.amin(2) >= stop)
    first = torch.where(sees, lo, kv_order.length).amin(2)
    last = torch.where(sees, hi, 0).amax(2)
    classes = torch.full(seen.shape, FIRST_CUT, dtype=torch.int32, device="cpu")
    classes[(last <= start) | (first >= stop)] = BLIND
    classes[covered & whole.all(2)] = FULL
    classes[covered & ~whole.any(2)] = ASKED
    classes[~seen] = NOT_SEEN
    return classes
