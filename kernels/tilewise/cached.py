"""The public functions of caches of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch

from .api import Results, answer, answer_with, refuse_unknown, returned
from .parts.dtensors import is_dtensor
from .parts.fp8 import Scales
from .parts.masks.mask import Mask
from .parts.rotary import RotaryTable
from .parts.scores.score import Score
from .parts.similarity import Cosine
from .parts.stats import Statistics, Stats, of_packed
from .plan.checks import check
from .plan.names import CACHED_ARGUMENTS
from .plan.request import Request, as_heads, cached_request
from .plan.rules.cache import new_misfits
from .plan.rules.statistics import stats_misfits
from .pytorch.append import append, turn_queries

Tensor = torch.Tensor


@overload
def cached_attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, *, kv_lens: Tensor, new_k: Tensor | None = None,
    new_v: Tensor | None = None, pages: Tensor | None = None, q_offsets: Tensor | None = None,
    rotary: RotaryTable | None = None, split_size: int | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[False] = False,
    return_stats: None = None, impl: str | None = None, strict: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def cached_attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, *, kv_lens: Tensor, new_k: Tensor | None = None,
    new_v: Tensor | None = None, pages: Tensor | None = None, q_offsets: Tensor | None = None,
    rotary: RotaryTable | None = None, split_size: int | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[True],
    return_stats: None = None, impl: str | None = None, strict: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def cached_attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, *, kv_lens: Tensor, new_k: Tensor | None = None,
    new_v: Tensor | None = None, pages: Tensor | None = None, q_offsets: Tensor | None = None,
    rotary: RotaryTable | None = None, split_size: int | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[False] = False,
    return_stats: Stats, impl: str | None = None, strict: bool = False,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip
@overload
def cached_attention(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, *, kv_lens: Tensor, new_k: Tensor | None = None,
    new_v: Tensor | None = None, pages: Tensor | None = None, q_offsets: Tensor | None = None,
    rotary: RotaryTable | None = None, split_size: int | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[True],
    return_stats: Stats, impl: str | None = None, strict: bool = False,
) -> tuple[Tensor, Tensor, Statistics]: ...  # fmt: skip
def cached_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    *,
    kv_lens: Tensor,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    pages: Tensor | None = None,
    q_offsets: Tensor | None = None,
    rotary: RotaryTable | None = None,
    split_size: int | None = None,
    mask: Mask | Tensor | Any = None,
    bias: Tensor | None = None,
    score: Score | Any = None,
    scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot",
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scales: Scales | None = None,
    return_lse: bool = False,
    return_stats: Stats | None = None,
    impl: str | None = None,
    strict: bool = False,
    **unknown: Any,
) -> Results:
    """`attention` over keys and values in a cache, of which each sequence has filled its own part: decoding,
    one row or a few at a time, and prefilling in pieces alike (split keys: Flash-Decoding; pages:
    PagedAttention, arXiv 2309.06180).

    q:         [batch, q_heads, q_len, head_dim]; with q_offsets packed, [tokens, q_heads, head_dim].
    cache_k:   [batch, kv_heads, capacity, head_dim], any strides; with pages [pages, page_size, kv_heads,
               head_dim].
    cache_v:   the same with value_dim.
    kv_lens:   int32 or int64 [batch] on q's device: how many rows of a sequence the cache holds before this
               call. What lies beyond may hold anything, NaN too.
    new_k, new_v: [batch, kv_heads, new_len, dim], packed as q is with q_offsets: written into the cache at
               row kv_lens of each sequence, before they are attended to with the others. The caller counts
               them: the next call's kv_lens are new_len more. Rows beyond the capacity are not written.
    pages:     int32 or int64 [batch, max_pages]: the page that holds each page_size rows of a sequence.
               What stands behind the last page in use may be anything.
    q_offsets: int32 or int64 [batch + 1]: queries packed as for `packed_attention`.
    rotary:    `nn.Rotary(...).table(positions)`: turns q and new_k by their positions in the sequence; what
               is in the cache was turned when it came there.
    split_size: keys that one program walks, a multiple of 16: with it, the bits of a row that the kernels
               compute depend on nothing but its own sequence, neither on the batch nor on how many queries
               come in one call. None: as suits the chip.
    scales:    as for `attention`, of q and a cache in float8_e4m3fn: [batch, heads], or with `Scales.rows` a
               number for each so many rows, in pages counted inside each page, [pages, kv_heads, tiles].
               new_k and new_v are then fp8 too, and the caller keeps scales of what is written. out's dtype
               is scales.dtype.

    All other arguments are those of `attention`. The last query of a sequence stands at its last key, at
    position kv_lens + new_len - 1 and not at the buffer's end: give Causal() where several come at once.
    Tensors along keys are read at positions inside the sequence, as in `packed_attention`.

    Returns out, of q's shape with value_dim, then lse [batch, q_heads, q_len], packed [q_heads, tokens], and
    `Statistics` if asked. It has no gradient. The host reads no length; lengths and pages that lead out of
    the cache are cut to it. Raises as `attention` does.
    """
    if unknown:
        refuse_unknown("cached_attention", unknown, CACHED_ARGUMENTS)
    request = cached_request(
        q, cache_k, cache_v, kv_lens=kv_lens, pages=pages, q_offsets=q_offsets, split_size=split_size,
        mask=mask, bias=bias, score=score, scale=scale, similarity=similarity, sink=sink,
        dropout_p=dropout_p, dropout_seed=dropout_seed, scales=scales, impl=impl, strict=strict,
    )  # fmt: skip
    if return_stats is not None:
        for reason in why_not_stats(request, new_k, new_v, rotary, return_stats):
            raise ValueError(reason)
        found = answer_with(written(request, new_k, new_v, rotary), return_stats)
        if q_offsets is None:
            return returned(*found, return_lse)
        return returned(found[0][0].transpose(0, 1), found[1][0], of_packed(found[2], True), return_lse)
    out, lse = attend(request, new_k, new_v, rotary, return_lse)
    if q_offsets is None:
        return out if lse is None else (out, lse)
    rows = out[0].transpose(0, 1)
    return rows if lse is None else (rows, lse[0])


def attend(
    request: Request,
    new_k: Tensor | None,
    new_v: Tensor | None,
    rotary: RotaryTable | None,
    return_lse: bool,
    turn: Callable[[Request, RotaryTable], Request] = turn_queries,
) -> tuple[Tensor, Tensor | None]:
    """out, and lse if asked for, of a request of what the cache holds, once new_k and new_v are in it. turn:
    how rotary turns the queries then."""
    if new_k is None and new_v is None and rotary is None:
        return answer(request, return_lse)
    check(request)
    for reason in new_misfits(request, new_k, new_v, rotary):
        raise ValueError(reason)
    if is_dtensor(request.q):
        from .pytorch.sharded import attend_on_mesh  # imports DTensor, as the caller did

        if new_k is not None and request.packing is not None:
            new_k, new_v = as_heads(new_k, new_v)
        return attend_on_mesh(request, new_k, new_v, rotary, return_lse, turn, answer)
    return answer(written(request, new_k, new_v, rotary, turn), return_lse)


def written(
    request: Request,
    new_k: Tensor | None,
    new_v: Tensor | None,
    rotary: RotaryTable | None,
    turn: Callable[[Request, RotaryTable], Request] = turn_queries,
) -> Request:
    """The request of what the cache holds once new_k and new_v are in it, and with its queries turned."""
    if new_k is not None and new_v is not None:
        if request.packing is not None:
            new_k, new_v = as_heads(new_k, new_v)
        request = append(request, new_k, new_v, rotary)
    return request if rotary is None else turn(request, rotary)


def why_not_stats(request: Request, new_k: Any, new_v: Any, rotary: Any, stats: Any) -> Iterator[str]:
    """What is wrong with a call, before it writes into the cache."""
    check(request)
    yield from new_misfits(request, new_k, new_v, rotary)
    yield from stats_misfits(request, stats)
