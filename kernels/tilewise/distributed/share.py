"""A rank's share of a call: its rows against the keys of all ranks, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..parts.shape import computed_in
from ..plan.passes import empty_in_order_of, sink_gradient
from ..plan.request import Request
from ..pytorch.encoding import Encoded, decode, encode
from .blocks import Blocks, ring
from .calls import is_free, part_calls, part_request
from .exchange import Channel
from .order import Order
from .rows import Rows, attend, differentiate, unit_of, without_sink
from .walk import WALKS, Keys, Walk

Tensor = torch.Tensor
SECOND_ORDER = (
    "context_parallel_attention has no second-order gradients: its gradient was differentiated again. Drop "
    "create_graph=True, or call tilewise.attention on one device, which has them"
)


class Share(NamedTuple):
    """What the ranks along the sequence send one another; which rows and keys each holds; which of their
    chunks see one another; how keys come: a name in WALKS."""

    channel: Channel
    q_order: Order
    kv_order: Order
    blocks: Blocks
    method: str

    @property
    def rank(self) -> int:
        return self.channel.group.rank

    def walk(self, k: Tensor, v: Tensor) -> Walk:
        steps = ring(self.rank, self.blocks.seen, self.q_order, self.kv_order)
        return WALKS[self.method](self.channel, steps, Keys(self.kv_order.held[self.rank], k, v))

    def calls(self, request: Request, keys: Keys) -> list[tuple[slice, slice, Request]]:
        """What is computed of the keys at hand: rows of the rank, rows of the keys, and the request of
        both."""
        found = part_calls(self.rank, keys.chunks, self.blocks, self.q_order, self.kv_order, is_free(request))
        return [(call.rows, call.keys, part_request(request, call, keys.k, keys.v)) for call in found]


def attend_to_all(share: Share, request: Request) -> tuple[Tensor, Tensor]:
    """out [batch, q_heads, rows, value_dim] in q's dtype and lse [batch, q_heads, rows] of this rank's rows.
    The request: q, k and v are its rows, all else is the whole call's, whose sizes its place has."""
    encoded = encode(request)
    out, lse = SharedAttention.apply(
        share, encoded._replace(tensors=[]), request.q, request.k, request.v, *encoded.tensors
    )
    return out, lse


class SharedAttention(torch.autograd.Function):
    """The pieces of one rank, one after another, and their derivative."""

    @staticmethod
    def forward(
        ctx: Any, share: Share, encoded: Encoded, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        request = decode(q, k, v, encoded._replace(tensors=list(tensors)))
        rows = Rows(q, v.shape[3], request.sink, unit_of(request))
        pieces = without_sink(request)

        def compute(keys: Keys) -> None:
            for at, _, piece in share.calls(pieces, keys):
                rows.take(at, *attend(piece))

        share.walk(k, v).forward(compute)
        out = empty_in_order_of(q, v.shape[3]).copy_(rows.out)
        ctx.share, ctx.encoded = share, encoded
        ctx.save_for_backward(q, k, v, out, torch.stack([rows.row_max, rows.sum_log2]), *tensors)
        ctx.set_materialize_grads(False)
        return out, rows.lse()

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(SECOND_ORDER)
        q, k, v, out, statistics, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:])
        request = decode(q, k, v, ctx.encoded._replace(tensors=tensors))
        do = torch.zeros_like(out) if do is None else do
        grads = gradients(ctx.share, request, out, statistics, do, dlse, needs)
        given = (q, k, v, *tensors)
        return None, None, *[None if g is None else g.to(x.dtype) for g, x in zip(grads, given, strict=True)]


def slots_of(piece: Request, request: Request) -> list[int]:
    """Which of (q, k, v, *other tensors) of the request a piece has: a piece in which every pair counts has
    no masks."""
    slots = list(range(3 + len(request.other_tensors)))
    if piece.masks or not request.masks:
        return slots
    of_masks, of_scores = (sum(len(x.tensors()) for x in parts) for parts in (request.masks, request.scores))
    end = len(slots) - of_scores
    return slots[: end - of_masks] + slots[end:]


def gradients(
    share: Share, request: Request, out: Tensor, statistics: Tensor, do: Tensor, dlse: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Those of q, k, v and the other tensors that are needed, in the dtype of scores. Of k and v there are
    both or neither, for ranks send them to one another."""
    q, k, v = request.q, request.k, request.v
    of_keys, wide = needs[1] or needs[2], computed_in(q.dtype)
    sinks = [name == "sink" for name, _ in request.other_tensors]
    asked = [needs[0], of_keys, of_keys]
    asked += [needed and not is_sink for needed, is_sink in zip(needs[3:], sinks, strict=True)]
    given = (q, k, v, *[tensor for _, tensor in request.other_tensors])
    total: list[Tensor | None] = [
        torch.zeros_like(x, dtype=wide) if needed and i not in (1, 2) else None
        for i, (x, needed) in enumerate(zip(given, asked, strict=True))
    ]
    pieces = without_sink(request)

    def compute(keys: Keys) -> Keys:
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (keys.k, keys.v))
        for rows, columns, piece in share.calls(pieces, keys):
            at = out[:, :, rows], statistics[:, :, :, rows], do[:, :, rows]
            slots = slots_of(piece, request)
            own = [asked[i] for i in slots]
            found = differentiate(piece, *at, None if dlse is None else dlse[:, :, rows], own)
            for i, grad in zip([i for i in slots if asked[i]], found, strict=True):
                where = dk[:, :, columns] if i == 1 else dv[:, :, columns] if i == 2 else total[i]
                assert where is not None
                (where[:, :, rows] if i == 0 else where).add_(grad)
        return Keys(keys.chunks, dk, dv)

    walk = share.walk(k, v)
    if of_keys:
        _, total[1], total[2] = walk.backward(compute)
    elif any(asked):
        walk.forward(compute)
    if request.sink is not None and needs[3 + sinks.index(True)]:
        delta = (do.to(wide) * out.to(wide)).sum(-1) - (0.0 if dlse is None else dlse)
        row_max, sum_log2 = statistics.unbind(0)
        delta = delta.masked_fill(row_max == -torch.inf, 0.0)
        total[3 + sinks.index(True)] = sink_gradient(request.sink, row_max, sum_log2, delta)
    return total
