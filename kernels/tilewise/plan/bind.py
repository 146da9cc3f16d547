"""A request as the call that kernels take: its masks and scores tied to its sizes."""

from __future__ import annotations

from ..kernels.call import Call
from ..parts.fp8 import ValueScales, of_values
from ..parts.place import place_mask, place_score
from .request import Request


def bind(request: Request) -> Call:
    shape, whole, place, similarity = request.shape, request.whole, request.place, request.similarity_scores
    masks = [mask.bind(whole) for mask in request.masks]
    scores = [score.bind(whole) for score in request.scores]
    if place is not None:
        masks = [place_mask(mask, place) for mask in masks]
        scores = [place_score(score, place) for score in scores]
    asked = None if place is None else place.asked
    dropout = () if request.dropout is None else request.dropout.args(asked)
    v_scales = ValueScales()
    if request.scales is not None:
        v_scales = of_values(request.scales, shape, dropout[2] if dropout else 1.0)
    return Call(
        shape=shape,
        q=request.q,
        k=request.k,
        v=request.v,
        sink=request.sink,
        masks=tuple(masks),
        scores=(*[score.bind(shape) for score in similarity.scores], *scores),
        unit=similarity.unit,
        operand=similarity.operand,
        project=similarity.project,
        has_gaps=any([mask.has_gaps for mask in request.masks]),
        is_grouped=request.cache is not None,
        has_holes=request.has_holes,
        dropout=dropout,
        v_scales=v_scales,
    )
