"""Attention in forward mode, by formula, not by autograd: dense, slow, to be read beside the tangent kernel.

A tangent says how fast something changes: tq, tk, tv and those of the parameters are given, and for whatever
``attention`` computes on its way, x, its own is tx. Going through the equations of ``attention``, x_ij now
being similarity(q_i, k_j) and c = scale · temperature:

    tx_ij = tq_i · k_j + q_i · tk_j
    ts    = c tx + tc x
    ts    = ts · (d modifier / d s) + Σ tθ · (d modifier / d θ)     score modifiers, the first one first
    tm_i  = Σ_j p_ij ts_ij + exp(sink - lse_i) tsink                that of lse
    tp_ij = p_ij (ts_ij - tm_i)
    to_i  = Σ_j tp_ij Z_ij v_j + p_ij Z_ij tv_j                     Z = dropout_keep / (1 - dropout_p)
    tx̂    = (tx - (x̂ · tx) x̂) / |x|                                cosine: x̂ = x / |x|, a row of q or k

θ is what a modifier reads, a slope, say. Why tm: lse is a logarithm of a sum of exponentials, whose
derivatives are the weights; and p = exp(s - lse).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .attention import SHORTEST, Forward, Options, forward
from .gradients import differentiable, unit_rows
from .scores import Score

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Along(Options, total=False):
    """The keyword arguments of ``tangent`` and ``second``: tangents, and the options of ``attention``."""

    q_tangent: Tensor | None
    k_tangent: Tensor | None
    v_tangent: Tensor | None
    bias_tangent: Tensor | None
    scale_tangent: Tensor | None
    temperature_tangent: Tensor | None
    sink_tangent: Tensor | None
    score_tangents: Sequence[Sequence[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Moved:
    """What attention computes on its way to out, and the tangent of each, a t before its name."""

    fwd: Forward
    modifiers: tuple[Score, ...]
    tq: Tensor  # [B, Hq, Nq, D], of what is multiplied, as in Forward: for the cosine, of rows of length 1
    tk: Tensor  # [B, Hq, Nk, D]
    tv: Tensor  # [B, Hq, Nk, Dv]
    tlengths: tuple[Tensor, Tensor] | None  # of the divisors of q and k, in their shapes
    x: Tensor  # [B, Hq, Nq, Nk], q · k
    tx: Tensor  # [B, Hq, Nq, Nk]
    tscale: Tensor | float
    ttemperature: Tensor | float
    tinputs: tuple[Tensor, ...]  # of s as each modifier received it, 0 where the mask does not keep the pair
    treads: tuple[tuple[Tensor, ...], ...]  # of what each pair reads, for each modifier one a parameter
    ts: Tensor  # [B, Hq, Nq, Nk], after all modifiers
    tsink: Tensor  # [Hq, 1]
    tm: Tensor  # [B, Hq, Nq]
    tp: Tensor  # [B, Hq, Nq, Nk], before dropout
    to: Tensor  # [B, Hq, Nq, Dv]


@torch.no_grad()
def tangent(q: Tensor, k: Tensor, v: Tensor, **given: Unpack[Along]) -> tuple[Tensor, Tensor]:
    """The tangents of out [B, Hq, Nq, Dv] and lse [B, Hq, Nq], as ``attention`` returns these, in ``dtype``.

    q_tangent, k_tangent, v_tangent, bias_tangent, scale_tangent, temperature_tangent, sink_tangent: each in
    the shape of its tensor. score_tangents: for each score, in order, one for each of its parameters. None is
    0, and all are None by default. The other arguments are those of ``attention``.

    A row with no key has tangents exactly 0 (with a sink, its lse has the sink's), and no tangent of a row
    that nobody looks at, NaN or Inf, reaches another. Raises ValueError where ``attention`` does, for a
    tangent of another shape than its tensor or of what is no tensor, and for a score that is no
    ``scores.Score``.
    """
    moved = move(q, k, v, given)
    return moved.to, moved.tm


def move(q: Tensor, k: Tensor, v: Tensor, given: Along) -> Moved:
    """``tangent``, with everything that it computes on its way."""
    options = cast("Options", {name: x for name, x in given.items() if name in Options.__annotations__})
    fwd = forward(q, k, v, **options)
    modifiers = tuple(differentiable(modify) for modify in fwd.modifiers)

    def of(name: str, tensor: object) -> Tensor:
        found = cast("Tensor | None", given.get(f"{name}_tangent"))
        return _tangent_of(f"{name}_tangent", found, tensor, fwd)

    # Rows nobody looks at stay 0. A head of k and v for every query head.
    group = q.shape[1] // k.shape[1]
    tq = of("q", q).masked_fill(fwd.q_unseeing[..., None], 0)
    tk, tv = (
        tx.masked_fill(fwd.kv_unseen[..., None], 0).repeat_interleave(group, dim=1)
        for tx in (of("k", k), of("v", v))
    )
    tlengths = None
    if fwd.divisors is not None:
        tlengths = _length(tq, fwd.q, fwd.divisors[0]), _length(tk, fwd.k, fwd.divisors[1])
        tq, tk = unit_rows(tq, fwd.q, fwd.divisors[0]), unit_rows(tk, fwd.k, fwd.divisors[1])

    # tX = tQ Kᵀ + Q tKᵀ                                                 [B, Hq, Nq, Nk]
    x = fwd.q @ fwd.k.transpose(2, 3)
    tx = tq @ fwd.k.transpose(2, 3) + fwd.q @ tk.transpose(2, 3)
    # tS = c tX + tc X, c = scale · temperature
    tscale = of("scale", given.get("scale"))
    ttemperature = of("temperature", given.get("temperature")).reshape(-1, 1, 1)
    tc = tscale * fwd.temperature + fwd.scale * ttemperature
    ts = ((fwd.scale * fwd.temperature) * tx + tc * x).masked_fill(~fwd.keep, 0)

    # The scores, the first one first. A derivative may be NaN where the mask does not keep the pair.
    tinputs, treads = [], []
    for modify, s, tangents in zip(modifiers, fwd.inputs, _of_scores(given, modifiers), strict=True):
        reads = tuple(
            parameter.read(_tangent_of(name, found, parameter.tensor, fwd), *fwd.index)
            for parameter, (name, found) in zip(modify.parameters, tangents, strict=True)
        )
        tinputs.append(ts)
        treads.append(reads)
        ts = ts * modify.derivative(s, *fwd.index)
        for parameter, read in zip(modify.parameters, reads, strict=True):
            ts = ts + read * parameter.derivative(s, *fwd.index)
        ts = ts.masked_fill(~fwd.keep, 0)

    # tm = rowsum(P tS) + P_sink tsink                                   [B, Hq, Nq]
    tsink = of("sink", given.get("sink")).reshape(-1, 1)
    tm = (fwd.p * ts).sum(dim=3) + fwd.p_sink * tsink
    # tP = P (tS - tm)                                                   [B, Hq, Nq, Nk]
    tp = fwd.p * (ts - tm[..., None])
    # tO = (tP Z) V + (P Z) tV                                           [B, Hq, Nq, Dv]
    to = ((tp * fwd.dropout) @ fwd.v + fwd.p_dropped @ tv).masked_fill(fwd.q_unseeing[..., None], 0)
    return Moved(
        fwd=fwd, modifiers=modifiers, tq=tq, tk=tk, tv=tv, tlengths=tlengths, x=x, tx=tx, tscale=tscale,
        ttemperature=ttemperature, tinputs=tuple(tinputs), treads=tuple(treads), ts=ts, tsink=tsink, tm=tm,
        tp=tp, to=to,
    )  # fmt: skip


def _tangent_of(name: str, found: Tensor | None, tensor: object, fwd: Forward) -> Tensor:
    """The tangent in dtype, 0 for None."""
    if not isinstance(tensor, Tensor):
        if found is not None:
            raise ValueError(f"{name} is given, but {name.removesuffix('_tangent')}={tensor!r} is no tensor")
        return torch.zeros((), dtype=fwd.out.dtype, device=fwd.out.device)
    if found is None:
        return torch.zeros_like(tensor, dtype=fwd.out.dtype)
    if found.shape != tensor.shape:
        raise ValueError(f"{name}.shape={tuple(found.shape)} must be {tuple(tensor.shape)}, its tensor's")
    return found.to(fwd.out.dtype)


def _of_scores(given: Along, modifiers: Sequence[Score]) -> list[list[tuple[str, Tensor | None]]]:
    """For each modifier, the bias as the last of them, each parameter's tangent and what to call it."""
    found = list(given.get("score_tangents", ()))
    sizes = [len(modify.parameters) for modify in modifiers]
    biased = given.get("bias") is not None
    scores = sizes[:-1] if biased else sizes
    found = found or [[None] * size for size in scores]
    if [len(tangents) for tangents in found] != scores:
        raise ValueError(
            f"score_tangents has {[len(t) for t in found]} tangents, one a parameter is {scores}"
        )
    named = [
        [(f"score_tangents[{i}][{j}]", t) for j, t in enumerate(tangents)] for i, tangents in enumerate(found)
    ]
    return [*named, [("bias_tangent", given.get("bias_tangent"))]] if biased else named


def _length(tx: Tensor, unit: Tensor, divisor: Tensor) -> Tensor:
    """The tangent of max(|x|, SHORTEST): how much of tx points along the row."""
    return (unit * tx).sum(dim=-1, keepdim=True).masked_fill(divisor <= SHORTEST, 0)
