"""Second derivatives of attention by formula, not by autograd: dense, slow, to be read beside its kernels.

``gradients`` computes dq, dk, dv, ... from dout and dlse. Here these are what changes: all tensors move along
their tangents, dout and dlse stay, and the tangent of each gradient is wanted. By the symmetry of second
derivatives that is also the gradient of Σ dout · tout + Σ dlse · tlse, where tout and tlse are ``tangent``.
Going through the equations of ``gradients`` line by line, a t before the name of each:

    tdp_ij   = Z_ij (do_i · tv_j)
    tdelta_i = do_i · to_i                                          do and dlse stay
    tds_ij   = tp_ij (dp_ij - delta_i) + p_ij (tdp_ij - tdelta_i)
    tdv_j    = Σ_i tp_ij Z_ij do_i
    tdsink   = -Σ_i exp(sink - lse_i) ((tsink - tm_i) delta_i + tdelta_i)
    tdθ      = Σ tds · f_θ + ds · (f_sθ ts + Σ_θ' f_θθ' tθ')        of a modifier f, the last one first
    tds      = tds · f_s + ds · (f_ss ts + Σ_θ f_sθ tθ)             ds and ts on either side of it
    tds      = c tds + tc ds                                        c = scale · temperature: now of q · k
    tdq_i    = Σ_j tds_ij k_j + ds_ij tk_j
    tdk_j    = Σ_i tds_ij q_i + ds_ij tq_i

Indices of f are derivatives by s and by what it reads, θ. Cosine: with a = x̂ · dx̂, dx = (dx̂ - x̂ a) / |x|, so

    tdx      = (tdx̂ - x̂ (x̂ · tdx̂) - tx̂ a - x̂ (tx̂ · dx̂) - t|x| dx) / |x|
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import SHORTEST
from .gradients import Gradients, arriving, unit_rows
from .scores import Pair, ScoreFn
from .tangent import Along, Moved, move

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.no_grad()
def second(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None, **given: Unpack[Along]
) -> Gradients:
    """The tangents of what ``gradients`` returns, where dout and dlse do not change.

    dout [B, Hq, Nq, Dv]; dlse [B, Hq, Nq], by default 0. The other arguments are those of ``tangent``. What
    ``gradients`` says of rows that nobody looks at holds for the tangents too. Raises ValueError where it
    and ``tangent`` do, and for a score that has no second derivatives.
    """
    moved = move(q, k, v, given)
    fwd = moved.fwd
    for modify in moved.modifiers:
        if modify.second_derivatives is None:
            raise ValueError(
                f"score={modify!r} has no second derivatives; give tilewise_reference.scores.Score(..., "
                "second_derivatives={...}), {} if all are 0"
            )
    do, dlse = arriving(fwd, dout, dlse)

    # dP = Z (dO Vᵀ), tdP = Z (dO tVᵀ)                                   [B, Hq, Nq, Nk]
    dp = fwd.dropout * (do @ fwd.v.transpose(2, 3))
    tdp = fwd.dropout * (do @ moved.tv.transpose(2, 3))
    # delta = rowsum(dO O) - dlse, tdelta = rowsum(dO tO)                [B, Hq, Nq]
    delta = (do * fwd.out).sum(dim=3) - dlse
    tdelta = (do * moved.to).sum(dim=3)
    # dS = P (dP - delta), tdS = tP (dP - delta) + P (tdP - tdelta)      [B, Hq, Nq, Nk]
    ds = fwd.p * (dp - delta[..., None])
    tds = moved.tp * (dp - delta[..., None]) + fwd.p * (tdp - tdelta[..., None])
    # tdV = (tP Z)ᵀ dO                                                   [B, Hq, Nk, Dv]
    tdv = (moved.tp * fwd.dropout).transpose(2, 3) @ do
    tdsink = -(fwd.p_sink * ((moved.tsink - moved.tm) * delta + tdelta)).sum(dim=(0, 2))  # [Hq]

    # The scores, the last one first. A derivative may be NaN where the mask does not keep the pair.
    tdscores: list[tuple[Tensor, ...]] = []
    for i in reversed(range(len(moved.modifiers))):
        modify = moved.modifiers[i]
        by_s, *by_parameters = _slopes(moved, i)
        ds, tds = (x.masked_fill(~fwd.keep, 0) for x in (ds, tds))
        tdscores.insert(0, tuple(
            parameter.total((tds * f + ds * tf).masked_fill(~fwd.keep, 0), *fwd.index)
            for parameter, (f, tf) in zip(modify.parameters, by_parameters, strict=True)
        ))  # fmt: skip
        f, tf = by_s
        ds, tds = ds * f, tds * f + ds * tf
    ds, tds = (x.masked_fill(~fwd.keep, 0) for x in (ds, tds))
    tdbias = None
    if given.get("bias") is not None:
        (tdbias,) = tdscores.pop()

    # S = c X, X = Q Kᵀ
    tdscale, tdtemperature = _factors(ds, tds, moved, given.get("temperature"))
    c = fwd.scale * fwd.temperature
    tc = moved.tscale * fwd.temperature + fwd.scale * moved.ttemperature
    ds, tds = c * ds, c * tds + tc * ds
    tdq = tds @ fwd.k + ds @ moved.tk  # [B, Hq, Nq, D]
    tdk = tds.transpose(2, 3) @ fwd.q + ds.transpose(2, 3) @ moved.tq  # [B, Hq, Nk, D]
    if fwd.divisors is not None and moved.tlengths is not None:
        dq, dk = ds @ fwd.k, ds.transpose(2, 3) @ fwd.q
        tdq = _unit_rows(dq, tdq, fwd.q, moved.tq, fwd.divisors[0], moved.tlengths[0])
        tdk = _unit_rows(dk, tdk, fwd.k, moved.tk, fwd.divisors[1], moved.tlengths[1])

    # Query heads of one group share their keys and values; rows set to 0 do not depend on what they held.
    kv_heads = k.shape[1]
    tdk, tdv = (t.unflatten(1, (kv_heads, q.shape[1] // kv_heads)).sum(dim=2) for t in (tdk, tdv))
    return Gradients(
        q=tdq.masked_fill(fwd.q_unseeing[..., None], 0),
        k=tdk.masked_fill(fwd.kv_unseen[..., None], 0),
        v=tdv.masked_fill(fwd.kv_unseen[..., None], 0),
        bias=tdbias,
        scale=tdscale,
        temperature=tdtemperature,
        sink=None if given.get("sink") is None else tdsink,
        scores=tuple(tdscores),
    )


def _slopes(moved: Moved, i: int) -> list[tuple[Tensor, Tensor]]:
    """The derivatives of modifier i, by s and by what each of its parameters has for the pair, and their
    tangents."""
    modify, s, index = moved.modifiers[i], moved.fwd.inputs[i], moved.fwd.index
    first: dict[int | str, ScoreFn] = {
        "s": modify.derivative,
        **{n: p.derivative for n, p in enumerate(modify.parameters)},
    }
    moves: dict[int | str, Tensor] = {"s": moved.tinputs[i], **dict(enumerate(moved.treads[i]))}
    second = dict(modify.second_derivatives or {})
    found = []
    for one, derivative in first.items():
        tf = torch.zeros_like(s)
        for other, t in moves.items():
            pair: Pair = (one, other) if (one, other) in second else (other, one)
            if pair in second:
                tf = tf + second[pair](s, *index) * t
        found.append((derivative(s, *index), tf))
    return found


def _factors(
    ds: Tensor, tds: Tensor, moved: Moved, temperature: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The tangents of the gradients of scale and temperature, None where these are no tensors; ds is that of
    their product with X."""
    fwd, tdscale, tdtemperature = moved.fwd, None, None
    dfactor, tdfactor = ds * moved.x, tds * moved.x + ds * moved.tx  # [B, Hq, Nq, Nk]
    if isinstance(fwd.scale, Tensor):
        tdscale = tdfactor * fwd.temperature + dfactor * moved.ttemperature
        tdscale = tdscale.sum_to_size(fwd.scale.shape)
    if isinstance(fwd.temperature, Tensor) and isinstance(temperature, Tensor):
        tdtemperature = tdfactor * fwd.scale + dfactor * moved.tscale
        tdtemperature = tdtemperature.sum_to_size(fwd.temperature.shape).reshape(temperature.shape)
    return tdscale, tdtemperature


def _unit_rows(
    dunit: Tensor, tdunit: Tensor, unit: Tensor, tunit: Tensor, divisor: Tensor, tdivisor: Tensor
) -> Tensor:
    """The tangent of ``gradients.unit_rows``, of the way back through unit = x / divisor."""
    short = divisor <= SHORTEST
    a = (unit * dunit).sum(dim=-1, keepdim=True).masked_fill(short, 0)
    turned = (tunit * dunit).sum(dim=-1, keepdim=True).masked_fill(short, 0)
    moved = tunit * a + unit * turned + tdivisor * unit_rows(dunit, unit, divisor)
    return unit_rows(tdunit, unit, divisor) - moved / divisor
