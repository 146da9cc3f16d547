"""A request as the call that kernels take: its masks and scores tied to its sizes."""

from __future__ import annotations

from ..kernels.call import Call
from .request import Request


def bind(request: Request) -> Call:
    shape, chain = request.shape, request.chain
    return Call(
        shape=shape,
        q=request.q,
        k=request.k,
        v=request.v,
        sink=request.sink,
        masks=tuple([mask.bind(shape) for mask in request.masks]),
        scores=tuple([score.bind(shape) for score in chain]),
        unit=request.similarity_scores.unit,
        operand=request.similarity_scores.operand,
        project=request.similarity_scores.project,
        has_gaps=any([mask.has_gaps for mask in request.masks]),
        is_grouped=request.cache is not None,
        dropout=() if request.dropout is None else request.dropout.args(),
    )
