"""Which calls does a rank make of the pairs of chunks that see one another?

A call takes rows and keys that stand side by side in memory and, unless nothing depends on where they stand,
in the sequence. So pairs are put together, as many as fit, and what remains are the fewest calls:

    zig-zag, causal    own keys: three calls; keys of an earlier rank: one, all rows against its early chunk;
                       keys of a later rank: one, the late chunk against all of its keys
    all keys gathered  one call for each chunk of rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..parts.place import Place
from ..plan.request import Request
from .blocks import Blocks
from .order import Order


class PartCall(NamedTuple):
    """Some of a rank's rows against some of the keys at hand. rows, keys: where they are in what it holds;
    first_row, first_key: where they begin in the sequence; is_full: every pair counts."""

    rows: slice
    keys: slice
    first_row: int
    first_key: int
    is_full: bool


class Run(NamedTuple):
    """Chunks that stand side by side: where the first one is among those at hand, and their numbers."""

    at: int
    chunks: tuple[int, ...]

    def then(self, at: int, chunks: tuple[int, ...], anywhere: bool) -> Run | None:
        """With more chunks behind it; None if these are not behind it in memory, or, unless they may stand
        anywhere, in the sequence."""
        if at != self.at + len(self.chunks) or not (anywhere or chunks[0] == self.chunks[-1] + 1):
            return None
        return Run(self.at, self.chunks + chunks)


def part_calls(
    rank: int, at_hand: Sequence[int], blocks: Blocks, q_order: Order, kv_order: Order, is_free: bool
) -> list[PartCall]:
    """The calls of a rank's queries on the chunks of keys at hand, in their order there. is_free: scores do
    not depend on where rows and keys stand."""

    def all_full(q: Run, kv: Run) -> bool:
        return bool(blocks.full[list(q.chunks)][:, list(kv.chunks)].all())

    found: list[tuple[Run, Run]] = []
    for row_at, q in enumerate(q_order.held[rank]):
        runs: list[Run] = []
        one = Run(row_at, (q,))
        for at, kv in enumerate(at_hand):
            if not blocks.seen[q, kv]:
                continue
            here = Run(at, (kv,))
            anywhere = is_free and bool(runs) and all_full(one, here) and all_full(one, runs[-1])
            longer = runs[-1].then(at, (kv,), anywhere) if runs else None
            if longer is None:
                runs.append(here)
            else:
                runs[-1] = longer
        for run in runs:  # together with those of the chunk of rows before, where they are the same keys
            before = next((i for i, (_, keys) in enumerate(found) if keys == run), None)
            above = None
            if before is not None:
                rows = found[before][0]
                above = rows.then(row_at, (q,), is_free and all_full(one, run) and all_full(rows, run))
            if before is None or above is None:
                found.append((one, run))
            else:
                found[before] = (above, run)
    return [
        PartCall(
            slice(q.at * q_order.chunk, (q.at + len(q.chunks)) * q_order.chunk),
            slice(kv.at * kv_order.chunk, (kv.at + len(kv.chunks)) * kv_order.chunk),
            q_order.start(q.chunks[0]),
            kv_order.start(kv.chunks[0]),
            all_full(q, kv),
        )
        for q, kv in found
    ]


def is_free(request: Request) -> bool:
    """Whether nothing but masks depends on where rows and keys stand."""
    return not request.scores and request.dropout is None


def part_request(request: Request, call: PartCall, k: torch.Tensor, v: torch.Tensor) -> Request:
    """The request of one call: its rows, of the rank's request, against its keys, of those at hand."""
    assert request.place is not None
    place: Place | None = request.place._replace(first_row=call.first_row, first_key=call.first_key)
    if call.is_full and is_free(request):
        place = None  # nobody asks
    q, k, v = request.q[:, :, call.rows], k[:, :, call.keys], v[:, :, call.keys]
    return replace(request, q=q, k=k, v=v, masks=() if call.is_full else request.masks, place=place)
