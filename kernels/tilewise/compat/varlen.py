"""`torch.nn.attention.varlen.varlen_attn` of PyTorch 2.13, with its signature and semantics."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .shared import PAGES, check_heads, check_integers, check_layout, packed, paged, window_mask

Tensor = torch.Tensor
TOKENS = ("tokens", "heads", "dim")
WORDS = {"q": "query", "k": "key", "v": "value", "q_offsets": "cu_seq_q", "kv_offsets": "cu_seq_k"}
PAGED_WORDS = {
    "q": "query", "cache_k": "key", "cache_v": "value", "k": "key", "v": "value", "q_offsets": "cu_seq_q",
    "kv_lens": "seqused_k", "pages": "block_table",
}  # fmt: skip


class AuxRequest(NamedTuple):
    """What `varlen_attn` returns besides: PyTorch's own AuxRequest does as well."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each of the sequences that stand one behind the other in query [tokens, heads, dim],
    and in key and value [kv_tokens, kv_heads, dim].

    cu_seq_q, cu_seq_k: [batch + 1], where they start, and where the last one ends.
    max_q, max_k, num_splits: not needed; a sequence's bits never depend on the others.
    return_aux:  with lse=True also lse [heads, tokens] in fp32, through which gradients flow.
    scale:       None is 1/√dim.
    window_size: (left, right) around a row's own position, the last query at the last key; -1 is no limit:
                 (-1, 0) is causal.
    enable_gqa:  kv_heads may be a divisor of heads.
    seqused_k:   int32 or int64 [batch]: only so many of each sequence's keys are there, the first ones. The
                 last query stands at the last of them.
    block_table: int32 or int64 [batch, max_pages]: key and value are pages [pages, page_size, kv_heads, dim]
                 that it names in the order of each sequence's keys, of which seqused_k says how many there
                 are; cu_seq_k is not needed then, and there is no gradient.

    Returns [tokens, heads, dim].
    """
    check_layout(TOKENS, query=query)
    check_layout(TOKENS if block_table is None else PAGES, key=key, value=value)
    heads, kv_heads = query.shape[1], key.shape[-2]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads and key {kv_heads}: grouped heads want enable_gqa=True")
    check_heads(query, key, -2, TOKENS)
    with_lse = return_aux is not None and return_aux.lse
    options = dict(mask=window_mask(window_size), scale=scale, return_lse=with_lse)
    result: Tensor | tuple[Tensor, Tensor]
    if block_table is not None:
        check_integers(cu_seq_q=cu_seq_q, seqused_k=seqused_k)
        result = paged(query, key, value, cu_seq_q, seqused_k, block_table, PAGED_WORDS, **options)
        return result
    if seqused_k is not None:
        cu_seq_q, cu_seq_k = with_unused_apart(cu_seq_q, cu_seq_k, seqused_k)
    elif cu_seq_k is None:
        raise ValueError("cu_seq_k=None goes with block_table alone: give the offsets of the keys")
    result = packed(query, key, value, cu_seq_q, cu_seq_k, WORDS, **options)
    return result


def with_unused_apart(cu_seq_q: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of twice as many sequences: behind each, one without queries that has the keys not used."""
    check_integers(cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, seqused_k=seqused_k)
    assert cu_seq_k is not None
    if not len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1:
        raise ValueError(
            f"cu_seq_q.shape={tuple(cu_seq_q.shape)} and cu_seq_k.shape={tuple(cu_seq_k.shape)} must be "
            f"[batch + 1], seqused_k.shape={tuple(seqused_k.shape)} [batch]"
        )
    starts, ends = cu_seq_k[:-1], cu_seq_k[1:]
    used = torch.minimum(starts + seqused_k.clamp(min=0), ends)
    kv_offsets = torch.cat([torch.stack([starts, used], 1).flatten(), ends[-1:]])
    return cu_seq_q.repeat_interleave(2)[1:], kv_offsets
