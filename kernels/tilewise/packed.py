"""The public functions of packed sequences."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from .api import Results, answer, answer_with, refuse_unknown, returned
from .parts.fp8 import Scales
from .parts.masks.mask import Mask
from .parts.scores.score import Score
from .parts.similarity import Cosine
from .parts.stats import Statistics, Stats, of_packed
from .plan.names import PACKED_ARGUMENTS
from .plan.request import as_heads, as_packing, make_request
from .pytorch.pieces import offset_errors

Tensor = torch.Tensor


@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, kv_offsets: Tensor | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[False] = False,
    return_stats: None = None, impl: str | None = None, strict: bool = False, deterministic: bool = True,
) -> Tensor: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, kv_offsets: Tensor | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[True],
    return_stats: None = None, impl: str | None = None, strict: bool = False, deterministic: bool = True,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, kv_offsets: Tensor | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[False] = False,
    return_stats: Stats, impl: str | None = None, strict: bool = False, deterministic: bool = True,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, kv_offsets: Tensor | None = None, mask: Any = None,
    bias: Tensor | None = None, score: Any = None, scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, scales: Scales | None = None, return_lse: Literal[True],
    return_stats: Stats, impl: str | None = None, strict: bool = False, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Statistics]: ...  # fmt: skip
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor | None = None,
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
    deterministic: bool = True,
    **unknown: Any,
) -> Results:
    """`attention` over sequences of different lengths that stand one behind the other, without padding.

    q:          [tokens, q_heads, head_dim], any strides: a view of one projection [tokens, 3, heads, dim]
                will do, as for k and v.
    k:          [kv_tokens, kv_heads, head_dim].
    v:          [kv_tokens, kv_heads, value_dim].
    q_offsets:  int32 or int64 [batch + 1] on q's device: the queries of sequence b are the rows
                q_offsets[b] to q_offsets[b + 1] - 1 (elsewhere called cu_seqlens). A sequence may have no
                row, and the tensors more rows than the offsets say.
    kv_offsets: the same for the keys, [batch + 1]; None: they are packed as the queries are.
    scales:     as for `attention`, of q, k and v in float8_e4m3fn: [batch, heads], or with `Scales.rows` [1,
                heads, tiles], of rows that are counted over all tokens. out's dtype is then scales.dtype.

    All other arguments are those of `attention`. Masks and scores see the positions inside a sequence, and
    the sequence's number for batch: Causal() puts the last query of each at its last key. A tensor along
    queries or keys (a bool mask, a bias, Intervals, Documents) is read at those positions too: it should be
    as long as the longest sequence. What lies beyond its end is masked out, or, of a bias, NaN.

    Returns out [tokens, q_heads, value_dim], then lse [q_heads, tokens] in fp32 and `Statistics` if asked.
    Rows of no sequence give 0 and -inf, and a gradient of 0. What one sequence holds, NaN too, has no
    influence on another, and its bits do not depend on what it is packed with. Differentiable as `attention`
    is.

    The host reads no length, so that a CUDA graph may be replayed with others; offsets that decrease or lead
    out of the tensors are therefore not noticed, and what they give is unspecified, though nothing outside
    the tensors is read: `check_offsets` looks at them. Raises as `attention` does.
    """
    if unknown:
        refuse_unknown("packed_attention", unknown, PACKED_ARGUMENTS)
    request = make_request(
        *as_heads(q, k, v), mask=mask, bias=bias, score=score, scale=scale, similarity=similarity, sink=sink,
        dropout_p=dropout_p, dropout_seed=dropout_seed, scales=scales, impl=impl, strict=strict,
        deterministic=deterministic,
        packing=as_packing(q_offsets, kv_offsets),
    )  # fmt: skip
    if return_stats is not None:
        out, row_lse, found = answer_with(request, return_stats)
        return returned(out[0].transpose(0, 1), row_lse[0], of_packed(found), return_lse)
    out, lse = answer(request, return_lse)
    rows = out[0].transpose(0, 1)
    return rows if lse is None else (rows, lse[0])


def check_offsets(
    q_offsets: Tensor, kv_offsets: Tensor | None = None, *, tokens: int, kv_tokens: int | None = None
) -> None:
    """Raise ValueError for offsets that `packed_attention` cannot mean, and say which one is wrong: one that
    is lower than the one before, or outside the tensors' `tokens` and `kv_tokens` (None: as many) rows.

    It reads the offsets, so the host waits for the GPU: for a new data loader, not for every step.
    """
    packing = as_packing(q_offsets, kv_offsets)
    found = [*packing.misfits(), *([] if packing.misfits() else offset_errors(packing, tokens, kv_tokens))]
    if found:
        raise ValueError("; ".join(found))
