"""Attention by its definition: dense, slow, in float64. The specification every kernel is tested against.

    s   = scale * temperature * similarity(q, k)            similarity: dot, scaled dot or cosine
    s   = score modifiers, in the order given
    s   = s + bias
    s   = -inf where the mask does not keep the pair
    lse = log(sum_j exp(s_ij) + exp(sink))                  no sink: exp(sink) = 0
    p   = exp(s_ij - lse_i)
    p   = p * dropout_keep / (1 - dropout_p)                no dropout: p stays; lse never knows of it
    out = sum_j p_ij v_j

Query head h reads key/value head h // group, where group = q_heads // kv_heads. ``forward`` computes these
lines and keeps what ``gradients`` walks back through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, cast, overload

import torch
from torch import Tensor

from .masks import MaskFn
from .positions import expand
from .scores import ScoreFn, additive_bias

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mask = Tensor | MaskFn
Similarity = Literal["dot", "scaled_dot", "cosine"]
T = TypeVar("T")

SHORTEST = 1e-12  # the cosine divides a row by its L2 norm, but never by less


class Options(TypedDict, total=False):
    """The keyword arguments of ``attention`` and ``gradients``; ``attention`` says what they mean."""

    mask: Mask | Sequence[Mask] | None
    bias: Tensor | None
    score: ScoreFn | Sequence[ScoreFn] | None
    scale: float | Tensor | None
    similarity: Similarity
    temperature: float | Tensor | None
    sink: Tensor | None
    dropout_p: float
    dropout_keep: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Forward:
    """Every quantity of the equations above, in ``dtype``: what attention computes on its way to out.

    q, k and v are what is multiplied: rows nobody looks at are 0, k and v have a head for every query head,
    and for the cosine the rows of q and k are divided by their divisors.
    """

    index: tuple[Tensor, Tensor, Tensor, Tensor]  # [B,1,1,1], [1,Hq,1,1], [1,1,Nq,1], [1,1,1,Nk]
    keep: Tensor  # [B, Hq, Nq, Nk] bool, the mask
    q_unseeing: Tensor  # [B, Hq, Nq] bool, queries that see no key
    kv_unseen: Tensor  # [B, Hkv, Nk] bool, keys that no query sees
    q: Tensor  # [B, Hq, Nq, D]
    k: Tensor  # [B, Hq, Nk, D]
    v: Tensor  # [B, Hq, Nk, Dv]
    divisors: tuple[Tensor, Tensor] | None  # of q [B, Hq, Nq, 1] and k [B, Hq, Nk, 1], for the cosine
    scale: float | Tensor  # 0-d
    temperature: float | Tensor  # [Hq, 1, 1]
    modifiers: tuple[ScoreFn, ...]  # the scores, and the bias as the last of them
    inputs: tuple[Tensor, ...]  # [B, Hq, Nq, Nk] each: s as each modifier received it
    s: Tensor  # [B, Hq, Nq, Nk], what the softmax sees: -inf where the mask does not keep the pair
    p_sink: Tensor  # [B, Hq, Nq], exp(sink - lse)
    p: Tensor  # [B, Hq, Nq, Nk], exp(s - lse)
    dropout: float | Tensor  # [B, Hq, Nq, Nk], dropout_keep / (1 - dropout_p)
    p_dropped: Tensor  # [B, Hq, Nq, Nk], p * dropout
    lse: Tensor  # [B, Hq, Nq]
    out: Tensor  # [B, Hq, Nq, Dv]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention (Vaswani et al. 2017, arXiv 1706.03762), computed densely in ``dtype``.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], any floating dtype -> out [B, Hq, Nq, Dv] in
    ``dtype``; with ``return_lse`` also lse [B, Hq, Nq] in ``dtype``, the natural logarithm. Any length may
    be 0. Differentiable by autograd in q, k, v, bias, sink, scale, temperature and the scores' tables.

    mask: a bool tensor broadcastable to [B, Hq, Nq, Nk], True where the pair counts; or a function such as
        those of ``masks``; or a sequence of these, all of which must hold.
    score: a function such as those of ``scores``, or a sequence of them, applied in order.
    bias: broadcastable to [B, Hq, Nq, Nk], added to the scores. It is not a mask: a bias of -inf takes a key
        out of the sum, but NaN in that key still shows.
    scale: a float or a 0-d tensor; by default 1/sqrt(D) for ``"scaled_dot"``, 1 for the others.
    temperature: only for ``"cosine"``: a float or a tensor [Hq] that multiplies the cosine. Rows are divided
        by max(L2 norm, 1e-12).
    sink: [Hq], a logit per head that joins the softmax's sum and brings no value (StreamingLLM, Xiao et al.
        2023, arXiv 2309.17453, in the learned form of gpt-oss). lse includes it.
    dropout_p, dropout_keep: given together or not at all. Weights whose ``dropout_keep`` (bool, broadcastable
        to [B, Hq, Nq, Nk]; ``dropout.dropout_keep`` draws one) is False become 0, the others are divided by
        1 - dropout_p, 0 < dropout_p <= 1; for 1 all become 0. lse is that of all weights.
    dtype: float64 by default.

    A row with no key gives out 0, lse -inf (lse = sink with a sink) and gradient exactly 0. Keys and values
    that no query of their batch element and key/value head may see have no influence, forward or backward,
    even where they hold NaN or Inf; nor has a query that sees no key, nor the gradient that arrives at its
    out. Raises ValueError for arguments that do not fit together.
    """
    result = forward(q, k, v, **options)
    return (result.out, result.lse) if return_lse else result.out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    bias: Tensor | None = None,
    score: ScoreFn | Sequence[ScoreFn] | None = None,
    scale: float | Tensor | None = None,
    similarity: Similarity = "scaled_dot",
    temperature: float | Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Forward:
    """``attention``, with everything that it computes on its way."""
    _check(q, k, v, similarity, temperature, dropout_p, dropout_keep)
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    shape = (batch, q_heads, q_len, kv_len)
    index = _indices(shape, q.device)
    keep = _kept(mask, index, shape)

    # Rows nobody looks at are set to 0 before any product: 0 * NaN would be NaN, here and in the backward.
    # A key/value row serves the whole group of query heads, so it is unseen only if none of them sees it.
    kv_unseen = ~keep.unflatten(1, (kv_heads, group)).any(dim=3).any(dim=2)  # [B, Hkv, Nk]
    q_unseeing = ~keep.any(dim=3)  # [B, Hq, Nq]
    q = q.to(dtype).masked_fill(q_unseeing[..., None], 0)
    k = k.to(dtype).masked_fill(kv_unseen[..., None], 0).repeat_interleave(group, dim=1)
    v = v.to(dtype).masked_fill(kv_unseen[..., None], 0).repeat_interleave(group, dim=1)

    # s = scale * temperature * similarity(q, k)                         [B, Hq, Nq, Nk]
    divisors = None
    if similarity == "cosine":
        divisors = _divisor(q), _divisor(k)
        q, k = q / divisors[0], k / divisors[1]
    if scale is None:
        scale = 1 / math.sqrt(head_dim) if similarity == "scaled_dot" else 1.0
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
    if temperature is None:
        temperature = 1.0
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(-1, 1, 1)
    s = (scale * temperature) * (q @ k.transpose(2, 3))

    modifiers = tuple(_as_sequence(score))
    if bias is not None:
        modifiers += (additive_bias(bias),)
    inputs = []
    for modify in modifiers:
        inputs.append(s)
        s = modify(s, *index)
    s = s.masked_fill(~keep, -math.inf)

    p_sink, p, lse = _softmax(s, sink)
    dropout: float | Tensor = 1.0
    p_dropped = p
    if dropout_keep is not None:
        dropout = expand("dropout_keep", dropout_keep, shape).to(dtype) * kept_factor(dropout_p)
        p_dropped = p * dropout
    # The 0 of a row with no key is a constant: a gradient that arrives there goes no further, even NaN.
    out = (p_dropped @ v).masked_fill(q_unseeing[..., None], 0)
    return Forward(
        index=index, keep=keep, q_unseeing=q_unseeing, kv_unseen=kv_unseen, q=q, k=k, v=v, divisors=divisors,
        scale=scale, temperature=temperature, modifiers=modifiers, inputs=tuple(inputs), s=s, p_sink=p_sink,
        p=p, dropout=dropout, p_dropped=p_dropped, lse=lse, out=out,
    )  # fmt: skip


def kept_factor(dropout_p: float) -> float:
    """What the weights that dropout keeps are multiplied by; where it keeps none, 0."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: Similarity,
    temperature: float | Tensor | None,
    dropout_p: float,
    dropout_keep: Tensor | None,
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, kv_len, head_dim) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{tuple(k.shape)=} must be [{batch}, kv_heads, kv_len, {head_dim}] to fit {tuple(q.shape)=}, "
            f"and {tuple(v.shape)=} must agree with it in all but the last dimension"
        )
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"{q_heads=} must be a multiple of {kv_heads=}")
    if similarity not in ("dot", "scaled_dot", "cosine"):
        raise ValueError(f"{similarity=} must be 'dot', 'scaled_dot' or 'cosine'")
    if temperature is not None and similarity != "cosine":
        raise ValueError(f"temperature needs similarity='cosine', not {similarity=}; use scale instead")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{dropout_p=} must be from 0 to 1")
    # Two comparisons: torch.compile(dynamic=True) cannot trace one between dropout_p's and dropout_keep's.
    alone = dropout_p > 0 if dropout_keep is None else dropout_p == 0
    if alone:
        given = None if dropout_keep is None else tuple(dropout_keep.shape)
        raise ValueError(
            f"{dropout_p=} and dropout_keep (shape {given}) must be given together or not at all"
        )
    if dropout_keep is not None and dropout_keep.dtype != torch.bool:
        raise ValueError(f"{dropout_keep.dtype=} must be torch.bool")


def _indices(shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What masks and scores are given: axis a of [B, Hq, Nq, Nk] has its index along that axis."""
    batch, head, q_idx, kv_idx = (
        torch.arange(size, device=device).reshape([size if a == axis else 1 for a in range(4)])
        for axis, size in enumerate(shape)
    )
    return batch, head, q_idx, kv_idx


def _kept(
    mask: Mask | Sequence[Mask] | None,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    shape: tuple[int, int, int, int],
) -> Tensor:
    """The pairs that every mask keeps, bool [B, Hq, Nq, Nk]."""
    keep = torch.ones(shape, dtype=torch.bool, device=index[0].device)
    masks: Sequence[Mask] = _as_sequence(mask)
    for m in masks:
        kept = m if isinstance(m, Tensor) else m(*index)
        if kept.dtype != torch.bool:
            raise ValueError(f"mask has {kept.dtype=}, it must be torch.bool; pass additive masks as bias")
        keep = keep & expand("mask", kept, shape)
    return keep


def _divisor(rows: Tensor) -> Tensor:
    """What the cosine divides each row by: its L2 norm, or SHORTEST if that is more. [..., 1]."""
    return rows.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)


def _softmax(s: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(sink - lse) [B, Hq, Nq], exp(s - lse) [B, Hq, Nq, Nk] and lse [B, Hq, Nq]."""
    batch, q_heads, q_len, _ = s.shape
    # The sink is one more column of scores, whose value is 0; without a sink its logit is -inf.
    column = s.new_full((q_heads,), -math.inf) if sink is None else sink.to(s.dtype)
    s = torch.cat([column.reshape(1, q_heads, 1, 1).expand(batch, q_heads, q_len, 1), s], dim=3)

    # p = exp(s - row_max) / row_sum. The maximum cancels, so it is a constant to the derivative. A row of
    # -inf takes 0 for its maximum and 1 for its sum: all its p are exp(-inf) = 0, and 0 / 0 never happens.
    row_max = s.detach().amax(dim=3, keepdim=True)
    row_max = row_max.masked_fill(row_max == -math.inf, 0)
    p = torch.exp(s - row_max)
    row_sum = p.sum(dim=3, keepdim=True)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    p = p / row_sum
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, -math.inf)
    return p[..., 0], p[..., 1:], lse.squeeze(3)


def _as_sequence(given: T | Sequence[T] | None) -> Sequence[T]:
    """None, one thing or several, as a sequence."""
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (cast(T, given),)
