"""From rows to heads: every rank has some rows of all heads, and then all rows of some heads.

                 ranks along the rows ──►              heads ──►
    heads   0    r0  r1  r2  r3             rows  0    r0  r1  r2  r3
      │     1    r0  r1  r2  r3               │   1    r0  r1  r2  r3
      ▼     ..                                ▼   ..

One exchange of all with all before the call and one after it; in between a rank attends as one device does,
to its heads. Query heads that share a head of keys take it along: where ranks are more than heads of keys, or
cut a group in two, a head goes to several ranks, and its gradient is the sum of theirs.

Method: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .exchange import Channel
from .order import Order
from .share import SECOND_ORDER

Tensor = torch.Tensor


class Exchanged(NamedTuple):
    """How one tensor changes hands. heads: for each rank, the heads that it gets, of those that each has of
    its own rows; order: the rows of the ranks."""

    channel: Channel
    heads: tuple[tuple[int, ...], ...]
    order: Order

    @property
    def rank(self) -> int:
        return self.channel.group.rank

    @property
    def own(self) -> list[tuple[int, int]]:
        """Chunks in the order of their rows, as (the chunk, its rank)."""
        return sorted((chunk, rank) for rank, held in enumerate(self.order.held) for chunk in held)


def query_heads(q_heads: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Those of each rank: as many each, one after another."""
    each = q_heads // ranks
    return tuple([tuple(range(rank * each, (rank + 1) * each)) for rank in range(ranks)])


def key_heads(q_heads: int, kv_heads: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The heads of keys that the query heads of each rank read: one for as many query heads as share one on
    every rank."""
    own = query_heads(q_heads, ranks)
    group, each = q_heads // kv_heads, q_heads // ranks
    shared = math.gcd(group, each)
    return tuple([tuple([head // group for head in heads[::shared]]) for heads in own])


def all_rows(plans: list[Exchanged], tensors: list[Tensor], step: int) -> list[Tensor]:
    """Of each tensor, x [batch, heads, own rows, dim] -> [batch, own heads, all rows, dim]."""
    started = []
    for plan, x in zip(plans, tensors, strict=True):
        sends = [(rank, x[:, list(heads)]) for rank, heads in enumerate(plan.heads) if rank != plan.rank]
        own = x[:, list(plan.heads[plan.rank])]
        parts = [own if rank == plan.rank else torch.empty_like(own) for rank in range(len(plan.heads))]
        receives = [(rank, part) for rank, part in enumerate(parts) if rank != plan.rank]
        started.append((plan, parts, plan.channel.start(sends, receives, step)))
    found = []
    for plan, parts, pending in started:
        pending.wait()
        rows = [parts[rank][:, :, plan.order.part(rank, chunk)] for chunk, rank in plan.own]
        found.append(torch.cat(rows, 2))
    return found


def all_heads(
    plans: list[Exchanged], tensors: list[Tensor], counts: list[int], step: int, dtype: torch.dtype | None
) -> list[Tensor]:
    """Of each tensor, y [batch, own heads, all rows, dim] -> [batch, heads, this rank's rows, dim], with so
    many heads: of a head that several ranks have, the sum, in this dtype and the order of the ranks."""
    started = []
    for plan, y, count in zip(plans, tensors, counts, strict=True):
        starts = {chunk: i * plan.order.chunk for i, (chunk, _) in enumerate(plan.own)}
        of_ranks = [
            torch.cat([y[:, :, starts[c] : starts[c] + plan.order.chunk] for c in held], 2)
            for held in plan.order.held
        ]
        batch, _, rows, dim = of_ranks[plan.rank].shape
        parts = [
            of_ranks[rank] if rank == plan.rank else y.new_empty(batch, len(heads), rows, dim)
            for rank, heads in enumerate(plan.heads)
        ]
        sends = [(rank, x) for rank, x in enumerate(of_ranks) if rank != plan.rank]
        receives = [(rank, x) for rank, x in enumerate(parts) if rank != plan.rank]
        started.append((plan, parts, count, plan.channel.start(sends, receives, step)))
    found = []
    for plan, parts, count, pending in started:
        pending.wait()
        batch, _, rows, dim = parts[0].shape
        total = parts[0].new_zeros(batch, count, rows, dim, dtype=dtype)
        for heads, part in zip(plan.heads, parts, strict=True):
            for i, head in enumerate(heads):
                total[:, head] += part[:, i]
        found.append(total)
    return found


class ToHeads(torch.autograd.Function):
    """`all_rows` of several tensors; backward, `all_heads` of their gradients."""

    @staticmethod
    def forward(ctx: Any, plans: list[Exchanged], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plans, ctx.counts, ctx.dtypes = plans, [x.shape[1] for x in tensors], [x.dtype for x in tensors]
        return tuple(all_rows(plans, list(tensors), 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_order()
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        found = all_heads(ctx.plans, list(grads), ctx.counts, 0, wide)
        return None, *[x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)]


class ToRows(torch.autograd.Function):
    """`all_heads` of several tensors, each head of which one rank has; backward, `all_rows`."""

    @staticmethod
    def forward(ctx: Any, plans: list[Exchanged], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plans = plans
        return tuple(all_heads(plans, list(tensors), [count] * len(tensors), 1, None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_order()
        return None, None, *all_rows(ctx.plans, list(grads), 1)


def refuse_second_order() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise NotImplementedError(SECOND_ORDER)
