"""How far from float64 may an answer be? Measured beside PyTorch's own computation in the same dtype.

The rule is that of tilewise's tests (tests/harness/oracle.py, which tells why), so that rivals are held to
what tilewise is held to. No element may be further from the float64 reference than

    fp16 or bf16     2 · E + one rounding of the element      E: PyTorch's largest error on the same rows
    fp32             10 · max(E, one rounding)

PyTorch in the same dtype: Q Kᵀ in the dtype; scale, modifiers, mask and softmax in fp32; P rounded to the
dtype; P V in the dtype; the backward that of its fused kernels, with Σ P dP of a row from the rounded output.
Where a result has few elements, E is the largest of several problems that differ a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import tilewise_reference

Tensor = torch.Tensor
SAMPLES, NEIGHBOURS = 4096, 8
FLUSHED = torch.finfo(torch.float32).tiny  # below fp32's smallest normal number hardware may flush to zero


class Judgement(NamedTuple):
    """The largest error of an answer, PyTorch's, and what was allowed where the answer's was found."""

    error: float
    torch_error: float
    allowed: float
    wrong: str  # empty where every element is within what is allowed to it

    @property
    def excess(self) -> float:
        """How far the error is within (below 1) or beyond (above 1) what is allowed."""
        return math.inf if self.wrong else self.error / self.allowed


@dataclass(frozen=True)
class Problem:
    """q [B, Hq, Nq, D], k and v, and the reference's other arguments, masks and scores as functions."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def exact(self) -> Tensor:
        """out in float64."""
        return tilewise_reference.attention(self.q, self.k, self.v, **self.options)

    def pytorch(self) -> Tensor:
        """out as PyTorch's math computes it in q's dtype."""
        options, dtype = self.options, self.q.dtype
        (batch, q_heads, q_len, head_dim), (kv_heads, kv_len) = self.q.shape, self.k.shape[1:3]
        sizes = (batch, q_heads, q_len, kv_len)
        index = [
            torch.arange(size, device=self.q.device).reshape([size if a == axis else 1 for a in range(4)])
            for axis, size in enumerate(sizes)
        ]
        keep = torch.ones(sizes, dtype=torch.bool, device=self.q.device)
        for mask in options["mask"]:
            keep = keep & mask(*index)
        k, v = (x.repeat_interleave(q_heads // kv_heads, dim=1) for x in (self.k, self.v))
        q, factor = self.q, options["scale"]
        if factor is None:
            factor = 1 / math.sqrt(head_dim) if options["similarity"] == "scaled_dot" else 1.0
        if options["similarity"] == "cosine":
            q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
            temperature = options["temperature"]
            if isinstance(temperature, Tensor):
                temperature = temperature.float().reshape(-1, 1, 1)
            factor = factor * (1.0 if temperature is None else temperature)
        s = (q @ k.mT).float() * factor
        for score in options["score"]:
            s = score(s, *index)
        s = s.masked_fill(~keep, -math.inf)
        if options["sink"] is not None:
            sink = options["sink"].float().reshape(1, -1, 1, 1)
            s = torch.cat([s, sink.expand(batch, q_heads, q_len, 1)], dim=3)
        kept = options.get("dropout_keep")
        if kept is not None:
            kept = kept.to(dtype) / (1 - options["dropout_p"])
        out: Tensor = _SoftmaxValues.apply(s, v, kept)
        return out

    def neighbours(self, elements: int) -> Iterator[Problem]:
        """This problem, and others near it until SAMPLES elements are seen: every row of q and every value
        is multiplied by a factor from 3/4 to 5/4."""
        yield self
        generator = torch.Generator(self.q.device).manual_seed(1)

        def jitter(x: Tensor, *shape: int) -> Tensor:
            factor = 0.75 + 0.5 * torch.rand(shape, generator=generator, device=x.device)
            return (x * factor.to(x.dtype)).detach().requires_grad_(x.requires_grad)

        for _ in range(min(NEIGHBOURS, -(-SAMPLES // max(1, elements))) - 1):
            yield replace(self, q=jitter(self.q, *self.q.shape[:3], 1), v=jitter(self.v, *self.v.shape))


class _SoftmaxValues(torch.autograd.Function):
    """softmax(s) v with P rounded to v's dtype; s [.., kv_len] in fp32, perhaps with a sink's column."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, kept: Tensor | None) -> Tensor:
        p = torch.softmax(s, dim=3).masked_fill((s == -math.inf).all(dim=3, keepdim=True), 0)
        weights = p[..., : v.shape[2]].to(v.dtype)
        weights = weights if kept is None else weights * kept
        out = weights @ v
        ctx.kept = kept
        ctx.save_for_backward(p, weights, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None]:
        p, weights, v, out = ctx.saved_tensors
        dp = do @ v.mT
        dp = (dp if ctx.kept is None else dp * ctx.kept).float()
        dp = torch.nn.functional.pad(dp, (0, p.shape[3] - dp.shape[3]))  # a sink has no value
        delta = (do.float() * out.float()).sum(dim=3, keepdim=True)
        return p * (dp - delta), weights.mT @ do, None


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64; NaN becomes infinite."""
    return (got.double() - want).abs().nan_to_num(nan=math.inf, posinf=math.inf)


def largest(errors: Tensor) -> float:
    return errors.max().item() if errors.numel() else 0.0


def judge(name: str, got: Tensor, want: Tensor, torch_error: float) -> Judgement:
    """Hold one result to the rule. want: float64. torch_error: E."""
    if got.numel() == 0:
        return Judgement(0.0, torch_error, FLUSHED, "")
    finfo = torch.finfo(got.dtype)
    rounding = (want.abs() * (finfo.eps / 2)).clamp_min(finfo.tiny * finfo.eps / 2)
    if got.dtype == torch.float32:
        allowed = 10 * rounding.clamp_min(torch_error)
    else:
        allowed = 2 * torch_error + rounding
    allowed = allowed + FLUSHED
    errors = difference(got, want)
    excess = errors - allowed
    wrong = bool((excess > 0).any())
    at = (excess if wrong else errors).argmax()
    error, limit = errors.flatten()[at].item(), allowed.flatten()[at].item()
    words = ""
    if wrong:
        count = int((excess > 0).sum())
        words = (
            f"{name} is {error:.3g} from float64 where {limit:.3g} is allowed; "
            f"{count} of {got.numel()} elements looked at are wrong"
        )
    return Judgement(error, torch_error, limit, words)
