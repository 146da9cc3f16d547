"""Plain PyTorch in fp32: what answers on a CPU outside the interpreter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

import tilewise_reference

from ..parts.similarity import Cosine
from ..plan.passes import empty_in_order_of
from ..plan.request import Request, is_autocast

Tensor = torch.Tensor


def run_torch(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch in fp32, differentiable; it holds the score matrix in memory."""
    q, k, v = request.q, request.k, request.v
    arguments = oracle_arguments(request)
    with torch.autocast(q.device.type, enabled=False) if is_autocast(q.device) else nullcontext():
        out, lse = tilewise_reference.attention(q, k, v, **arguments, return_lse=True, dtype=torch.float32)
    # A copy in q's dtype and memory order, as the kernel's result has them.
    return empty_in_order_of(request.q, out.shape[3]).copy_(out), lse if return_lse else None


def oracle_arguments(request: Request) -> dict[str, Any]:
    """The request as `tilewise_reference.attention` takes it: every mask and score by its twin."""
    similarity, dropped = request.similarity, {}
    if request.dropout is not None:
        p, seed = request.dropout
        keep = tilewise_reference.dropout_keep(seed, p, request.shape.scores, seed.device)
        dropped = dict(dropout_p=p, dropout_keep=keep)
    return dict(
        mask=[mask.twin(request.shape) for mask in request.masks],
        score=[score.twin(request.shape) for score in request.scores],
        scale=request.scale,
        similarity="cosine" if isinstance(similarity, Cosine) else similarity,
        temperature=similarity.temperature if isinstance(similarity, Cosine) else None,
        sink=request.sink,
        **dropped,
    )
