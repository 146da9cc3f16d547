"""Which chunk of queries sees which chunk of keys, and what follows for a ring: who sends what, who computes
what. Numbers alone: the run and the planner of `tilewise explain --ranks` ask the same functions.

In step s of a ring, rank r sends to rank r + s those of its chunks of keys that the queries there see, and
receives what its own queries see from rank r - s. Step 0 is its own keys, which it has. A chunk goes straight
to who needs it, and to nobody else.

Method: Liu et al. 2023, "Ring attention with blockwise transformers" (arXiv 2310.01889), whose blocks go from
neighbour to neighbour instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..parts.masks.mask import Mask
from ..parts.shape import Shape
from .order import Order


class Blocks(NamedTuple):
    """seen: whether some row of a chunk of queries may see a key of a chunk of keys; full: whether all of its
    rows surely see all of its keys. bool [q_chunks, kv_chunks], on the CPU."""

    seen: torch.Tensor
    full: torch.Tensor


class Step(NamedTuple):
    """One step of one rank. sent: the chunks of its own keys that go to rank `target`; received: those that
    come from rank `source`; pairs: (chunk of its queries, chunk of the received keys) that see one another;
    with neither sent nor received there is nothing to do."""

    target: int
    sent: tuple[int, ...]
    source: int
    received: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


def blocks_of(masks: Sequence[Mask], shape: Shape, q_order: Order, kv_order: Order) -> Blocks:
    """The blocks of a call of this (whole) shape, from the bounds of its masks: a pair inside all bounds may
    still be masked by a mask that goes pair by pair. Reads the masks' tensors: the host waits for the GPU."""
    q_chunk, kv_chunk, size = q_order.chunk, kv_order.chunk, (q_order.chunks, kv_order.chunks)
    if 0 in (shape.batch, shape.q_len, shape.kv_len):
        nothing = torch.zeros(size, dtype=torch.bool, device="cpu")
        return Blocks(nothing, nothing)
    lo = torch.zeros(shape.q_len, dtype=torch.int64, device="cpu")
    hi = torch.full_like(lo, shape.kv_len)
    whole = torch.ones(shape.q_len, dtype=torch.bool, device="cpu")
    for mask in masks:
        bounds = mask.bounds(shape)
        if bounds is None:
            whole = torch.zeros_like(whole)
        else:
            lo, hi = torch.maximum(lo, bounds.lo), torch.minimum(hi, bounds.hi)
            whole = whole & bounds.whole
    # A row sees from the chunk of its first key to that of its last one: +1 where this begins, -1 behind it.
    first, last = lo.clamp(min=0) // kv_chunk, (hi - 1).clamp(max=shape.kv_len - 1) // kv_chunk
    sees = lo < hi
    row_chunk = (torch.arange(shape.q_len, device="cpu") // q_chunk).expand(sees.shape)
    edges = torch.zeros(size[0], size[1] + 1, dtype=torch.int64, device="cpu")
    for column, change in ((first, 1), (last + 1, -1)):
        at = row_chunk[sees], column.expand(sees.shape)[sees]
        edges.index_put_(at, torch.tensor(change, device="cpu"), accumulate=True)
    seen = edges.cumsum(1)[:, :-1] > 0
    # All rows of a chunk see the keys from the last lo to the first hi, where none of these is masked.
    lo, hi, whole = (x.expand(sees.shape).reshape(-1, size[0], q_chunk) for x in (lo, hi, whole))
    last_lo, first_hi = lo.amax((0, 2))[:, None], hi.amin((0, 2))[:, None]  # [q_chunks, 1]
    start = torch.arange(size[1], device="cpu") * kv_chunk  # [kv_chunks]
    full = whole.all(2).all(0)[:, None] & (last_lo <= start) & (first_hi >= start + kv_chunk)
    return Blocks(seen, full)


def needed(seen: torch.Tensor, q_order: Order, rank: int) -> list[bool]:
    """Whether some query of the rank sees each chunk of keys."""
    found: list[bool] = seen[list(q_order.held[rank])].any(0).tolist()
    return found


def ring(rank: int, seen: torch.Tensor, q_order: Order, kv_order: Order) -> list[Step]:
    """The steps of a rank, the first with its own keys."""
    ranks = q_order.ranks
    mine, found = needed(seen, q_order, rank), []
    for step in range(ranks):
        target, source = (rank + step) % ranks, (rank - step) % ranks
        theirs = needed(seen, q_order, target)
        sent = tuple([chunk for chunk in kv_order.held[rank] if theirs[chunk]])
        received = tuple([chunk for chunk in kv_order.held[source] if mine[chunk]])
        pairs = [(q, kv) for q in q_order.held[rank] for kv in received if seen[q, kv]]
        found.append(Step(target, sent, source, received, tuple(pairs)))
    return found
