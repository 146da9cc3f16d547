"""How the keys of all ranks come to each, and how their gradients go home.

    Ring      step by step, each while the keys of the step before are computed with. Memory O(N / ranks).
    Gathered  all steps at once, then one computation. Memory O(N), and fewer, larger calls.

In the backward the keys come again, and what was computed of them, dK and dV, goes straight back to who holds
them, where it is added in the order of the steps: the same mesh gives the same bits each time. Which chunks
go where is `blocks.ring`'s to say: none that nobody needs.

Method: Liu et al. 2023, "Ring attention with blockwise transformers for near-infinite context" (arXiv
2310.01889). Keys gathered: Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..parts.shape import computed_in
from .blocks import Step
from .exchange import Channel, Pending

Tensor = torch.Tensor


class Keys(NamedTuple):
    """Chunks of keys at hand, by their numbers, and k and v [batch, kv_heads, rows of the chunks, dim]; or
    the gradients of these."""

    chunks: tuple[int, ...]
    k: Tensor
    v: Tensor

    def rows(self, chunk: int) -> slice:
        """Where a chunk is among the rows."""
        each = self.k.shape[2] // len(self.chunks)
        at = self.chunks.index(chunk) * each
        return slice(at, at + each)

    def message(self, chunks: Sequence[int]) -> Tensor:
        """Some of the chunks, in one piece of memory: first k, then v."""
        parts = [torch.cat([x[:, :, self.rows(c)] for c in chunks], 2) for x in (self.k, self.v)]
        return torch.cat([x.flatten() for x in parts])

    def room(self, chunks: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Keys]:
        """Memory for a message of such chunks, and these as they will stand in it."""
        rows = len(chunks) * (self.k.shape[2] // len(self.chunks))
        k_sizes, v_sizes = ((*x.shape[:2], rows, x.shape[3]) for x in (self.k, self.v))
        split = math.prod(k_sizes)
        message = torch.empty(split + math.prod(v_sizes), dtype=dtype, device=self.k.device)
        return message, Keys(chunks, message[:split].view(k_sizes), message[split:].view(v_sizes))


class Arriving(NamedTuple):
    """Keys, or gradients, on their way."""

    pending: Pending
    keys: Keys

    def wait(self) -> Keys:
        self.pending.wait()
        return self.keys


Compute = Callable[[Keys], "Keys | None"]


class Walk:
    """Once around all keys, for a rank that has `own`: `compute` is called with all that some of its rows may
    see, piece by piece, and in the backward gives their gradients, in the dtype of scores."""

    def __init__(self, channel: Channel, steps: Sequence[Step], own: Keys) -> None:
        self.channel, self.steps, self.own = channel, steps, own

    def forward(self, compute: Compute) -> None:
        raise NotImplementedError

    def backward(self, compute: Compute) -> Keys:
        """The gradients of the own keys."""
        raise NotImplementedError

    def start(self, step: int) -> Arriving:
        """Let the keys of a step go and come, while something else is done."""
        plan = self.steps[step]
        sends = [(plan.target, self.own.message(plan.sent))] if plan.sent else []
        return self.arriving(sends, plan.source, plan.received, self.own.k.dtype, step)

    def start_back(self, step: int, gradients: Keys | None) -> Arriving:
        """Let the gradients of what came in a step go, and those of what went come."""
        plan, sends = self.steps[step], []
        if gradients is not None and plan.received:
            sends = [(plan.source, gradients.message(plan.received))]
        wide = computed_in(self.own.k.dtype)
        return self.arriving(sends, plan.target, plan.sent, wide, step)

    def arriving(
        self, sends: list[tuple[int, Tensor]], source: int, chunks: tuple[int, ...], dtype: torch.dtype,
        step: int,
    ) -> Arriving:  # fmt: skip
        message, keys = self.own.room(chunks, dtype)
        receives = [(source, message)] if chunks else []
        return Arriving(self.channel.start(sends, receives, step), keys)


def add(total: Keys, arrived: Keys, chunks: Sequence[int]) -> None:
    for chunk in chunks:
        for mine, theirs in ((total.k, arrived.k), (total.v, arrived.v)):
            mine[:, :, total.rows(chunk)] += theirs[:, :, arrived.rows(chunk)]


class Ring(Walk):
    def forward(self, compute: Compute) -> None:
        for _ in self.around(compute):
            pass

    def backward(self, compute: Compute) -> Keys:
        found = self.around(compute)
        total, late = next(found), None
        assert total is not None
        for step, gradients in enumerate(found, start=1):
            back = self.start_back(step, gradients)
            if late is not None:
                add(total, late.wait(), late.keys.chunks)
            late = back
        if late is not None:
            add(total, late.wait(), late.keys.chunks)
        return total

    def around(self, compute: Compute) -> Iterator[Keys | None]:
        """What `compute` makes of the keys of each step, of its own first; None where none came."""
        keys = self.own
        for step in range(len(self.steps)):
            coming = self.start(step + 1) if step + 1 < len(self.steps) else None
            yield compute(keys) if keys.chunks else None
            if coming is not None:
                keys = coming.wait()


class Gathered(Walk):
    def forward(self, compute: Compute) -> None:
        compute(self.gather())

    def backward(self, compute: Compute) -> Keys:
        gradients = compute(self.gather())
        assert gradients is not None
        back = [self.start_back(step, gradients) for step in range(1, len(self.steps))]
        wide = gradients.k.dtype
        total = Keys(self.own.chunks, *[torch.zeros_like(x, dtype=wide) for x in (self.own.k, self.own.v)])
        add(total, gradients, self.steps[0].received)
        for each in back:
            add(total, each.wait(), each.keys.chunks)
        return total

    def gather(self) -> Keys:
        """All keys that some row of the rank sees, in the order of the sequence."""
        coming = [self.start(step) for step in range(1, len(self.steps))]
        at_hand = [(chunk, self.own) for chunk in self.steps[0].received]
        for each in coming:
            keys = each.wait()
            at_hand += [(chunk, keys) for chunk in keys.chunks]
        at_hand.sort(key=lambda pair: pair[0])
        k = torch.cat([self.own.k[:, :, :0], *[keys.k[:, :, keys.rows(chunk)] for chunk, keys in at_hand]], 2)
        v = torch.cat([self.own.v[:, :, :0], *[keys.v[:, :, keys.rows(chunk)] for chunk, keys in at_hand]], 2)
        return Keys(tuple([chunk for chunk, _ in at_hand]), k, v)


WALKS: dict[str, type[Walk]] = {"ring": Ring, "all_gather": Gathered}
