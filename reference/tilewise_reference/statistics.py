"""What the softmax of a row knows beside its result: dense, slow, in float64.

With s, p and p_sink as ``attention`` has them, row by row:

    max_logit   = max_j s_j                            of keys alone; -inf where there are none
    entropy     = -Σ_j p_j ln p_j - p_sink ln p_sink   0 ln 0 = 0
    key_mass_j  = Σ_i counts_i p_ij                    over the queries of all heads that share key j
    top         = the k largest p_j, of equal ones the smaller j first

All of them are of the weights before dropout. Their gradients are autograd's, through these lines: that of
max_logit goes to the first of the largest keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .attention import Forward, Options, forward

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Statistics(NamedTuple):
    max_logit: Tensor  # [B, Hq, Nq]
    entropy: Tensor  # [B, Hq, Nq]
    key_mass: Tensor  # [B, Hkv, Nk]
    weights: Tensor  # [B, Hq, Nq, Nk], all rows
    scores: Tensor  # [B, Hq, Nq, Nk], -inf where the mask does not keep the pair


def statistics(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None = None, **options: Unpack[Options]
) -> Statistics:
    """Of the attention that these arguments are of. counts: how much each query counts for the mass of keys,
    broadcasts to [B, Hq, Nq]; None: all of them 1."""
    fwd = forward(q, k, v, **options)
    counts = fwd.p.new_ones(()) if counts is None else counts.to(fwd.p.dtype)
    return Statistics(max_logit(fwd), entropy(fwd), key_mass(fwd, counts, k.shape[1]), fwd.p, fwd.s)


def max_logit(fwd: Forward) -> Tensor:
    """[B, Hq, Nq]"""
    kv_len = fwd.s.shape[3]
    if kv_len == 0:
        return fwd.s.new_full(fwd.s.shape[:3], -torch.inf)
    kv_idx = torch.arange(kv_len, device=fwd.s.device)
    is_largest = fwd.s.detach() == fwd.s.detach().amax(3, keepdim=True)
    first = torch.where(is_largest, kv_idx, kv_len - 1).amin(3, keepdim=True)
    return fwd.s.gather(3, first)[..., 0]


def entropy(fwd: Forward) -> Tensor:
    """[B, Hq, Nq]"""
    return plogp(fwd.p).sum(3).neg() - plogp(fwd.p_sink)


def plogp(p: Tensor) -> Tensor:
    """p ln p, and 0 where p is, with a derivative of 0 there."""
    return p * torch.where(p > 0, p, 1.0).log()


def key_mass(fwd: Forward, counts: Tensor, kv_heads: int) -> Tensor:
    """[B, Hkv, Nk]"""
    weighted = fwd.p * counts.expand(fwd.p.shape[:3])[..., None]
    return weighted.sum(2).unflatten(1, (kv_heads, fwd.p.shape[1] // kv_heads)).sum(2)


def top_keys(scores: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """int64 keys and their weights [B, Hq, Nq, top_k]; -1 and 0 where a row has fewer keys."""
    found, keys = scores.sort(dim=3, descending=True, stable=True)
    found, keys = (
        torch.nn.functional.pad(x[..., :top_k], (0, max(0, top_k - x.shape[3]))) for x in (found, keys)
    )
    is_key = found > -torch.inf
    if scores.shape[3] < top_k:
        is_key = is_key & (torch.arange(top_k, device=keys.device) < scores.shape[3])
    p = weights.gather(3, keys) if scores.shape[3] else found * 0.0
    return keys.where(is_key, -1), p.where(is_key, 0.0)
