"""What memory does a rank need? Its own part of every tensor, and what its method adds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ....distributed.order import Order
from ..workload import STATISTIC, Allocation
from .traffic import Sizes, heads_of_rank
from .whole import Whole

BUFFERS = 2  # of what is received: one is filled while the other is read


def local(whole: Whole, q_order: Order, kv_order: Order) -> Iterator[Allocation]:
    """The rank's part of the call's own tensors."""
    shape, sizes = whole.shape, Sizes.of(whole)
    q_rows, kv_rows = q_order.rows_each, kv_order.rows_each
    q = sizes.queries(q_rows, shape.head_dim, shape.q_heads)
    out = sizes.queries(q_rows, shape.value_dim, shape.q_heads)
    keys = sizes.keys(kv_rows, sizes.element)
    yield Allocation("q, k, v", q + keys, "argument")
    yield Allocation("out", out, "result")
    statistics = sizes.statistics(q_rows, shape.q_heads)
    if whole.work.training:
        yield Allocation("lse and row statistics", 3 * statistics, "for the backward")
        yield Allocation("gradients of q, k, v, out", q + keys + out, "result")
    elif whole.work.return_lse:
        yield Allocation("lse", statistics, "result")


def memory_of_ring(
    whole: Whole, q_order: Order, kv_order: Order, needed: torch.Tensor
) -> tuple[Allocation, ...]:
    return tuple(local(whole, q_order, kv_order))


def memory_of_all_gather(whole: Whole, q_order: Order, kv_order: Order) -> tuple[Allocation, ...]:
    return tuple(local(whole, q_order, kv_order))


def memory_of_heads(whole: Whole, q_order: Order, kv_order: Order, within: int) -> tuple[Allocation, ...]:
    return tuple(local(whole, q_order, kv_order))
