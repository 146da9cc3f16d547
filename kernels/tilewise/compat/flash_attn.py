"""The functions of FlashAttention 2.8 (`flash_attn.flash_attn_interface`), in signatures and semantics."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..api import attention
from ..parts.scores.alibi import ALiBi
from ..parts.scores.score import Score
from ..parts.scores.softcap import Softcap
from ..parts.shape import PARAMETERS, check_dtype
from .shared import (
    PAGES,
    Words,
    check_heads,
    check_integers,
    check_layout,
    in_words,
    packed,
    paged,
    window_mask,
)

Tensor = torch.Tensor
ROWS, TOKENS = ("batch", "length", "heads", "dim"), ("tokens", "heads", "dim")
KV_ROWS, KV_TOKENS = ("batch", "length", 2, "heads", "dim"), ("tokens", 2, "heads", "dim")
QKV_ROWS, QKV_TOKENS = ("batch", "length", 3, "heads", "dim"), ("tokens", 3, "heads", "dim")

DENSE_WORDS = {"scale": "softmax_scale", "slopes": "alibi_slopes"}
PACKED_WORDS = DENSE_WORDS | {"q_offsets": "cu_seqlens_q", "kv_offsets": "cu_seqlens_k"}
QKV_WORDS = DENSE_WORDS | {"q_offsets": "cu_seqlens"}
PAGED_WORDS = DENSE_WORDS | {
    "q_offsets": "cu_seqlens_q", "kv_lens": "cu_seqlens_k", "pages": "block_table",
    "cache_k": "k", "cache_v": "v",
}  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of q [batch, length, heads, dim] over k and v [batch, kv_length, kv_heads, dim], where
    kv_heads divides heads.

    dropout_p:     the probability that a pair's weight is set to 0, drawn from PyTorch's generator.
    softmax_scale: None is 1/√dim.
    causal:        the last query stands at the last key. Rows above the first key see nothing and give 0.
    window_size:   (left, right) around a row's own position, both included; -1 is no limit. causal sets right
                   to 0.
    softcap:       above 0: scores become softcap · tanh(score / softcap).
    alibi_slopes:  [heads] or [batch, heads]: -slope · |i + kv_length - length - j| is added to the score of
                   query i and key j, after the cap.
    deterministic: whether gradients are the same bits in each run; results always are.
    return_attn_probs: NotImplementedError, for probabilities are never stored.

    Returns [batch, length, heads, dim].
    """
    check_layout(ROWS, q=q, k=k, v=v)
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    return dense(q, k, v, deterministic, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_func` with keys and values in one tensor, [batch, kv_length, 2, kv_heads, dim]."""
    check_layout(ROWS, q=q)
    check_layout(KV_ROWS, kv=kv)
    k, v = kv.unbind(2)
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    return dense(q, k, v, deterministic, options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_func` with queries, keys and values in one tensor, [batch, length, 3, heads, dim]."""
    check_layout(QKV_ROWS, qkv=qkv)
    q, k, v = qkv.unbind(2)
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    return dense(q, k, v, deterministic, options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention inside each of the sequences that stand one behind the other in q [tokens, heads, dim], and
    in k and v [kv_tokens, kv_heads, dim].

    cu_seqlens_q, cu_seqlens_k: [batch + 1], where they start, and where the last one ends. max_seqlen_q and
    max_seqlen_k are not needed. block_table: [batch, max_pages], then k and v are pages [pages, page_size,
    kv_heads, dim] that it names in the order of each sequence's keys, cu_seqlens_k gives their lengths alone,
    and there is no gradient. All else is as in `flash_attn_func`. Returns [tokens, heads, dim].
    """
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    if block_table is not None:
        return varlen_paged(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options)
    check_layout(TOKENS, q=q, k=k, v=v)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, PACKED_WORDS, deterministic, options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` with keys and values in one tensor, [kv_tokens, 2, kv_heads, dim]."""
    check_layout(TOKENS, q=q)
    check_layout(KV_TOKENS, kv=kv)
    k, v = kv.unbind(1)
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, PACKED_WORDS, deterministic, options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, [tokens, 3, heads, dim]."""
    check_layout(QKV_TOKENS, qkv=qkv)
    q, k, v = qkv.unbind(1)
    options = as_options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )
    return varlen(q, k, v, cu_seqlens, cu_seqlens, QKV_WORDS, deterministic, options)


def dense(q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]) -> Tensor:
    """`attention`, which has heads before length."""
    check_heads(q, k, 2, ROWS)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out: Tensor = in_words(DENSE_WORDS, attention, *heads_first, deterministic=deterministic, **options)
    return out.transpose(1, 2)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    words: Words,
    deterministic: bool,
    options: dict[str, Any],
) -> Tensor:
    check_heads(q, k, 1, TOKENS)
    out: Tensor = packed(q, k, v, cu_q, cu_k, words, deterministic=deterministic, **options)
    return out


def varlen_paged(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, block_table: Any, options: dict[str, Any]
) -> Tensor:
    check_layout(TOKENS, q=q)
    check_layout(PAGES, k=k, v=v)
    check_heads(q, k, -2, TOKENS)
    check_integers(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_q)} offsets and cu_seqlens_k {len(cu_k)}: must be equal")
    check_layout((len(cu_q) - 1, "max_pages"), block_table=block_table)
    out: Tensor = paged(q, k, v, cu_q, cu_k.diff(), block_table, PAGED_WORDS, **options)
    return out


def as_options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The arguments of `attention` that say the same."""
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs=True: probabilities are never stored. With return_lse=True tilewise.attention "
            "and tilewise.packed_attention return the logarithm of the sum that they are divided by; "
            "tilewise.dropout_mask shows the pairs that dropout keeps"
        )
    return dict(
        mask=window_mask(window_size, causal),
        score=as_scores(softcap, alibi_slopes),
        scale=softmax_scale,
        dropout_p=dropout_p,
    )


def as_scores(softcap: Any, alibi_slopes: Any) -> list[Score]:
    """The cap comes first, as there."""
    if not (isinstance(softcap, (int, float)) and softcap < math.inf):
        raise ValueError(f"{softcap=} must be a finite number, 0.0 for no cap")
    scores: list[Score] = [Softcap(softcap)] if softcap > 0 else []
    if alibi_slopes is not None:
        check_dtype("alibi_slopes", alibi_slopes, PARAMETERS)
        scores.append(ALiBi(alibi_slopes))
    return scores
