"""What memory does a rank need? Its own part of every tensor, and what its method adds. Of each the most that
any rank has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ....distributed.order import Order
from ..workload import Allocation
from .traffic import Sizes
from .whole import Whole

ARGUMENT, RESULT, FORWARD, KEPT, BACKWARD, GRADIENT = (
    "argument", "result", "forward", "kept", "backward", "gradient",
)  # fmt: skip
PHASES = (
    {ARGUMENT, RESULT, FORWARD, KEPT},
    {ARGUMENT, RESULT, KEPT, BACKWARD, GRADIENT},
)


def peak(memory: tuple[Allocation, ...]) -> int:
    """The most bytes that are there at one time: in the forward, or in the backward."""
    return max(sum(x.bytes for x in memory if x.kept in phase) for phase in PHASES)


class Local:
    """The bytes of a rank's own rows."""

    def __init__(self, whole: Whole, q_order: Order, kv_order: Order) -> None:
        self.shape, self.sizes, self.training = whole.shape, Sizes.of(whole), whole.work.training
        self.q_rows, self.kv_rows, self.kv_chunk = q_order.rows_each, kv_order.rows_each, kv_order.chunk
        heads, element = self.shape.q_heads, self.sizes.element
        self.q = self.sizes.queries(self.q_rows, self.shape.head_dim, heads)
        self.out = self.sizes.queries(self.q_rows, self.shape.value_dim, heads)
        self.keys = self.sizes.keys(self.kv_rows, element)
        self.statistics = self.sizes.statistics(self.q_rows, heads)
        self.wide = self.sizes.sums // element  # times as many bytes as an element has in sums

    def always(self) -> Iterator[Allocation]:
        yield Allocation("q, k, v", self.q + self.keys, ARGUMENT)
        yield Allocation("out, lse", self.out + self.statistics, RESULT)
        if self.training:
            yield Allocation("row statistics", 2 * self.statistics, KEPT)
            yield Allocation("gradient of out", self.out, GRADIENT)
            yield Allocation("gradients of q, k, v", self.q + self.keys, GRADIENT)


def joining(local: Local, at_hand: int) -> Iterator[Allocation]:
    """What pieces are joined in: sums of all rows, and one piece. at_hand: rows of keys of a piece."""
    wide, sizes = local.wide, local.sizes
    yield Allocation("sums of out", wide * local.out + 2 * local.statistics, FORWARD)
    yield Allocation("out of a piece, and its share", 2 * (wide * local.out + local.statistics), FORWARD)
    if local.training:
        yield Allocation("sums of gradients", wide * (local.q + local.keys), BACKWARD)
        of_piece = wide * local.q + 2 * sizes.keys(at_hand, sizes.sums)
        yield Allocation("gradients of a piece", of_piece, BACKWARD)


def memory_of_ring(
    whole: Whole, q_order: Order, kv_order: Order, needed: torch.Tensor
) -> tuple[Allocation, ...]:
    """Two buffers of what comes, and one of what goes."""
    local = Local(whole, q_order, kv_order)
    most = int(others(needed).max()) * kv_order.chunk
    sizes, rows = local.sizes, max(most, kv_order.rows_each)
    keys = Allocation("keys at hand, arriving, leaving", 3 * sizes.keys(most, sizes.element), FORWARD)
    found = [*local.always(), *joining(local, rows), keys]
    if local.training:
        under_way = 3 * sizes.keys(most, sizes.element) + 4 * sizes.keys(most, sizes.sums)
        found.append(Allocation("keys and gradients under way", under_way, BACKWARD))
    return tuple(found)


def memory_of_all_gather(
    whole: Whole, q_order: Order, kv_order: Order, needed: torch.Tensor
) -> tuple[Allocation, ...]:
    """All that comes, all that goes, and all keys in one piece."""
    local = Local(whole, q_order, kv_order)
    moved, sizes = others(needed), local.sizes
    rows = int(needed.sum(1).max()) * kv_order.chunk
    traffic = int((moved.sum(0) + moved.sum(1)).max()) * kv_order.chunk
    found = [*local.always(), *joining(local, rows)]
    found.append(Allocation("keys gathered", sizes.keys(rows, sizes.element), FORWARD))
    found.append(Allocation("keys arriving, leaving", sizes.keys(traffic, sizes.element), FORWARD))
    if local.training:
        found.append(Allocation("keys gathered again", sizes.keys(rows, sizes.element), BACKWARD))
        found.append(Allocation("gradients arriving, leaving", sizes.keys(traffic, sizes.sums), BACKWARD))
    return tuple(found)


def others(needed: torch.Tensor) -> torch.Tensor:
    """The chunks that travel: not those that a rank has."""
    return needed - torch.diag(needed.diagonal())


def memory_of_heads(whole: Whole, q_order: Order, kv_order: Order, within: int) -> tuple[Allocation, ...]:
    local = Local(whole, q_order, kv_order)
    return tuple(local.always())
