"""The public functions: check → choose → call."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any, Literal, overload

import torch

import tilewise_reference

from .checks import Request, violations
from .forward import ForwardCall, launch_forward
from .masks import Causal, Mask, as_mask
from .problem import misfits
from .scores import Bias, Score, as_scores
from .similarity import Cosine, bind_similarity, default_scale
from .tiles import choose_tile

Tensor = torch.Tensor


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    return_lse: Literal[False] = False, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    return_lse: Literal[True], impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | Any = None,
    bias: Tensor | None = None,
    score: Score | Any = None,
    scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot",
    sink: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores(Q Kᵀ)) V in one fused kernel (FlashAttention-2, arXiv 2307.08691).

    The scores are scale · similarity(q, k), then the modifiers in `score` in their order, then + bias, then
    the mask.

    q:          [batch, q_heads, q_len, head_dim], fp16, bf16 or fp32, any strides.
    k:          [batch, kv_heads, kv_len, head_dim]; kv_heads divides q_heads (grouped queries,
                arXiv 2305.13245). Any length may be 0.
    v:          [batch, kv_heads, kv_len, value_dim]. head_dim and value_dim: 1 to 256.
    mask:       a mask of tilewise (combine with `&`), a bool tensor that broadcasts to
                [batch, q_heads, q_len, kv_len], True where the pair counts, or a `@triton.jit` keep function.
    bias:       fp16, bf16 or fp32 tensor that broadcasts to [batch, q_heads, q_len, kv_len].
    score:      a modifier of tilewise, a `@triton.jit` score function, or a sequence of these.
    scale:      a number or a tensor without dimensions; by default 1/√head_dim for "scaled_dot", else 1.
    similarity: "dot", "scaled_dot", "cosine", or Cosine(temperature).
    sink:       [q_heads], a logit a head that takes weight and adds no value (arXiv 2309.17453).
    return_lse: also return the natural logarithm of each row's sum of exponentials (with the sink's).
    impl:       "portable", the Triton kernel; "torch", plain PyTorch, whose memory is quadratic in length;
                None: the kernel on a GPU, and on a CPU in Triton's interpreter if TRITON_INTERPRET=1 was set
                before import, else plain PyTorch.

    Returns out [batch, q_heads, q_len, value_dim] in q's dtype and memory order, and lse
    [batch, q_heads, q_len] in fp32 if asked. A row that sees no key gives 0 and -inf (the sink's logit, if
    there is one). NaN in keys and values that no query may see never reaches a result.

    Raises ValueError for arguments that break the contract, NotImplementedError for what is not built;
    `why_not` lists the reasons instead.
    """
    request = make_request(
        q, k, v, mask=mask, bias=bias, score=score, scale=scale, similarity=similarity, sink=sink, impl=impl
    )
    for violation in violations(request):
        raise violation
    run = run_torch if request.implementation == "torch" else run_portable
    out, lse = run(request, return_lse)
    return (out, lse) if lse is not None else out


def why_not(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> list[str]:
    """The reasons why `attention` with the same arguments would raise; an empty list if it would not."""
    arguments.pop("return_lse", None)
    known = signature(make_request).parameters.keys() - {"q", "k", "v"}
    unknown = sorted(arguments.keys() - known)
    if unknown:
        return [f"attention() has no argument {', '.join(unknown)}; it takes {', '.join(sorted(known))}"]
    try:
        request = make_request(q, k, v, **arguments)
    except ValueError as error:
        return [str(error)]
    return [str(violation) for violation in violations(request)]


def make_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Any = None,
    bias: Tensor | None = None,
    score: Any = None,
    scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot",
    sink: Tensor | None = None,
    impl: str | None = None,
) -> Request:
    """The arguments of `attention` in their final form: masks as a tuple, the bias as the last modifier."""
    masks = () if mask is None else as_mask(mask).parts()
    scores = as_scores(score) if bias is None else (*as_scores(score), Bias(bias))
    return Request(q, k, v, masks, scores, scale, similarity, sink, impl)


def run_portable(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The fused Triton kernel."""
    q, k, v, shape = request.q, request.k, request.v, request.shape
    scale = default_scale(request.similarity, shape.head_dim) if request.scale is None else request.scale
    similarity, unit = bind_similarity(q, k, shape, request.similarity, scale, bool(request.scores))
    out = empty_in_order_of(q, shape.value_dim)
    lse = q.new_empty(shape.scores[:3], dtype=torch.float32) if return_lse else None
    call = ForwardCall(
        shape=shape,
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        sink=request.sink,
        masks=tuple(mask.bind(shape) for mask in request.masks),
        scores=similarity + tuple(score.bind(shape) for score in request.scores),
        unit=unit,
        has_gaps=any(mask.has_gaps for mask in request.masks),
    )
    launch_forward(call, choose_tile(q, shape))
    return out, lse


def run_torch(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch in fp32, differentiable; it holds the score matrix in memory."""
    q, k, v = request.q, request.k, request.v
    arguments = oracle_arguments(request)
    out, lse = tilewise_reference.attention(q, k, v, **arguments, return_lse=True, dtype=torch.float32)
    # A copy in q's dtype and memory order, as the kernel's result has them.
    return empty_in_order_of(request.q, out.shape[3]).copy_(out), lse if return_lse else None


def oracle_arguments(request: Request) -> dict[str, Any]:
    """The request as `tilewise_reference.attention` takes it: every mask and score by its twin."""
    similarity = request.similarity
    return dict(
        mask=[mask.twin(request.shape) for mask in request.masks],
        score=[score.twin(request.shape) for score in request.scores],
        scale=request.scale,
        similarity="cosine" if isinstance(similarity, Cosine) else similarity,
        temperature=similarity.temperature if isinstance(similarity, Cosine) else None,
        sink=request.sink,
    )


def empty_in_order_of(q: Tensor, value_dim: int) -> Tensor:
    """An output [batch, q_heads, q_len, value_dim], dense, its dimensions in memory in the order of q's, so
    that a caller who transposed [batch, length, heads, dim] inputs can transpose back without a copy."""
    order = sorted(range(3), key=q.stride, reverse=True)
    sizes = [q.shape[axis] for axis in order]
    return q.new_empty((*sizes, value_dim)).permute(*(order.index(axis) for axis in range(3)), 3)


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
    or fp32; broadcasts to [..., q_heads, q_len, kv_len]. is_causal aligns to the top left corner. Returns
    [..., q_heads, q_len, value_dim]. Raises NotImplementedError for dropout_p > 0.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"{dropout_p=} must be 0: dropout is not built yet")
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask and is_causal=True cannot be given together: put the corner into attn_mask"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} and "
            f"value.shape={tuple(value.shape)} must have at least 2 dimensions"
        )
    # Everything to [*lead, heads, length, dim] with common leading dimensions.
    rank = max(3, query.dim(), key.dim(), value.dim())
    q, k, v = (t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in (query, key, value))
    apart = 3 if enable_gqa else 2  # the dimensions at the end that do not broadcast
    try:
        common = torch.broadcast_shapes(*(t.shape[:-apart] for t in (q, k, v)))
    except RuntimeError:
        raise ValueError(
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} and "
            f"value.shape={tuple(value.shape)} must broadcast in all but the last {apart} dimensions"
        ) from None
    q, k, v = (t.expand(*common, *t.shape[-apart:]) for t in (q, k, v))
    lead = q.shape[:-3]
    batch = math.prod(lead)
    q4, k4, v4 = (t.reshape(batch, *t.shape[-3:]) for t in (q, k, v))

    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise ValueError(
                f"attn_mask.dtype={attn_mask.dtype} must be torch.bool, torch.float32 or {query.dtype=}"
            )
        scores = (*lead, q4.shape[1], q4.shape[2], k4.shape[2])
        for misfit in misfits("attn_mask", attn_mask, scores):
            raise ValueError(misfit)
        given = attn_mask
        if len(lead) > 1 and attn_mask.dim() > 3:
            given = attn_mask.expand(scores).reshape(batch, *scores[-3:])
        mask, bias = (given, None) if attn_mask.dtype == torch.bool else (None, given)
    out = attention(q4, k4, v4, mask=Causal("top_left") if is_causal else mask, bias=bias, scale=scale)
    out = out.reshape(*lead, *out.shape[1:])
    return out.reshape(out.shape[-max(query.dim(), key.dim(), value.dim()) :])
