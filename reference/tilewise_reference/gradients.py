"""The gradients of attention by formula, not by autograd: dense, slow, to be read beside the backward kernel.

With Z = dropout_keep / (1 - dropout_p) and o = (p Z) v, going back through the equations of ``attention``:

    dv_j    = Σ_i p_ij Z_ij do_i
    dp_ij   = Z_ij (do_i · v_j)
    delta_i = do_i · o_i - dlse_i
    ds_ij   = p_ij (dp_ij - delta_i)                        0 where the mask does not keep the pair
    dsink   = -Σ_i exp(sink - lse_i) delta_i                a key whose value, and so dp, is 0
    dbias   = Σ ds over the dimensions along which the bias was repeated
    ds      = ds · (d modifier / d s)                       score modifiers, the last one first
    ds      = scale · temperature · ds                      now of similarity(q, k) = q · k
    dq_i    = Σ_j ds_ij k_j
    dk_j    = Σ_i ds_ij q_i
    dx      = (dx̂ - (x̂ · dx̂) x̂) / |x|                      cosine: x̂ = x / |x|, for the rows of q and k

dk and dv of a key/value head are summed over its group of query heads.

Why delta: the softmax gives ds_ij = p_ij (dp_ij - Σ_j p_ij dp_ij), and that sum is do_i · Σ_j p_ij Z_ij v_j
= do_i · o_i, over value_dim numbers instead of all keys (FlashAttention, Dao et al. 2022, arXiv 2205.14135,
appendix B.2). And d lse_i / d s_ij = p_ij, so a gradient of lse only moves delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .attention import SHORTEST, Forward, Options, forward
from .scores import Parameter, Score

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Gradients(NamedTuple):
    """Each in the shape of its input and in ``dtype``; None for an input that was not given as a tensor."""

    q: Tensor  # [B, Hq, Nq, D]
    k: Tensor  # [B, Hkv, Nk, D]
    v: Tensor  # [B, Hkv, Nk, Dv]
    bias: Tensor | None
    scale: Tensor | None
    temperature: Tensor | None
    sink: Tensor | None  # [Hq]
    scores: tuple[tuple[Tensor, ...], ...]  # for each score modifier, in order, one a parameter


@torch.no_grad()
def gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None, **options: Unpack[Options]
) -> Gradients:
    """The gradients of Σ dout · out + Σ dlse · lse, where out and lse are those of ``attention``.

    dout [B, Hq, Nq, Dv]; dlse [B, Hq, Nq], by default 0. The other arguments are those of ``attention``.

    Rows nobody looks at have gradient exactly 0, and nothing in them, NaN or Inf, reaches another gradient;
    nor does dout of a query that sees no key, nor dlse where lse is -inf. Raises ValueError where
    ``attention`` does, for a dout or dlse of another shape than out and lse, and for a score that is no
    ``scores.Score``.
    """
    fwd = forward(q, k, v, **options)
    modifiers = [differentiable(modify) for modify in fwd.modifiers]
    do, dlse = arriving(fwd, dout, dlse)

    # dV = (P Z)ᵀ dO                                                     [B, Hq, Nk, Dv]
    dv = fwd.p_dropped.transpose(2, 3) @ do
    # dP = Z (dO Vᵀ)                                                     [B, Hq, Nq, Nk]
    dp = fwd.dropout * (do @ fwd.v.transpose(2, 3))
    # delta = rowsum(dO O) - dlse                                        [B, Hq, Nq]
    delta = (do * fwd.out).sum(dim=3) - dlse
    # dS = P (dP - delta)                                                [B, Hq, Nq, Nk]
    ds = (fwd.p * (dp - delta[..., None])).masked_fill(~fwd.keep, 0)
    dsink = -(fwd.p_sink * delta).sum(dim=(0, 2))  # [Hq]

    # The scores, the last one first. A derivative may be NaN where the mask does not keep the pair.
    dscores: list[tuple[Tensor, ...]] = []
    for modify, s in zip(reversed(modifiers), reversed(fwd.inputs), strict=True):
        dscores.insert(0, tuple(_by_parameter(p, ds, s, fwd) for p in modify.parameters))
        ds = (ds * modify.derivative(s, *fwd.index)).masked_fill(~fwd.keep, 0)
    dbias = None
    if options.get("bias") is not None:
        (dbias,) = dscores.pop()

    # S = scale · temperature · Q Kᵀ
    dscale, dtemperature = _factors(ds, fwd, options.get("temperature"))
    ds = (fwd.scale * fwd.temperature) * ds
    dq = ds @ fwd.k  # [B, Hq, Nq, D]
    dk = ds.transpose(2, 3) @ fwd.q  # [B, Hq, Nk, D]
    if fwd.divisors is not None:
        dq, dk = unit_rows(dq, fwd.q, fwd.divisors[0]), unit_rows(dk, fwd.k, fwd.divisors[1])

    # Query heads of one group share their keys and values; rows set to 0 do not depend on what they held.
    kv_heads = k.shape[1]
    dk, dv = (t.unflatten(1, (kv_heads, q.shape[1] // kv_heads)).sum(dim=2) for t in (dk, dv))
    return Gradients(
        q=dq.masked_fill(fwd.q_unseeing[..., None], 0),
        k=dk.masked_fill(fwd.kv_unseen[..., None], 0),
        v=dv.masked_fill(fwd.kv_unseen[..., None], 0),
        bias=dbias,
        scale=dscale,
        temperature=dtemperature,
        sink=None if options.get("sink") is None else dsink,
        scores=tuple(dscores),
    )


def arriving(fwd: Forward, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of out and lse in dtype, 0 where these are constants: out = 0 of a row with no key, and
    lse = -inf."""
    dlse = torch.zeros_like(fwd.lse) if dlse is None else dlse
    if dout.shape != fwd.out.shape or dlse.shape != fwd.lse.shape:
        raise ValueError(
            f"{tuple(dout.shape)=} must be {tuple(fwd.out.shape)} and {tuple(dlse.shape)=} must be "
            f"{tuple(fwd.lse.shape)}, the shapes of out and lse"
        )
    do = dout.to(fwd.out.dtype).masked_fill(fwd.q_unseeing[..., None], 0)  # [B, Hq, Nq, Dv]
    return do, dlse.to(fwd.lse.dtype).masked_fill(fwd.lse.isneginf(), 0)  # [B, Hq, Nq]


def _by_parameter(parameter: Parameter, ds: Tensor, s: Tensor, fwd: Forward) -> Tensor:
    """Its gradient: what each pair has to say to the element that it reads."""
    by_pair = (ds * parameter.derivative(s, *fwd.index)).masked_fill(~fwd.keep, 0)
    return parameter.total(by_pair, *fwd.index)


def differentiable(modify: object) -> Score:
    """The score, or a ValueError that says what to give instead."""
    if not isinstance(modify, Score):
        raise ValueError(
            f"score={modify!r} has no derivative; give tilewise_reference.scores.Score(function, derivative, "
            "parameters)"
        )
    return modify


def _factors(
    ds: Tensor, fwd: Forward, temperature: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of scale and temperature, None where these are no tensors; ds is that of their product
    with QKᵀ."""
    dscale = dtemperature = None
    if isinstance(fwd.scale, Tensor) or isinstance(fwd.temperature, Tensor):
        dfactor = ds * (fwd.q @ fwd.k.transpose(2, 3))  # [B, Hq, Nq, Nk]
    if isinstance(fwd.scale, Tensor):
        dscale = (dfactor * fwd.temperature).sum_to_size(fwd.scale.shape)
    if isinstance(fwd.temperature, Tensor) and isinstance(temperature, Tensor):
        dtemperature = (dfactor * fwd.scale).sum_to_size(fwd.temperature.shape).reshape(temperature.shape)
    return dscale, dtemperature


def unit_rows(dunit: Tensor, unit: Tensor, divisor: Tensor) -> Tensor:
    """Back through unit = x / max(|x|, SHORTEST): what points along a row only changes its length, which the
    division takes away, unless the row is too short for it."""
    along = (unit * dunit).sum(dim=-1, keepdim=True).masked_fill(divisor <= SHORTEST, 0)
    return (dunit - along * unit) / divisor
