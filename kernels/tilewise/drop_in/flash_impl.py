"""tilewise as one of the flash attentions that PyTorch's own chooser can be given.

Importing tilewise makes its name known, no more. `activate_flash_attention_impl("tilewise")`, of
`torch.nn.attention`, puts the functions below in place of the CUDA kernels of aten's flash ops;
`restore_flash_attention_impl()` takes them away. They keep what the ops' schemas, meta functions and
derivatives promise: lse is natural and fp32, out and gradients lie in memory as `empty_like` would, and the
state of dropout, two numbers of which the first is tilewise's seed, goes from the forward to the backward.
Causal is FlashAttention's: the last query at the last key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library
from torch.nn.attention import list_flash_attention_impls, register_flash_attention_impl

from ..compat.shared import PAGES, check_heads, check_integers, check_layout, in_words, window_mask
from ..compat.varlen import with_unused_apart
from ..parts.dropout import Dropout
from ..parts.masks.mask import as_mask
from ..parts.scores.alibi import ALiBi
from ..parts.shape import FLOATS, Cache, Pages, ceil_div, check_dtype
from ..plan.checks import check
from ..plan.passes import run_backward, run_forward
from ..plan.request import Request, as_packing
from .flash_state import laid_out_as, new_state, seed_of, statistics_of

Tensor = torch.Tensor
NAME = "tilewise"
ROWS, TOKENS = ("batch", "length", "heads", "dim"), ("tokens", "heads", "dim")
WORDS = {
    "q": "query", "k": "key", "v": "value", "cu_seq_q": "cum_seq_q", "cu_seq_k": "cum_seq_k",
    "q_offsets": "cum_seq_q", "kv_offsets": "cum_seq_k", "kv_lens": "seqused_k", "pages": "block_table",
    "slopes": "alibi_slopes",
}  # fmt: skip


# ---- The ops


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """aten::_flash_attention_forward, of [batch, length, heads, dim], ragged [tokens, heads, dim]."""
    out = torch.empty_like(query)
    given = (cum_seq_q, cum_seq_k, dropout_p, is_causal, return_debug_mask)
    return out, *forward_into(out, query, key, value, *given, **options)


def flash_forward_inplace(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    return_debug_mask: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """aten::_flash_attention_forward_no_dropout_inplace: the same into `out`. Returns lse."""
    if dropout_p != 0.0:
        raise ValueError(f"{dropout_p=} must be 0.0: the op that fills `out` has no dropout")
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out is {tuple(out.shape)}, {out.dtype} on {out.device}; it must be as query is, "
            f"{tuple(query.shape)}, {query.dtype} on {query.device}"
        )
    given = (cum_seq_q, cum_seq_k, dropout_p, is_causal, return_debug_mask)
    lse: Tensor = forward_into(out, query, key, value, *given, **options)[0]
    return lse


def flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float,
    is_causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_backward: dquery, dkey and dvalue, from what the forward has left."""
    dropout = None if dropout_p == 0 else Dropout(dropout_p, seed_of(rng_state))
    window = (window_size_left, window_size_right)
    request = in_words(
        WORDS, as_request, query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, *window, dropout
    )
    needs = [True] * 3 + [False] * len(request.other_tensors)
    do, statistics = heads_first(grad_out), statistics_of(logsumexp)
    grads = run_backward(request, heads_first(out), statistics, do, None, needs)
    if cum_seq_q is not None:
        grads = [grad[0] for grad in grads]
    rows = [grad.transpose(-3, -2) for grad in grads]
    return tuple(laid_out_as(x, grad) for x, grad in zip((query, key, value), rows, strict=True))


def sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention, of [batch, heads, length, dim]."""
    check_layout(("batch", "heads", "length", "dim"), query=query, key=key, value=value)
    out = torch.empty_like(query)
    q, k, v, rows = (x.transpose(1, 2) for x in (query, key, value, out))
    lse, *state = forward_into(
        rows, q, k, v, None, None, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out, lse, None, None, query.shape[2], key.shape[2], *state


def sdpa_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float,
    is_causal: bool, philox_seed: Tensor, philox_offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward."""
    do, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = flash_backward(
        do, q, k, v, o, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset,
        scale=scale,
    )  # fmt: skip
    inputs = (query, key, value)
    return tuple(laid_out_as(x, grad.transpose(1, 2)) for x, grad in zip(inputs, grads, strict=True))


OPS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_forward_inplace,  # since PyTorch 2.12
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}


# ---- What they ask of the kernels


def forward_into(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **of_forward: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill `out`. Returns lse, the state of dropout, a tensor that nobody reads, and an empty debug mask."""
    if return_debug_mask:
        raise NotImplementedError(
            f"{return_debug_mask=}: probabilities are never stored; tilewise.dropout_mask shows the pairs "
            "that dropout keeps"
        )
    refuse_gradients(query, key, value, **of_forward)
    state, unused = new_state(dropout_p, query.device)
    dropout = None if dropout_p == 0 else Dropout(dropout_p, seed_of(state))
    window = (window_size_left, window_size_right)
    given = (query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, *window, dropout)
    request = in_words(WORDS, as_request, *given, **of_forward)
    _, lse, _ = run_forward(request, return_lse=True, out=heads_first(out))
    assert lse is not None
    return lse if cum_seq_q is None else lse[0], state, unused, query.new_empty(0)


def refuse_gradients(query: Tensor, key: Tensor, value: Tensor, **of_forward: Any) -> None:
    """Raise where a gradient is asked through what aten's backward is not told of."""
    named = [name for name, given in of_forward.items() if given is not None and name != "num_splits"]
    trained = [
        x for x in (query, key, value, of_forward.get("alibi_slopes")) if x is not None and x.requires_grad
    ]
    if named and trained and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{' and '.join(named)}: the backward of aten's flash attention is not told of it, so there "
            "is no gradient: use torch.no_grad(), or tilewise.attention or packed_attention to train"
        )


def as_request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    dropout: Dropout | None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Request:
    """The request that says the same, checked. It does not pass `make_request`: under autocast the dtypes are
    those that the op was given."""
    check_arguments(query, key, value, cum_seq_q, block_table)
    mask = mask_of(is_causal, window_size_left, window_size_right)
    packing, cache = None, None
    if block_table is not None or (seqused_k is not None and cum_seq_q is None):
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        cache = as_cache(k, cum_seq_k, seqused_k, block_table, num_splits)
        cum_seq_k = None
    else:
        k, v = heads_first(key), heads_first(value)
        if (cum_seq_q is None) != (cum_seq_k is None):
            raise ValueError(f"{cum_seq_q=} and {cum_seq_k=} must be given together")
        if seqused_k is not None and cum_seq_q is not None:
            cum_seq_q, cum_seq_k = with_unused_apart(cum_seq_q, cum_seq_k, seqused_k)
            if alibi_slopes is not None and alibi_slopes.dim() == 2:
                alibi_slopes = alibi_slopes.repeat_interleave(2, 0)
    if cum_seq_q is not None:
        packing = as_packing(cum_seq_q, cum_seq_k)
    if alibi_slopes is not None:
        check_dtype("alibi_slopes", alibi_slopes, FLOATS)
    scores = () if alibi_slopes is None else (ALiBi(alibi_slopes),)
    masks = () if mask is None else as_mask(mask).parts()
    request = Request(
        heads_first(query), k, v, masks, scores, scale, "scaled_dot", None, "portable", dropout,
        packing=packing, cache=cache, deterministic=False,
    )  # fmt: skip
    check(request)
    return request


def check_arguments(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, block_table: Tensor | None
) -> None:
    """Raise ValueError for tensors that are not laid out as they must be."""
    layout = ROWS if cum_seq_q is None else TOKENS
    check_layout(layout, query=query)
    check_layout(layout if block_table is None else PAGES, key=key, value=value)
    check_heads(query, key, -2, layout)
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(f"value.shape={tuple(value.shape)} must end with query's dim, {query.shape[-1]}")
    if cum_seq_q is not None:
        check_integers(cum_seq_q=cum_seq_q)
    if block_table is not None:
        batch = query.shape[0] if cum_seq_q is None else len(cum_seq_q) - 1
        check_layout((batch, "max_pages"), block_table=block_table)


def mask_of(is_causal: bool, window_size_left: int | None, window_size_right: int | None) -> Any:
    """What causal and a window leave; None and -1 set no limit."""
    window = []
    for name, size in (("left", window_size_left), ("right", window_size_right)):
        if size is not None and size < -1:
            raise ValueError(f"window_size_{name}={size} must be None or -1 for no limit, or from 0")
        window.append(-1 if size is None else size)
    return window_mask(window, is_causal)


def as_cache(
    k: Tensor, cum_seq_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None,
    num_splits: int | None,
) -> Cache:  # fmt: skip
    """Keys [batch or pages, heads, rows, dim] of which each sequence has filled seqused_k."""
    if seqused_k is None and cum_seq_k is not None:
        seqused_k = cum_seq_k.diff()  # with pages, offsets say how many keys there are
    check_integers(seqused_k=seqused_k)
    assert seqused_k is not None
    pages, capacity = None, k.shape[2]
    if block_table is not None:
        pages = Pages(block_table, k.shape[2], k.shape[0])
        capacity *= block_table.shape[1]
    if num_splits is not None and num_splits < 0:
        raise ValueError(f"{num_splits=} must be None or 0, as suits the chip, or from 1")
    size = 16 * max(1, ceil_div(capacity, 16 * num_splits)) if num_splits else None
    return Cache(seqused_k, pages, size)


def heads_first(x: Tensor) -> Tensor:
    """[batch, length, heads, dim] as [batch, heads, length, dim]; [tokens, heads, dim] with 1 for batch."""
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)


# ---- In and out of the dispatcher


class Handle:
    """What PyTorch's registry keeps while tilewise is active."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def remove(self) -> None:
        """Leave the dispatcher as it was."""
        self.library._destroy()


def activate(device: str = "CUDA") -> Handle:
    """Put tilewise's kernels in place of a device's own. CUDA is what PyTorch's registry asks for."""
    if torch.version.hip is not None:
        raise NotImplementedError(
            "on ROCm PyTorch's flash ops return other shapes, which is not built: call "
            "tilewise.scaled_dot_product_attention"
        )
    library = Library("aten", "IMPL", device)
    for name, function in OPS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, function, device)
    return Handle(library)


if NAME not in list_flash_attention_impls():  # a second copy of tilewise leaves it to the first
    register_flash_attention_impl(NAME, register_fn=activate)
