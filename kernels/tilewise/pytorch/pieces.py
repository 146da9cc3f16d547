"""A packed call as one call a sequence: how plain PyTorch answers it.

The host reads the offsets for it, which waits for a GPU; so here bad ones are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..parts.shape import Packing
from ..plan.request import Request

Tensor = torch.Tensor
Answer = Callable[[Request, int], tuple[Tensor, Tensor]]


def by_sequence(request: Request, answer: Answer) -> tuple[Tensor, Tensor]:
    """out [1, q_heads, tokens, value_dim] and lse [1, q_heads, tokens] of a packed request. `answer` is given
    the request that is left of each sequence, a batch of 1, and the sequence's number. Rows of no sequence
    give 0 and -inf."""
    packing, shape = request.packing, request.shape
    assert packing is not None
    reasons = offset_errors(packing, shape.q_len, shape.kv_len)
    if reasons:
        raise ValueError("; ".join(reasons))
    q_starts, kv_starts = (offsets.tolist() for offsets in packing.offsets())
    outs, lses = [], []
    for batch in range(shape.batch):
        q_rows, kv_rows = slice(*q_starts[batch : batch + 2]), slice(*kv_starts[batch : batch + 2])
        q, k, v = request.q[:, :, q_rows], request.k[:, :, kv_rows], request.v[:, :, kv_rows]
        check_reach(request, q.shape[2], k.shape[2], batch)
        out, lse = answer(replace(request, q=q, k=k, v=v, packing=None), batch)
        outs.append(out)
        lses.append(lse)
    before, behind = q_starts[0], shape.q_len - q_starts[-1]
    zeros = [out.new_zeros(1, shape.q_heads, rows, shape.value_dim) for rows in (before, behind)]
    nothing = [lse.new_full((1, shape.q_heads, rows), -torch.inf) for rows in (before, behind)]
    return (
        torch.cat([zeros[0], *outs, zeros[1]], dim=2),
        torch.cat([nothing[0], *lses, nothing[1]], dim=2),
    )


def check_reach(request: Request, q_len: int, kv_len: int, batch: int) -> None:
    """Raise ValueError for a mask or score whose tensor is shorter than the sequence."""
    for part in request.plugs:
        q_reach, kv_reach = part.extents(request.shape)
        if q_len > q_reach or kv_len > kv_reach:
            raise ValueError(
                f"{part.called()} has tensors for {q_reach} queries and {kv_reach} keys, and sequence "
                f"{batch} has {q_len} and {kv_len}: they must be as long as the longest sequence"
            )


def offset_errors(packing: Packing, q_rows: int, kv_rows: int | None = None) -> list[str]:
    """What is wrong with the offsets of tensors of q_rows and kv_rows (None: as many) tokens."""
    found = []
    named = {"q_offsets": (packing.q_offsets, q_rows)}
    if packing.kv_offsets is not None:
        named["kv_offsets"] = (packing.kv_offsets, q_rows if kv_rows is None else kv_rows)
    for name, (offsets, rows) in named.items():
        starts: list[int] = offsets.tolist()
        falls = [i for i in range(1, len(starts)) if starts[i] < starts[i - 1]]
        if falls:
            i = falls[0]
            found.append(
                f"{name}[{i}]={starts[i]} is below {name}[{i - 1}]={starts[i - 1]}: offsets must not decrease"
            )
        outside = [i for i, start in enumerate(starts) if not 0 <= start <= rows]
        if outside:
            i = outside[0]
            found.append(f"{name}[{i}]={starts[i]} is outside the {rows} tokens of the tensor")
    return found
