"""The public functions: check → choose → call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch

import tilewise_reference

from .kernels.dropout_mask import launch_dropout_mask
from .parts.dropout import Dropout
from .parts.dtensors import is_dtensor
from .parts.fp8 import Scales
from .parts.masks.mask import Mask, as_mask
from .parts.scores.bias import Bias
from .parts.scores.score import Score, as_scores
from .parts.similarity import Cosine
from .parts.stats import Statistics, Stats
from .plan.checks import check, violations
from .plan.implementation import implementation
from .plan.names import ARGUMENTS, CACHED_ARGUMENTS, NEW, OFFSETS, RETURNED, unknown_names
from .plan.names import refuse_unknown as refuse_unknown  # nn refuses them too
from .plan.request import Request, as_heads, as_packing, cached_request, make_request, without_drawing
from .plan.rules.cache import new_misfits
from .plan.rules.implementations import implementation_is_known, kernel_can_run
from .plan.rules.options import dropout_fits
from .plan.rules.statistics import stats_misfits
from .pytorch.dispatch import answer_again, run_portable
from .pytorch.nested import is_nested, unpack
from .pytorch.plain import run_torch
from .pytorch.statistics import answer_with_statistics

Tensor = torch.Tensor
# out, and lse and statistics where they are asked for.
Results = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Statistics] | tuple[Tensor, Tensor, Statistics]
# The arguments that can fail by themselves, and how each is built.
PARTS: dict[str, Callable[[Any], Any]] = {
    "mask": lambda given: None if given is None else as_mask(given),
    "score": as_scores,
    "bias": lambda given: None if given is None else Bias(given),
}


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, scales: Scales | None = None,
    return_lse: Literal[False] = False, return_stats: None = None, impl: str | None = None,
    strict: bool = False, deterministic: bool = True,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, scales: Scales | None = None,
    return_lse: Literal[True], return_stats: None = None, impl: str | None = None, strict: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, scales: Scales | None = None,
    return_lse: Literal[False] = False, return_stats: Stats, impl: str | None = None, strict: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, bias: Tensor | None = None, score: Any = None,
    scale: float | Tensor | None = None, similarity: str | Cosine = "scaled_dot", sink: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, scales: Scales | None = None,
    return_lse: Literal[True], return_stats: Stats, impl: str | None = None, strict: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Statistics]: ...  # fmt: skip
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
    """softmax(scores(Q Kᵀ)) V in one fused kernel (FlashAttention-2, arXiv 2307.08691).

    The scores are scale · similarity(q, k), then the modifiers in `score` in their order, then + bias, then
    the mask.

    q:          [batch, q_heads, q_len, head_dim]: heads before length, as in PyTorch, where FlashAttention
                has [batch, length, heads, dim] (transpose(1, 2) makes one of the other, without a copy).
                fp16, bf16 or fp32, any strides; fp64, which plain PyTorch computes in fp64; with scales
                float8_e4m3fn (arXiv 2209.05433), forward alone, on NVIDIA's GPUs from sm_90 on.
    k:          [batch, kv_heads, kv_len, head_dim]; kv_heads divides q_heads (grouped queries,
                arXiv 2305.13245). Any length may be 0.
    v:          [batch, kv_heads, kv_len, value_dim]. head_dim: 1 to 576; value_dim: 1 to 512.
    mask:       a mask of tilewise (combine with `&`, `|`, `~`), a bool tensor that broadcasts to
                [batch, q_heads, q_len, kv_len], True where the pair counts, or a `@triton.jit` keep function.
    bias:       float tensor that broadcasts to [batch, q_heads, q_len, kv_len]; fp64 only where q is.
    score:      a modifier of tilewise, a `@triton.jit` score function, or a sequence of these.
    scale:      a number or a tensor without dimensions; by default 1/√head_dim for "scaled_dot", else 1.
    similarity: "dot", "scaled_dot", "cosine", or Cosine(temperature).
    sink:       [q_heads], a logit a head that takes weight and adds no value (arXiv 2309.17453).
    dropout_p:  the probability that a pair's weight is set to 0; the others are divided by 1 - dropout_p.
                For 1 all are 0; lse is as without.
    dropout_seed: a tensor of one int64 on q's device that decides which pairs are dropped: `dropout_mask`
                shows them. None: drawn from PyTorch's generator of the device.
    scales:     `Scales(...)`: what q, k and v in float8_e4m3fn stand for; `quantize` makes both.
    return_lse: also return the natural logarithm of each row's sum of exponentials (with the sink's).
    return_stats: `Stats(...)`: also return what it asks of the weights, as `Statistics`.
    impl:       "portable", the Triton kernels; "hopper", a second forward, for some calls on Hopper GPUs:
                no GPU has run it yet; "torch", plain PyTorch, on a CPU its own attention where that
                is the same. None: for fp64 plain PyTorch; else the portable kernels on a GPU, and on a CPU
                in Triton's interpreter if TRITON_INTERPRET=1 was set before import, else plain PyTorch.
    strict:     raise for whatever needs memory quadratic in length: a bool mask, bias or tensor of a user's
                function that is stored, not expanded, along both queries and keys; and plain PyTorch under
                torch.compile or a function transform.

    deterministic: whether gradients are the same bits in each run, as out and lse always are. False lets the
                programs of a backward in one walk add to dQ as they come, and not in turns; but not while
                torch.use_deterministic_algorithms is on.

    Returns out [batch, q_heads, q_len, value_dim] in q's dtype, of fp8 in scales.dtype, and in q's memory
    order, then lse [batch, q_heads, q_len] in fp32 (fp64) if asked, then `Statistics` if asked. A row that
    sees no key gives 0 and -inf (the sink's logit, if there is one). NaN in keys and values that no query may
    see never reaches a result or gradient.

    Differentiable twice, in reverse and in forward mode but not twice in that, in q, k, v, bias, scale, sink,
    a temperature, slopes, tables and what a UserScore declares; through out and lse; and under torch.vmap.
    Once, in reverse mode, through what `Statistics` says. Under autocast q, k and v are cast to its dtype,
    but for fp64.

    Raises ValueError for arguments that break the contract, NotImplementedError for what is not built,
    TypeError for names that it does not have (`unknown`), with what other libraries' names are here;
    `why_not` lists the reasons instead.

    q, k and v may be nested tensors of layout torch.jagged, [batch, heads, *, dim]: `nested`.
    """
    if unknown:
        refuse_unknown("attention", unknown)
    jagged = unpack(q, k, v) if is_nested(q, k, v) else None
    if jagged is not None:
        q, k, v = jagged[:3]
    request = make_request(
        q, k, v, mask=mask, bias=bias, score=score, scale=scale, similarity=similarity, sink=sink,
        dropout_p=dropout_p, dropout_seed=dropout_seed, scales=scales, impl=impl, strict=strict,
        deterministic=deterministic,
        packing=None if jagged is None else jagged.packing,
    )  # fmt: skip
    if return_stats is not None:
        if jagged is not None:
            raise ValueError(
                "return_stats with nested tensors: call tilewise.packed_attention on their values and offsets"
            )
        return returned(*answer_with(request, return_stats), return_lse)
    result, row_lse = answer(request, return_lse)
    if jagged is not None:
        result, row_lse = jagged.like_q(result), None if row_lse is None else jagged.like_q(row_lse)
    return result if row_lse is None else (result, row_lse)


watchers: list[Callable[[Request], None]] = []  # told of each request that is answered: `tilewise doctor`


def answer(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out, and lse if asked for, of a request: as a call like it was answered before, or check → choose →
    call."""
    if not watchers and (found := answer_again(request, return_lse)) is not None:
        return found
    check(request)
    if is_dtensor(request.q):  # cut over devices, each of which comes back with its part
        from .pytorch.sharded import answer_on_mesh  # imports DTensor, as the caller did

        return answer_on_mesh(request, return_lse, answer)
    for watch in watchers:
        watch(request)
    is_plain = implementation(request) == "torch"
    if torch.compiler.is_compiling() and not request.shape.is_dense:  # the host reads lengths: in an op
        is_plain = False
    out, lse = (run_torch if is_plain else run_portable)(request, return_lse)
    return out, lse if return_lse else None


def answer_with(request: Request, stats: Stats) -> tuple[Tensor, Tensor, Statistics]:
    """out, lse and statistics of a request: check → call."""
    check(request)
    for reason in stats_misfits(request, stats):
        raise ValueError(reason)
    for watch in watchers:
        watch(request)
    return answer_with_statistics(request, stats)


def returned(out: Tensor, lse: Tensor, found: Statistics, return_lse: bool) -> Results:
    return (out, lse, found) if return_lse else (out, found)


def why_not(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> list[str]:
    """All reasons why `attention` with the same arguments would raise; an empty list if it would not. With
    q_offsets: why `packed_attention` would; with kv_lens, and caches for k and v: why `cached_attention`."""
    if "kv_lens" in arguments:
        return why_not_cached(q, k, v, arguments)
    is_packed = "q_offsets" in arguments
    offsets = {name: arguments.pop(name, None) for name in OFFSETS} if is_packed else {}
    found = unknown_names("packed_attention" if is_packed else "attention", arguments)
    given = {name: value for name, value in arguments.items() if name in ARGUMENTS and name not in RETURNED}
    found += unbuildable(given)
    try:
        if is_packed:
            q, k, v = as_heads(q, k, v)
            given["packing"] = as_packing(**offsets)
        elif is_nested(q, k, v):
            q, k, v, given["packing"] = unpack(q, k, v)
        request = make_request(q, k, v, **without_drawing(q, given))
    except (ValueError, NotImplementedError) as error:
        return list(dict.fromkeys([*found, str(error)]))
    against = [str(violation) for violation in violations(request)]
    return found + (against or stats_reasons(request, arguments.get("return_stats")))


def stats_reasons(request: Request, stats: Any) -> list[str]:
    """What is wrong with `return_stats` of a request in which all else is right."""
    return [] if stats is None else list(stats_misfits(request, stats))


def why_not_cached(q: Tensor, cache_k: Tensor, cache_v: Tensor, arguments: dict[str, Any]) -> list[str]:
    """The same of `cached_attention`; what is to be written into the cache is judged if all else is right."""
    found = unknown_names("cached_attention", arguments, CACHED_ARGUMENTS)
    known = {name: value for name, value in arguments.items() if name in CACHED_ARGUMENTS}
    new_k, new_v, rotary = (known.pop(name, None) for name in NEW)
    stats = known.get("return_stats")
    known = {name: value for name, value in known.items() if name not in RETURNED}
    found += unbuildable(known)
    try:
        request = cached_request(q, cache_k, cache_v, **without_drawing(q, known))
    except (ValueError, NotImplementedError) as error:
        return list(dict.fromkeys([*found, str(error)]))
    against = [str(violation) for violation in violations(request)]
    against = against or list(new_misfits(request, new_k, new_v, rotary))
    return found + (against or stats_reasons(request, stats))


def unbuildable(given: dict[str, Any]) -> list[str]:
    """Why masks, scores and biases cannot be built; those are taken out, so that the rest is judged."""
    found = []
    for name, build in PARTS.items():
        try:
            build(given.get(name))
        except (ValueError, NotImplementedError) as error:
            found.append(str(error))
            del given[name]
    return found


def dropout_mask(
    shape: tuple[int, int, int, int], dropout_p: float, dropout_seed: Tensor, *, impl: str | None = None
) -> Tensor:
    """The pairs that `attention(..., dropout_p=, dropout_seed=)` keeps, bool, True where kept.

    shape: (batch, q_heads, q_len, kv_len). impl as in `attention`; both give the same pairs. The mask has a
    number of elements quadratic in length, which `attention` never stores: this function is for tests and for
    looking. Raises ValueError for a probability or a seed that `attention` refuses.
    """
    batch, q_heads, q_len, kv_len = shape
    if not isinstance(dropout_seed, Tensor):
        raise ValueError(f"{dropout_seed=} must be a tensor of one torch.int64 number")
    like = torch.empty(0, device=dropout_seed.device)
    q, k = like.expand(batch, q_heads, q_len, 0), like.expand(batch, q_heads, kv_len, 0)
    request = Request(q, k, k, (), (), None, "dot", None, impl, Dropout(dropout_p, dropout_seed))
    for rule in (dropout_fits, implementation_is_known, kernel_can_run):
        if (reason := rule(request)) is not None:
            raise ValueError(reason)
    if implementation(request) == "torch":
        return tilewise_reference.dropout_keep(dropout_seed, dropout_p, shape, dropout_seed.device)
    return launch_dropout_mask(Dropout(dropout_p, dropout_seed), request.shape)
