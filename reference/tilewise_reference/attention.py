"""Attention by its definition: dense, slow, in float64. The specification every kernel is tested against.

    s   = scale * similarity(q, k)                          similarity: dot, scaled dot or cosine
    s   = score modifiers, in the order given
    s   = s + bias
    s   = -inf where the mask does not keep the pair
    lse = log(sum_j exp(s_ij) + exp(sink))                  no sink: exp(sink) = 0
    out = sum_j exp(s_ij - lse_i) v_j

Query head h reads key/value head h // group, where group = q_heads // kv_heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import MaskFn
from .scores import ScoreFn

Mask = Tensor | MaskFn
Similarity = Literal["dot", "scaled_dot", "cosine"]
T = TypeVar("T")


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Sequence[Mask] | None = None, bias: Tensor | None = None,
    score: ScoreFn | Sequence[ScoreFn] | None = None, scale: float | Tensor | None = None,
    similarity: Similarity = "scaled_dot", temperature: float | Tensor | None = None,
    sink: Tensor | None = None, return_lse: Literal[False] = False, dtype: torch.dtype = torch.float64,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Sequence[Mask] | None = None, bias: Tensor | None = None,
    score: ScoreFn | Sequence[ScoreFn] | None = None, scale: float | Tensor | None = None,
    similarity: Similarity = "scaled_dot", temperature: float | Tensor | None = None,
    sink: Tensor | None = None, return_lse: Literal[True], dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
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
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
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

    A row with no key gives out 0, lse -inf (lse = sink with a sink) and gradient exactly 0. Keys and values
    that no query of their batch element and key/value head may see have no influence, forward or backward,
    even where they hold NaN or Inf; nor has a query that sees no key. Raises ValueError for arguments that do
    not fit together.
    """
    batch, q_heads, q_len, head_dim = q.shape
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
    group = q_heads // kv_heads
    shape = (batch, q_heads, q_len, kv_len)

    # The index tensors of the masks and scores: axis a of [B, Hq, Nq, Nk] has its index along that axis.
    index = [
        torch.arange(size, device=q.device).reshape([size if a == axis else 1 for a in range(4)])
        for axis, size in enumerate(shape)
    ]
    keep = torch.ones(shape, dtype=torch.bool, device=q.device)
    masks: Sequence[Mask] = _as_sequence(mask)
    for m in masks:
        kept = m if isinstance(m, Tensor) else m(*index)
        if kept.dtype != torch.bool:
            raise ValueError(f"mask has {kept.dtype=}, it must be torch.bool; pass additive masks as bias")
        keep = keep & _expand("mask", kept, shape)

    # Rows nobody looks at are set to 0 before any product: 0 * NaN would be NaN, here and in the backward.
    # A key/value row serves the whole group of query heads, so it is unseen only if none of them sees it.
    kv_unseen = ~keep.unflatten(1, (kv_heads, group)).any(dim=3).any(dim=2)  # [B, Hkv, Nk]
    q_unseeing = ~keep.any(dim=3)  # [B, Hq, Nq]
    q = q.to(dtype).masked_fill(q_unseeing[..., None], 0)
    k = k.to(dtype).masked_fill(kv_unseen[..., None], 0).repeat_interleave(group, dim=1)
    v = v.to(dtype).masked_fill(kv_unseen[..., None], 0).repeat_interleave(group, dim=1)

    # s = scale * similarity(q, k)                                       [B, Hq, Nq, Nk]
    if similarity == "cosine":
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    if scale is None:
        scale = 1 / math.sqrt(head_dim) if similarity == "scaled_dot" else 1.0
    s = scale * (q @ k.transpose(2, 3))
    if isinstance(temperature, Tensor):
        s = temperature.to(dtype).reshape(-1, 1, 1) * s
    elif temperature is not None:
        s = temperature * s

    for modify in _as_sequence(score):
        s = modify(s, *index)
    if bias is not None:
        s = s + _expand("bias", bias.to(dtype), shape)
    s = s.masked_fill(~keep, -math.inf)

    # The sink is one more column of scores, whose value is 0; without a sink its logit is -inf.
    column = s.new_full((q_heads,), -math.inf) if sink is None else sink.to(dtype)
    s = torch.cat([column.reshape(1, q_heads, 1, 1).expand(batch, q_heads, q_len, 1), s], dim=3)

    # p = exp(s - row_max) / row_sum. The maximum cancels, so it is a constant to the derivative. A row of
    # -inf takes 0 for its maximum and 1 for its sum: all its p are exp(-inf) = 0, and 0 / 0 never happens.
    row_max = s.detach().amax(dim=3, keepdim=True)
    row_max = row_max.masked_fill(row_max == -math.inf, 0)
    p = torch.exp(s - row_max)
    row_sum = p.sum(dim=3, keepdim=True)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    out = (p[..., 1:] / row_sum) @ v
    if not return_lse:
        return out
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, -math.inf)
    return out, lse.squeeze(3)


def _as_sequence(given: T | Sequence[T] | None) -> Sequence[T]:
    """None, one thing or several, as a sequence."""
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (cast(T, given),)


def _expand(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor broadcast to the shape of the scores, or a ValueError that names it."""
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}.shape={tuple(tensor.shape)} must broadcast to {shape}") from None
