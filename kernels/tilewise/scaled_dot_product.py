"""PyTorch's own call, `torch.nn.functional.scaled_dot_product_attention`, as one of `attention`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .api import attention
from .parts.hints import shape_hint, with_hint
from .parts.masks.causal import Causal
from .parts.shape import FLOATS, Shape, misfits
from .plan.request import is_autocast, is_cast
from .pytorch.nested import is_nested

Tensor = torch.Tensor


class Call(NamedTuple):
    """A call of `attention` that answers one of PyTorch's."""

    q: Tensor  # [batch, heads, length, dim], as k and v
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]  # what else `attention` is given, by name
    lead: tuple[int, ...]  # the dimensions that became batch
    rank: int  # the dimensions of PyTorch's result

    def like_query(self, out: Tensor) -> Tensor:
        """What `attention` gave, with the dimensions of PyTorch's result."""
        if out.is_nested or self.rank == out.dim() == len(self.lead) + 3:
            return out
        out = out.reshape(*self.lead, *out.shape[1:])
        return out.reshape(out.shape[-self.rank :])


def as_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """The call of `attention` that answers this one of PyTorch's; leading dimensions become one batch. Raises
    ValueError for what PyTorch's function forbids of shapes and masks; the rest `attention` looks at."""
    arguments: dict[str, Any]
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask and is_causal=True cannot be given together: put the corner into attn_mask"
        )
    if is_nested(query, key, value):
        if attn_mask is not None:
            raise ValueError(
                "attn_mask is not taken with nested tensors: give tilewise.attention mask= or bias="
            )
        arguments = dict(
            scale=scale,
            dropout_p=dropout_p,
            deterministic=False,
            mask=Causal("top_left") if is_causal else None,
        )
        return Call(query, key, value, arguments, (), query.dim())
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} and "
            f"value.shape={tuple(value.shape)} must have at least 2 dimensions"
        )
    q, k, v = with_common_lead(query, key, value, enable_gqa)
    lead = tuple(q.shape[:-3])
    batch = math.prod(lead)
    if len(lead) != 1:
        q, k, v = (t.reshape(batch, *t.shape[-3:]) for t in (q, k, v))

    # PyTorch's call leaves the order of sums to torch.use_deterministic_algorithms.
    arguments = dict(scale=scale, dropout_p=dropout_p, deterministic=False)
    if is_causal:
        arguments["mask"] = Causal("top_left")
    if attn_mask is not None:
        shape = Shape(batch, q.shape[1], k.shape[1], q.shape[2], k.shape[2], 1, 1)
        check_mask(attn_mask, query, shape, lead)
        given = attn_mask
        if len(lead) > 1 and attn_mask.dim() > 3:
            given = attn_mask.expand(*lead, *shape.scores[1:]).reshape(shape.scores)
        arguments["mask" if attn_mask.dtype == torch.bool else "bias"] = given
    return Call(q, k, v, arguments, lead, max(query.dim(), key.dim(), value.dim()))


def with_common_lead(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, ...]:
    """The three as [*lead, heads, length, dim], with what broadcasts broadcast: leading dimensions, and heads
    unless these are grouped. Raises ValueError where they do not."""
    apart = 3 if enable_gqa else 2  # the dimensions at the end that do not broadcast
    if query.dim() == key.dim() == value.dim() == 4:
        if query.shape[:-apart] == key.shape[:-apart] == value.shape[:-apart]:
            return query, key, value
    rank = max(3, query.dim(), key.dim(), value.dim())
    q, k, v = (t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in (query, key, value))
    try:
        common = torch.broadcast_shapes(*(t.shape[:-apart] for t in (q, k, v)))
    except RuntimeError:
        shapes = (
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} and "
            f"value.shape={tuple(value.shape)} must broadcast in all but the last {apart} dimensions"
        )
        heads, kv_heads = q.shape[-3], k.shape[-3]
        is_grouped = not enable_gqa and 0 < kv_heads == v.shape[-3] < heads and heads % kv_heads == 0
        hint = f"{heads} heads over {kv_heads} are grouped by enable_gqa=True" if is_grouped else ""
        raise ValueError(with_hint(shapes, hint)) from None
    return tuple(t.expand(*common, *t.shape[-apart:]) for t in (q, k, v))


def check_mask(attn_mask: Tensor, query: Tensor, shape: Shape, lead: tuple[int, ...]) -> None:
    """Raise ValueError for a mask of another dtype or shape than PyTorch takes with such a query: autocast
    casts both there, so that they may differ before."""
    casts = is_autocast(query.device) and is_cast(query) and attn_mask.dtype in FLOATS
    if not casts and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            f"attn_mask.dtype={attn_mask.dtype} must be torch.bool, torch.float32 or {query.dtype=}"
        )
    for misfit in misfits("attn_mask", attn_mask, (*lead, *shape.scores[1:])):
        hint = shape_hint("attn_mask", tuple(attn_mask.shape), shape) if len(lead) == 1 else ""
        raise ValueError(with_hint(misfit, hint))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its signature and semantics.

    query [..., q_heads, q_len, head_dim], key and value [..., kv_heads, kv_len, dim]: leading dimensions, and
    heads unless enable_gqa, broadcast. attn_mask: bool (True = may attend), or additive in query's dtype
    or fp32; broadcasts to [..., q_heads, q_len, kv_len]. is_causal aligns to the top left corner. dropout_p
    draws from PyTorch's generator, though not the pairs that PyTorch would drop. Returns
    [..., q_heads, q_len, value_dim].
    """
    call = as_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return call.like_query(attention(call.q, call.k, call.v, **call.arguments))
