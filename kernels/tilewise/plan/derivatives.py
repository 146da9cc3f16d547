"""One derivative more of a request: its tangents, and those of its gradients. docs/derivatives.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..kernels.tangents.call import SecondCall, TangentCall
from ..kernels.tangents.forward import launch_tangent
from ..kernels.tangents.keys import launch_keys
from ..kernels.tangents.parameters import second_parameter_gradient
from ..kernels.tangents.rows import launch_rows
from ..kernels.tangents.sums import launch_sums
from ..kernels.tile import Tile
from ..parts.place import Place, ask_read, ask_score, moved
from ..parts.scores.score import STATE, Parameter
from ..parts.scores.tangents import Moving, Second, moving, seconds_by
from ..parts.shape import Shape
from .bind import bind
from .cosine import Dots, as_dots, in_places, is_cosine, orthogonal, orthogonal_tangent, rows_of
from .passes import (
    empty_in_order_of,
    named_slots,
    of_own_part,
    run_backward,
    run_forward,
    sink_weights,
)
from .request import Request
from .tangent_tiles import choose_tangent_tile, square_tangent_tile

Tensor = torch.Tensor
Tangents = Sequence[Tensor | None]  # of q, k, v and `Request.other_tensors`; None: it does not move


def run_tangent(request: Request, statistics: Tensor, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """The tangents of out [batch, q_heads, q_len, value_dim], in its dtype, and of lse [batch, q_heads,
    q_len], in fp32; statistics are the forward's."""
    if request.cache is not None:
        raise NotImplementedError(
            "cached_attention has no derivatives, and a tensor of this call has a forward-mode tangent: call "
            "attention or packed_attention"
        )
    if is_cosine(request):
        return cosine_tangent(request, tangents)
    shape = request.shape
    tangent = tangent_call(request, statistics, tangents)
    mean = torch.empty_like(tangent.row_max)
    sink = next(
        (dx for (name, _), dx in zip(request.other_tensors, tangents[3:], strict=True) if name == "sink"),
        None,
    )
    if sink is not None and request.sink is not None:
        mean = sink_weights(request.sink, tangent.row_max, tangent.sum_log2) * sink.float()[:, None]
    out = empty_in_order_of(request.q, shape.value_dim)
    launch_tangent(tangent, out, mean, sink is not None, choose_tangent_tile(request.q, shape, "dq"))
    return out, mean


def run_second(
    request: Request,
    statistics: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    tangents: Tangents,
    mean: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The tangents of the gradients of those of (q, k, v, *other tensors) that `needs` names, in order and in
    their dtype, where do and dlse stand still; mean is the tangent of lse."""
    refuse_unknown_seconds(request)
    if is_cosine(request):
        return cosine_second(request, do, dlse, tangents, needs)
    q, k, v, shape = request.q, request.k, request.v, request.shape
    tangent = tangent_call(request, statistics, tangents)
    dlse, mean = None if dlse is None else dlse.contiguous(), mean.contiguous()
    tile = choose_tangent_tile(q, shape, "dkv")
    second = second_call(request, tangent, do, dlse, mean, tile)
    grads: dict[int, Tensor] = {}
    if needs[0]:
        grads[0] = empty_in_order_of(q, shape.head_dim)
        launch_rows(second, grads[0], choose_tangent_tile(q, shape, "dq"))
    if needs[1] or needs[2]:
        grads[1], grads[2] = empty_in_order_of(k, shape.head_dim), empty_in_order_of(v, shape.value_dim)
        launch_keys(second, grads[1], grads[2], tile)
    others, slots = request.other_tensors, named_slots(request)
    square = square_tangent_tile(tile)
    if square.tile_q != tile.tile_q and any(needs[3 + slot] for slot, *_ in slots):
        second = second_call(request, tangent, do, dlse, mean, square)
    for slot, modifier, name, parameter in slots:
        if needs[3 + slot]:
            tensor = others[slot][1]
            grads[3 + slot] = second_of_parameter(request, second, modifier, name, parameter, tensor, square)
    for slot, (name, tensor) in enumerate(others):
        if name == "sink" and needs[3 + slot]:
            grads[3 + slot] = second_of_sink(tensor, second, tangents[3 + slot]).to(tensor.dtype)
    return [grads[i] for i, needed in enumerate(needs) if needed]


def tangent_call(request: Request, statistics: Tensor, tangents: Tangents) -> TangentCall:
    call = bind(request)
    row_max, sum_log2 = statistics.contiguous().unbind(0)
    q, k, v = (
        x.new_zeros(()).expand(x.shape) if dx is None else dx.to(x.dtype)
        for x, dx in zip((request.q, request.k, request.v), tangents, strict=False)
    )
    derivatives = tuple([score.derivative for score in call.scores])
    moves = tuple(parameters_that_move(request, tangents))
    return TangentCall(call, row_max, sum_log2, q, k, v, moves, derivatives)


def parameters_that_move(request: Request, tangents: Tangents) -> Iterator[Moving]:
    place, own = request.place, len(request.similarity_scores.scores)
    for slot, modifier, name, parameter in named_slots(request):
        tangent = tangents[3 + slot]
        if tangent is None:
            continue
        found = moving(modifier, name, parameter, tangent)
        if place is not None and modifier >= own:  # read where the whole call reads it
            derivative = moved(ask_score, found.derivative)
            args = asked_of(parameter, place, request.whole), found.args
            found = Moving(modifier, name, moved(ask_read, found.read), args, derivative)
        yield found


def asked_of(parameter: Parameter, place: Place, whole: Shape) -> tuple[int, ...]:
    """`Place.asked` for a parameter's tangent, which may be of the part's own sequences and heads alone."""
    sizes = parameter.sizes or whole.scores  # a table has a row for each head of the whole call
    own = [
        first if n == full else 0 for n, first, full in zip(sizes, place.origin, whole.scores, strict=True)
    ]
    return *own, place.asked[4]


def second_call(
    request: Request, tangent: TangentCall, do: Tensor, dlse: Tensor | None, mean: Tensor, tile: Tile
) -> SecondCall:
    """With ranges of tiles of tile.tile_q rows."""
    delta, delta_dot, ranges = launch_sums(tangent, do, dlse, mean, tile)
    seconds = []
    for modifier, score in enumerate(request.chain):
        seconds += placed(request, modifier, seconds_by(STATE, score.seconds(), modifier, tangent.moving))
    return SecondCall(tangent, do, mean, delta, delta_dot, ranges, tuple(seconds))


def placed(request: Request, modifier: int, seconds: list[Second]) -> list[Second]:
    """The same as a part of a larger call asks them."""
    if request.place is None or modifier < len(request.similarity_scores.scores):
        return seconds
    return [(owner, by, moved(ask_score, function)) for owner, by, function in seconds]


def second_of_parameter(
    request: Request, second: SecondCall, modifier: int, name: str, parameter: Parameter, tensor: Tensor,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """The tangent of the gradient of a modifier's tensor."""
    seconds = seconds_by(name, request.chain[modifier].seconds(), modifier, second.tangent.moving)
    own_seconds = tuple(placed(request, modifier, seconds))

    def gradient(parameter: Parameter, tensor: Tensor) -> Tensor:
        return second_parameter_gradient(second, modifier, parameter, own_seconds, tensor, tile)

    return of_own_part(request, modifier, parameter, tensor, gradient)


def second_of_sink(sink: Tensor, second: SecondCall, tangent: Tensor | None) -> Tensor:
    """-Σ P_sink · delta once more: Ṗ_sink = P_sink · (sink's tangent - mean)."""
    p = sink_weights(sink, second.tangent.row_max, second.tangent.sum_log2)
    p_dot = -p * second.mean if tangent is None else p * (tangent.float()[:, None] - second.mean)
    return -(p_dot * second.delta + p * second.delta_dot).sum((0, 2))


def refuse_unknown_seconds(request: Request) -> None:
    """Raise NotImplementedError for a modifier whose second derivatives nobody knows."""
    reasons = [reason for score in request.chain if (reason := score.no_seconds()) is not None]
    if reasons:
        raise NotImplementedError("; ".join(reasons))


# ---- The cosine: its unit rows are derived outside of the kernels


def cosine_tangent(request: Request, tangents: Tangents) -> tuple[Tensor, Tensor]:
    dots = as_dots(request)
    statistics = run_forward(dots.request, return_lse=False, for_backward=True)[2]
    assert statistics is not None
    out, mean = run_tangent(dots.request, statistics, of_dots(dots, request, tangents))
    return empty_in_order_of(request.q, request.shape.value_dim).copy_(out), mean


def cosine_second(
    request: Request, do: Tensor, dlse: Tensor | None, tangents: Tangents, needs: Sequence[bool]
) -> list[Tensor]:
    """Of q and k: the second derivative in x̂ through J(x), and what J's own tangent makes of the first."""
    dots = as_dots(request)
    out, _, statistics = run_forward(dots.request, return_lse=False, for_backward=True)
    assert statistics is not None
    do, u = do.float(), of_dots(dots, request, tangents)
    own_needs = [*needs[:3], *in_places(dots, needs[3:])]
    rows_need = [*needs[:2], *[False] * (len(needs) - 2)]
    first = iter(run_backward(dots.request, out, statistics, do, dlse, rows_need))
    _, mean = run_tangent(dots.request, statistics, u)
    found = iter(run_second(dots.request, statistics, do, dlse, u, mean, own_needs))
    grads = {i: next(found) for i, needed in enumerate(own_needs) if needed}
    results = [grads.get(i) for i in (0, 1, 2, *[3 + place for place in dots.places])]
    for i, x in enumerate((request.q, request.k)):
        if (g_dot := results[i]) is not None:
            g = next(first)
            rows = rows_of(x, g.abs() + g_dot.abs())
            x_dot = tangents[i]
            own = 0.0 if x_dot is None else orthogonal_tangent(rows, g, x_dot.float())
            results[i] = orthogonal(rows, g_dot) + own
    given = request.q, request.k, request.v, *[x for _, x in request.other_tensors]
    return [dx.to(x.dtype) for dx, x in zip(results, given, strict=True) if dx is not None]


def of_dots(dots: Dots, request: Request, tangents: Tangents) -> list[Tensor | None]:
    """Tangents of the cosine's tensors as those of the dot products' tensors."""
    q, k = (
        None if dx is None else orthogonal(rows_of(x, dx), dx.float())
        for x, dx in zip((request.q, request.k), tangents, strict=False)
    )
    return [q, k, tangents[2], *in_places(dots, tangents[3:])]
