"""What do the chunks of a sequence have to do with one another? The blocks that `distributed.blocks` says are
seen, each with its time and its pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....distributed.blocks import Blocks, blocks_of
from ....distributed.calls import is_free, part_calls
from ....distributed.order import Order
from ....parts.shape import Shape
from ..coverage import Rows
from .pieces import Times, joined
from .whole import Whole

Tensor = torch.Tensor
AT_ONCE = 1 << 18  # blocks whose numbers are looked up together
NOT_SEEN, FULL, ASKED, BLIND, FIRST_CUT = range(5)  # classes of blocks


@dataclass(frozen=True)
class Chunks:
    """seen [q_chunks, kv_chunks]: as the run knows it. classes int32, the same: of each block its place in
    `times`; blocks of one class take the same time. full_alone [patterns]: of a rank's queries against the
    keys of another where nothing is seen but FULL blocks; by which they are: bit i · (chunks of a rank) + j
    is chunk i of its rows against chunk j of those keys."""

    q_order: Order
    kv_order: Order
    seen: Tensor
    classes: Tensor
    times: Times
    full_alone: Times

    @property
    def ranks(self) -> int:
        return self.q_order.ranks

    def by_ranks(self, of_classes: Tensor, weights: Tensor | None = None) -> Tensor:
        """A number of each class, summed over the blocks of the queries of a rank and the keys of another,
        [ranks of queries, ranks of keys]; weights: of chunk i of the rank's and chunk j of the other's."""
        found = torch.zeros(self.ranks, self.ranks, dtype=of_classes.dtype, device="cpu")
        q_chunks, kv_chunks = held(self.q_order), held(self.kv_order)
        some = max(1, AT_ONCE // self.kv_order.chunks)
        for to, which in zip(found.split(some), q_chunks.split(some), strict=True):  # what caches hold
            for i, each in enumerate(which.unbind(1)):
                classes = self.classes.index_select(0, each)
                of_chunks = of_classes.index_select(0, classes.flatten()).view(classes.shape)
                for j, column in enumerate(kv_chunks.unbind(1)):
                    to += of_chunks.index_select(1, column) * (1 if weights is None else weights[i, j])
        return found

    def pairs(self) -> Tensor:
        """The pairs of query and key that count, of each rank, int64 [ranks]."""
        return self.by_ranks(self.times.pairs).sum(1)

    def seconds(self) -> tuple[Tensor, Tensor]:
        """Of forward and backward, [ranks of queries, ranks of keys]. FULL blocks are called together where
        the run does; blocks that are cut are counted as calls of their own, and so is whatever they stand
        beside."""
        forward, backward = self.by_ranks(self.times.forward), self.by_ranks(self.times.backward)
        if len(self.full_alone.forward) == 0:
            return forward, backward
        is_full = torch.zeros(len(self.times.pairs), dtype=torch.uint8, device="cpu")
        is_full[FULL] = 1
        of_rank = [len(order.held[0]) for order in (self.q_order, self.kv_order)]
        bits = (1 << torch.arange(of_rank[0] * of_rank[1], device="cpu")).view(of_rank)
        pattern = self.by_ranks(is_full, bits.to(torch.uint8))
        is_other = 1 - is_full
        is_other[NOT_SEEN] = 0
        alone = self.by_ranks(is_other) == 0
        together = (x[pattern.int()] for x in (self.full_alone.forward, self.full_alone.backward))
        forward, backward = (
            torch.where(alone, of_all, by_block)
            for of_all, by_block in zip(together, (forward, backward), strict=True)
        )
        return forward, backward

    def needed(self) -> Tensor:
        """How many chunks of the keys of a rank are seen by queries of another, int64 [ranks of queries,
        ranks of keys]: those that travel, but for a rank's own."""
        needs = self.seen[held(self.q_order)].any(1)
        return needs[:, held(self.kv_order)].sum(2)


def held(order: Order) -> Tensor:
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
    sizes = torch.tensor([q_order.chunk, kv_order.chunk], device="cpu")
    part = whole.shape._replace(q_heads=heads[0], kv_heads=heads[1])
    block = part._replace(q_len=q_order.chunk, kv_len=kv_order.chunk)
    rows, keys = (places[exists] * sizes).unbind(1)
    found = whole.times(block, rows, keys)
    times = Times(*(spread(column, exists) for column in (found.forward, found.backward, found.pairs)))
    full_alone = found[:0]
    if is_free(whole.request) and exists[FULL]:
        full_alone = called_together(whole, part, q_order, kv_order)
    return Chunks(q_order, kv_order, seen, classes, times, full_alone)


def called_together(whole: Whole, part: Shape, q_order: Order, kv_order: Order) -> Times:
    """The times of a rank's queries against the keys of another, by which blocks are FULL and no other is
    seen: as `Chunks.full_alone`."""
    rows, keys = (
        Order(len(x.held[0]) * x.chunk, (tuple(range(len(x.held[0]))),)) for x in (q_order, kv_order)
    )
    count = rows.chunks * keys.chunks
    unmasked, nothing = whole.unmasked(), torch.zeros(1, dtype=torch.int64, device="cpu")
    of_calls: dict[tuple[int, int], Times] = {}
    found = []
    for pattern in range(1 << count):
        bits = [pattern >> bit & 1 for bit in range(count)]
        full = torch.tensor(bits, dtype=torch.bool, device="cpu").view(rows.chunks, keys.chunks)
        at_hand = full.any(0).nonzero()[:, 0].tolist()
        total = Times(nothing.double(), nothing.double(), nothing)
        for call in part_calls(0, at_hand, Blocks(full, full), rows, keys, is_free=True):
            size = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
            if size not in of_calls:
                shape = part._replace(q_len=size[0], kv_len=size[1])
                of_calls[size] = unmasked.times(shape, nothing, nothing)
            total = total + of_calls[size]
        found.append(total)
    return joined(found)


def spread(column: Tensor, exists: torch.Tensor) -> Tensor:
    """The numbers of those that exist, and 0 for the others."""
    found = torch.zeros(len(exists), dtype=column.dtype, device="cpu")
    found[exists] = column
    return found


def classes_of(rows: Rows, seen: Tensor, q_order: Order, kv_order: Order) -> Tensor:
    """The class of every block; those that are cut are all FIRST_CUT. Every pair of a FULL block counts; all
    rows of an ASKED one reach over all of its keys, and a mask is asked; nobody in a BLIND one sees a key,
    which the run does not know."""
    start = torch.arange(kv_order.chunks, device="cpu") * kv_order.chunk
    stop = start + kv_order.chunk

    def by_chunk(x: Tensor) -> Tensor:
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
