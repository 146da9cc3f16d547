"""How far from float64 may an answer be? About twice as far as PyTorch is, which computes it here in the same
dtype.

No element may be further from the float64 ``attention`` than

    fp16 or bf16        2 · E + one rounding            E: PyTorch's largest error in the same dtype
    fp32, and lse       10 · max(E, one rounding)       E: PyTorch's largest error in fp32

One rounding is half a unit in the last place of the element itself. "PyTorch in the same dtype" is the way
its math paths compute attention: Q Kᵀ in the dtype; scale, modifiers, mask and softmax in fp32; P rounded to
the dtype; P V in the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Mask, Similarity, _as_sequence, _check, _indices, _kept, kept_factor
from .scores import ScoreFn

if TYPE_CHECKING:
    from typing_extensions import Unpack

FLUSHED = torch.finfo(torch.float32).tiny  # below fp32's smallest normal number hardware may flush to zero


class Given(TypedDict, total=False):
    """The keyword arguments of ``pytorch_attention`` and ``math_attention``: those of ``attention``."""

    mask: Mask | Sequence[Mask] | None
    score: ScoreFn | Sequence[ScoreFn] | None
    scale: float | Tensor | None
    similarity: Similarity
    temperature: float | Tensor | None
    sink: Tensor | None
    dropout_p: float
    dropout_keep: Tensor | None


def pytorch_attention(q: Tensor, k: Tensor, v: Tensor, **given: Unpack[Given]) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] in q's dtype and lse [B, Hq, Nq] in fp32, as PyTorch computes them.

    Arguments as in ``attention``. Differentiable once by autograd; the gradients round where those of
    PyTorch's fused kernels do. What no query may see counts as 0: NaN there is no part of the yardstick.
    """
    out, lse = _SoftmaxValues.apply(*_scores(q, k, v, **given))
    return out, lse


def math_attention(q: Tensor, k: Tensor, v: Tensor, **given: Unpack[Given]) -> tuple[Tensor, Tensor]:
    """The same numbers, with all derivatives of all orders: as on PyTorch's math path, the gradients round
    where autograd does."""
    return _softmax_values(*_scores(q, k, v, **given))[:2]


def math_statistics(q: Tensor, k: Tensor, v: Tensor, **given: Unpack[Given]) -> tuple[Tensor, Tensor, Tensor]:
    """``statistics`` of the same scores: max_logit and entropy [B, Hq, Nq], and key_mass [B, Hkv, Nk], every
    query counted once; in fp32."""
    s, _, _ = _scores(q, k, v, **given)
    p, _ = _softmax(s)
    mass = p[..., : k.shape[2]].sum(2).unflatten(1, (k.shape[1], -1)).sum(2)  # a sink is no key
    return s[..., : k.shape[2]].amax(3), torch.special.entr(p).sum(3), mass


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    score: ScoreFn | Sequence[ScoreFn] | None = None,
    scale: float | Tensor | None = None,
    similarity: Similarity = "scaled_dot",
    temperature: float | Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores in fp32 [B, Hq, Nq, Nk], with a sink's column at their end; v with a head for every query
    head; and what dropout multiplies the weights by."""
    _check(q, k, v, similarity, temperature, dropout_p, dropout_keep)
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    shape = (*q.shape[:3], k.shape[2])
    index = _indices(shape, q.device)
    keep = _kept(mask, index, shape)
    unseen = ~keep.unflatten(1, (k.shape[1], group)).any(dim=3).any(dim=2)[..., None]  # [B, Hkv, Nk, 1]
    q = q.masked_fill(~keep.any(dim=3, keepdim=True), 0)
    k, v = (x.masked_fill(unseen, 0).repeat_interleave(group, dim=1) for x in (k, v))

    factor: Any = scale
    if factor is None:
        factor = 1 / math.sqrt(q.shape[3]) if similarity == "scaled_dot" else 1.0
    if similarity == "cosine":
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
        if isinstance(temperature, Tensor):
            temperature = temperature.float().reshape(-1, 1, 1)
        factor = factor * (1.0 if temperature is None else temperature)
    s = (q @ k.mT).float() * factor
    modifiers: Sequence[ScoreFn] = _as_sequence(score)
    for modify in modifiers:
        s = modify(s, *index)
    s = s.masked_fill(~keep, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.float().reshape(1, -1, 1, 1).expand(*shape[:3], 1)], dim=3)
    kept = None if dropout_keep is None else dropout_keep.to(dtype) * kept_factor(dropout_p)
    return s, v, kept


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """P in fp32, and lse; 0 and -inf of a row without keys."""
    empty = (s == -math.inf).all(dim=3, keepdim=True)
    s = s.masked_fill(empty, 0)  # whose softmax would be NaN, and its derivative
    p = torch.softmax(s, dim=3).masked_fill(empty, 0)
    return p, torch.logsumexp(s, dim=3).masked_fill(empty[..., 0], -math.inf)


def _softmax_values(s: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(s) v with P rounded to v's dtype, lse, P in fp32, and what v was multiplied by."""
    p, lse = _softmax(s)
    weights = p[..., : v.shape[2]].to(v.dtype)
    weights = weights if kept is None else weights * kept
    return weights @ v, lse, p, weights


class _SoftmaxValues(torch.autograd.Function):
    """``_softmax_values``, differentiable once. The backward is that of PyTorch's fused kernels: Σ_j P dP of
    a row comes from the rounded output."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, p, weights = _softmax_values(s, v, kept)
        ctx.kept = kept
        ctx.save_for_backward(p, weights, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, None]:
        p, weights, v, out, lse = ctx.saved_tensors
        dp = do @ v.mT
        dp = (dp if ctx.kept is None else dp * ctx.kept).float()
        dp = torch.nn.functional.pad(dp, (0, p.shape[3] - dp.shape[3]))  # a sink has no value
        delta = (do.float() * out.float()).sum(dim=3) - dlse
        delta = delta.masked_fill(lse == -math.inf, 0)
        return p * (dp - delta[..., None]), weights.mT @ do, None


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64; 0 where both are the same infinity, infinite for NaN."""
    got = got.double()
    apart = torch.where(got == want, 0.0, (got - want).abs())
    return apart.nan_to_num(nan=math.inf, posinf=math.inf)


def largest_difference(got: Tensor, want: Tensor) -> float:
    """The largest of ``difference``; 0 without elements."""
    return difference(got, want).max().item() if got.numel() else 0.0


def allowed_error(want: Tensor, dtype: torch.dtype, torch_error: float) -> Tensor:
    """What each element of a result in ``dtype`` may be off where float64 says ``want``, if PyTorch's largest
    error is ``torch_error``."""
    finfo = torch.finfo(dtype)
    rounding = (want.abs().nan_to_num(posinf=0.0) * (finfo.eps / 2)).clamp_min(finfo.tiny * finfo.eps / 2)
    if dtype == torch.float32:
        return 10 * rounding.clamp_min(torch_error) + FLUSHED
    return 2 * torch_error + rounding + FLUSHED
