"""`flash_attn_with_kvcache` of FlashAttention 2.8 (`flash_attn.flash_attn_interface`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..cached import attend
from ..parts.rotary import RotaryTable
from ..parts.shape import Cache
from ..plan.request import Request, cached_request
from ..pytorch.append import turn_queries
from .flash_attn import DENSE_WORDS, ROWS, as_options
from .shared import PAGES, check_heads, check_integers, check_layout, in_words

Tensor = torch.Tensor
WORDS = DENSE_WORDS | {
    "cache_k": "k_cache", "cache_v": "v_cache", "new_k": "k", "new_v": "v", "kv_lens": "cache_seqlens",
    "pages": "block_table", "rotary": "rotary_cos",
}  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [batch, length, heads, dim] over a cache [batch, capacity, kv_heads, dim], after k and v
    [batch, new_length, kv_heads, dim] have been written into it.

    cache_seqlens:   int, or int32 or int64 [batch]: how many keys of a sequence the cache holds before the
                     call. None: all of it, which leaves no room for k and v.
    k, v:            written into the cache in place, at row cache_seqlens of each sequence.
    rotary_cos, rotary_sin: [positions, rotary_dim / 2], with k and v: turn k by positions from cache_seqlens
                     on; q too where causal or a window limits what it sees, else all queries of a sequence by
                     position cache_seqlens.
    rotary_interleaved: dimensions 2 i and 2 i + 1 turn together, not i and i + rotary_dim / 2.
    cache_batch_idx: int32 or int64 [batch]: which row of the cache's batch a sequence has.
    cache_leftpad:   NotImplementedError: sequences begin at the cache's first row.
    block_table:     int32 or int64 [batch, max_pages]: the cache is pages [pages, page_size, kv_heads, dim]
                     that it names in the order of each sequence's keys.
    num_splits:      nothing changes: the keys are split as suits the chip.
    return_softmax_lse: also return lse [batch, heads, length] in fp32; -inf where a row sees nothing.

    All else is as in `flash_attn_func`. Returns [batch, length, heads, dim]. It has no gradient.
    """
    check_layout(ROWS, q=q)
    check_layout(ROWS if block_table is None else PAGES, k_cache=k_cache, v_cache=v_cache)
    check_heads(q, k_cache, 2, ROWS)
    if cache_leftpad is not None:
        raise NotImplementedError(
            "cache_leftpad: a sequence begins at the first row of its part of the cache; move it there, or "
            "give tilewise.attention the cache with mask=tilewise.Intervals(first key, last key + 1)"
        )
    if block_table is not None:
        check_layout((q.shape[0], "max_pages"), block_table=block_table)
    pages = block_table
    if cache_batch_idx is not None:
        pages = one_page_each(cache_batch_idx, q.shape[0], block_table)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None and k is not None:
        raise ValueError("k is given without cache_seqlens, which says where in the cache it belongs")
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        length = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
    if k is not None or v is not None:
        new = (q.shape[0], "new_length", k_cache.shape[2])
        check_layout((*new, k_cache.shape[3]), k=k)
        check_layout((*new, v_cache.shape[3]), v=v)
    rotary = as_table(rotary_cos, rotary_sin, rotary_interleaved, k, capacity)
    options = as_options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    turn = turned_from(cache_seqlens, options["mask"] is None)

    def answer() -> tuple[Tensor, Tensor | None]:
        cache = (k_cache, v_cache) if pages is not None else map(heads_first, (k_cache, v_cache))
        request = cached_request(heads_first(q), *cache, kv_lens=cache_seqlens, pages=pages, **options)
        return attend(request, heads_first(k), heads_first(v), rotary, return_softmax_lse, turn)

    out, lse = in_words(WORDS, answer)
    out = out.transpose(1, 2)
    return out if lse is None else (out, lse)


def heads_first(x: Any) -> Any:
    return None if x is None else x.transpose(1, 2)


def one_page_each(cache_batch_idx: Any, batch: int, block_table: Tensor | None) -> Tensor:
    """Pages that are a row of the cache's batch: a sequence has one."""
    if block_table is not None:
        raise ValueError("cache_batch_idx and block_table both say where a sequence's cache is: give one")
    check_integers(cache_batch_idx=cache_batch_idx)
    if len(cache_batch_idx) != batch:
        raise ValueError(f"cache_batch_idx.shape={tuple(cache_batch_idx.shape)} must be [batch] = [{batch}]")
    index: Tensor = cache_batch_idx
    return index[:, None]


def as_table(cos: Any, sin: Any, interleaved: bool, k: Tensor | None, capacity: int) -> RotaryTable | None:
    if cos is None and sin is None:
        return None
    check_layout(("positions", "rotary_dim / 2"), rotary_cos=cos)
    check_layout(tuple(cos.shape), rotary_sin=sin)
    if k is None:
        raise ValueError("rotary_cos goes with k and v: without new keys nothing is turned")
    if cos.shape[0] < capacity:
        raise ValueError(f"rotary_cos has {cos.shape[0]} positions, and the cache room for {capacity}")
    return RotaryTable(cos, sin, bool(interleaved))


def turned_from(starts: Any, together: bool) -> Callable[[Request, RotaryTable], Request]:
    """What turns the queries of a sequence by the positions from `starts` on, wherever its last key is.
    together: all of them by the first of these."""

    def turn(request: Request, rotary: RotaryTable) -> Request:
        q, positions = request.q, rotary.cos[None, None]  # as many rows as there are positions
        rows = q.transpose(1, 2).flatten(1, 2)[:, :, None] if together else q  # each a head of one row
        apart = replace(request, q=rows, k=positions, v=positions, cache=Cache(starts + rows.shape[2]))
        turned = turn_queries(apart, rotary).q
        if together:
            turned = turned[:, :, 0].unflatten(1, (q.shape[2], q.shape[1])).transpose(1, 2)
        return replace(request, q=turned)

    return turn
