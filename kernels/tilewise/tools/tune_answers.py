"""Is an answer right? Held against float64, it may be off by about twice what PyTorch is in the same dtype.

No element may be further from the float64 oracle than

    fp16 or bf16        2 · E + one rounding            E: PyTorch's largest error in the same dtype
    fp32, and lse       10 · max(E, one rounding)       E: PyTorch's largest error in fp32

One rounding is half a unit in the last place of the element. PyTorch's way is that of its math path: Q Kᵀ in
the dtype, softmax in fp32, P rounded to the dtype, P V in the dtype.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import tilewise_reference

from ..api import oracle_arguments
from ..checks import Request
from ..encoding import decode, encode
from ..similarity import Cosine

Tensor = torch.Tensor


class Expected(NamedTuple):
    """By name, "out", "lse" and gradients "dq", "dk", ...: float64's answer and PyTorch's largest error."""

    wanted: dict[str, Tensor]
    errors: dict[str, float]


def expect(request: Request, do: Tensor) -> Expected:
    """What is expected of the forward of a request, and of the gradients of q, k, v and of the other tensors
    that require one, where do is out's."""
    exact = with_leaves(request, torch.float64)
    wanted = results(
        exact,
        *tilewise_reference.attention(exact.q, exact.k, exact.v, **oracle_arguments(exact), return_lse=True),
        do.double(),
    )
    own = with_leaves(request, None)
    found = results(own, *pytorch(own, request.q.dtype), do)
    with torch.no_grad():
        found["lse"] = pytorch(request, torch.float32)[1]
    errors = {name: difference(found[name], wanted[name]).max().item() for name in wanted}
    return Expected(wanted, errors)


def worst_share(name: str, got: Tensor, expected: Expected) -> float:
    """The largest error of a result, as a share of what is allowed to it: up to 1 it is right."""
    wanted, error = expected.wanted[name], expected.errors[name]
    finfo = torch.finfo(got.dtype)
    rounding = (wanted.abs().nan_to_num(posinf=0.0) * (finfo.eps / 2)).clamp_min(finfo.tiny * finfo.eps / 2)
    allowed = 10 * rounding.clamp_min(error) if got.dtype == torch.float32 else 2 * error + rounding
    # Below fp32's smallest normal number hardware may flush to zero.
    return (difference(got, wanted) / (allowed + torch.finfo(torch.float32).tiny)).max().item()


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64; 0 where both are the same infinity, infinite for NaN."""
    got = got.double()
    apart = torch.where(got == want, 0.0, (got - want).abs())
    return apart.nan_to_num(nan=math.inf, posinf=math.inf)


def results(request: Request, out: Tensor, lse: Tensor, do: Tensor) -> dict[str, Tensor]:
    """out, lse and the gradients of the request's leaves."""
    leaves = gradient_tensors(request)
    grads = torch.autograd.grad(out, list(leaves.values()), do)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def gradient_tensors(request: Request) -> dict[str, Tensor]:
    """The tensors that get a gradient, by the gradient's name, in the order of `autograd.run_backward`."""
    others = enumerate(request.other_tensors)
    trained = {f"d{name} ({slot})": x for slot, (name, x) in others if x.requires_grad}
    return {f"d{name}": x for name, x in request.qkv().items()} | trained


def with_leaves(request: Request, dtype: torch.dtype | None) -> Request:
    """The request on copies, in this dtype (None: its own), of q, k, v and what requires a gradient."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    encoded = encode(request)
    tensors = [leaf(x) if x.requires_grad else x for x in encoded.tensors]
    copied = decode(leaf(request.q), leaf(request.k), leaf(request.v), encoded._replace(tensors=tensors))
    return replace(copied, impl=request.impl)


def pytorch(request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [.., in dtype] and lse [.., fp32] as PyTorch's math path computes them on inputs of that dtype."""
    shape, similarity = request.shape, request.similarity
    axes = [
        torch.arange(size, device=request.q.device).reshape([size if axis == a else 1 for a in range(4)])
        for axis, size in enumerate(shape.scores)
    ]
    q = request.q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(shape.group, dim=1) for x in (request.k, request.v))
    factor: Any = request.scale
    if factor is None:
        factor = 1 / math.sqrt(shape.head_dim) if similarity == "scaled_dot" else 1.0
    if similarity == "cosine" or isinstance(similarity, Cosine):
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
        temperature = similarity.temperature if isinstance(similarity, Cosine) else 1.0
        factor = factor * (
            temperature.float().reshape(-1, 1, 1) if isinstance(temperature, Tensor) else temperature
        )
    s = (q @ k.mT).float() * factor
    for score in request.scores:
        s = score.twin(shape)(s, *axes)
    for mask in request.masks:
        s = s.masked_fill(~mask.twin(shape)(*axes), -math.inf)
    if request.sink is not None:
        sink = request.sink.float().reshape(1, -1, 1, 1).expand(*shape.scores[:3], 1)
        s = torch.cat([s, sink], dim=3)
    kept = None
    if request.dropout is not None:
        probability, seed = request.dropout
        pairs = tilewise_reference.dropout_keep(seed, probability, shape.scores, seed.device)
        kept = pairs.to(dtype) / (1 - probability)
    out, lse = SoftmaxValues.apply(s, v, kept)
    return out, lse


class SoftmaxValues(torch.autograd.Function):
    """softmax(s) v with P rounded to v's dtype, and lse; s [.., kv_len] in fp32, or with a sink's column at
    its end. The backward takes Σ_j P dP of a row from the rounded output, as PyTorch's fused kernels do."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        p = torch.softmax(s, dim=3).masked_fill((s == -math.inf).all(dim=3, keepdim=True), 0)
        weights = p[..., : v.shape[2]].to(v.dtype)
        weights = weights if kept is None else weights * kept
        out, lse = weights @ v, torch.logsumexp(s, dim=3)
        ctx.kept = kept
        ctx.save_for_backward(p, weights, v, out)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        p, weights, v, out = ctx.saved_tensors
        dp = do @ v.mT
        dp = (dp if ctx.kept is None else dp * ctx.kept).float()
        dp = torch.nn.functional.pad(dp, (0, p.shape[3] - dp.shape[3]))  # a sink has no value
        delta = (do.float() * out.float()).sum(dim=3, keepdim=True)
        return p * (dp - delta), weights.mT @ do, None
