"""The rule for a match, and the one function that applies it.

A result counts as right when no element is further from the float64 oracle than

    out in fp16 or bf16     2 · E + one rounding            E: PyTorch's largest error in the same dtype
    out in fp32             10 · max(E, one rounding)       E: PyTorch's largest error in fp32
    lse, always fp32        10 · max(E, one rounding)       E: PyTorch's largest error in fp32

One rounding is half a unit in the last place of the element itself. There is no tolerance to choose: E is
measured on the data of the test, over the whole tensor.

"PyTorch in the same dtype" is the way its math paths compute attention: Q Kᵀ in the dtype; scale, modifiers,
mask and softmax in fp32; P rounded to the dtype; P V in the dtype (gradients: `harness.gradients`). The lse
that goes with it would carry the rounding of Q Kᵀ, which the kernel, returning lse in fp32, may not hide
behind: PyTorch's fp32 result is the yardstick there.

Luck must not set the mark. PyTorch's fp32 result is exact where one logit stands alone in its row (lse is
that logit), hence the max: the kernel's way through powers of two costs a few roundings. And where a result
has few elements (one query, two keys), or few that no huge score decides, all its roundings may happen to
vanish. So small results are measured on neighbouring problems too: every row of q and every value is
multiplied by a random factor near 1, and each such problem is compared with its own float64 result, until
SAMPLES elements are seen, in at most NEIGHBOURS problems. Large results need none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

import tilewise
import tilewise_reference
from tilewise.api import make_request, oracle_arguments
from tilewise.checks import Request
from tilewise.similarity import Cosine

Tensor = torch.Tensor
SAMPLES, NEIGHBOURS = 4096, 8
# Below fp32's smallest normal number hardware may flush to zero.
FLUSHED = torch.finfo(torch.float32).tiny


def check(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Run `tilewise.attention` with these arguments and hold out and lse against float64.

    impl is "portable" unless given. Returns (out, lse) of the implementation under test. Raises
    AssertionError that names the output, the worst element and what was allowed there.
    """
    arguments = {"impl": "portable"} | arguments
    out, lse = tilewise.attention(q, k, v, **arguments, return_lse=True)
    assert_matches(out, lse, make_request(q, k, v, **arguments))
    return out, lse


def assert_matches(out: Tensor, lse: Tensor, request: Request) -> None:
    """Assert that out and lse answer the request."""
    shape, dtype = request.shape, request.q.dtype
    want_out, want_lse = exact(request)
    assert not want_out.isnan().any(), "the float64 oracle itself gives NaN: a query of this test sees NaN"
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == want_out.shape and lse.shape == shape.scores[:3]
    assert out.device == lse.device == request.q.device
    if out.numel() == 0 and lse.numel() == 0:
        return
    error_out, error_lse = errors_of_pytorch(request, want_out, want_lse)
    _assert_close("out", out, want_out, error_out)
    _assert_close("lse", lse, want_lse, error_lse)


def exact(request: Request) -> tuple[Tensor, Tensor]:
    """out and lse of the float64 oracle."""
    arguments = oracle_arguments(request)
    return tilewise_reference.attention(request.q, request.k, request.v, **arguments, return_lse=True)


def indices(request: Request) -> list[Tensor]:
    """batch, head, q_idx and kv_idx as the twins take them: each along its own one of four dimensions."""
    return [
        torch.arange(size, device=request.q.device).reshape([size if axis == a else 1 for a in range(4)])
        for axis, size in enumerate(request.shape.scores)
    ]


def kept_pairs(request: Request) -> Tensor:
    """The pairs that count, [batch, q_heads, q_len, kv_len] bool."""
    keep = torch.ones(request.shape.scores, dtype=torch.bool, device=request.q.device)
    for mask in request.masks:
        keep = keep & mask.twin(request.shape)(*indices(request))
    return keep


def pytorch(request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [.., in dtype] and lse [.., fp32] as PyTorch's math paths compute them on inputs of that dtype."""
    shape, similarity, keep = request.shape, request.similarity, kept_pairs(request)
    by_kv_head = keep.unflatten(1, (shape.kv_heads, shape.group))
    seen = by_kv_head.any(dim=3).any(dim=2)[..., None]  # [batch, kv_heads, kv_len, 1]
    sees = keep.any(dim=3, keepdim=True)  # [batch, q_heads, q_len, 1]

    q = torch.where(sees, request.q, 0).to(dtype)  # NaN where nobody looks is no part of the yardstick
    k = torch.where(seen, request.k, 0).to(dtype).repeat_interleave(shape.group, dim=1)
    v = torch.where(seen, request.v, 0).to(dtype).repeat_interleave(shape.group, dim=1)
    factor = request.scale
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
        s = score.twin(shape)(s, *indices(request))
    s = s.masked_fill(~keep, -math.inf)
    if request.sink is not None:
        sink = request.sink.float().reshape(1, -1, 1, 1).expand(*shape.scores[:3], 1)
        s = torch.cat([s, sink], dim=3)
    kept = None
    if request.dropout is not None:
        probability, seed = request.dropout
        kept = tilewise_reference.dropout_keep(seed, probability, shape.scores).to(dtype) / (1 - probability)
    out, lse = SoftmaxValues.apply(s, v, kept)
    return out, lse


class SoftmaxValues(torch.autograd.Function):
    """softmax(s) v with P rounded to v's dtype, and lse; s [.., kv_len] in fp32, or with a sink's column at
    its end. The backward is that of PyTorch's fused kernels: Σ_j P dP of a row comes from the rounded
    output."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        p = torch.softmax(s, dim=3).masked_fill((s == -math.inf).all(dim=3, keepdim=True), 0)
        weights = p[..., : v.shape[2]].to(v.dtype)
        weights = weights if kept is None else weights * kept
        out, lse = weights @ v, torch.logsumexp(s, dim=3)
        ctx.kept = kept
        ctx.save_for_backward(p, weights, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, None]:
        p, weights, v, out, lse = ctx.saved_tensors
        dp = do @ v.mT
        dp = (dp if ctx.kept is None else dp * ctx.kept).float()
        dp = torch.nn.functional.pad(dp, (0, p.shape[3] - dp.shape[3]))  # a sink has no value
        delta = (do.float() * out.float()).sum(dim=3) - dlse
        delta = delta.masked_fill(lse == -math.inf, 0)
        return p * (dp - delta[..., None]), weights.mT @ do, None


def errors_of_pytorch(request: Request, want_out: Tensor, want_lse: Tensor) -> tuple[float, float]:
    """The largest error of PyTorch's out in the request's dtype, and of its lse in fp32."""
    problems = [(request, want_out, want_lse)]
    elements = max(1, want_out.numel())
    generator = torch.Generator(device=request.q.device).manual_seed(1)
    for _ in range(min(NEIGHBOURS, -(-SAMPLES // elements) - 1)):
        near = neighbour(request, generator)
        problems.append((near, *exact(near)))

    error_out = error_lse = 0.0
    for problem, exact_out, exact_lse in problems:
        out, lse = pytorch(problem, request.q.dtype)
        if request.q.dtype != torch.float32:
            _, lse = pytorch(problem, torch.float32)
        error_out = max(error_out, _largest_error(out, exact_out))
        error_lse = max(error_lse, _largest_error(lse, exact_lse))
    # Infinite would allow anything: such data has no yardstick.
    assert math.isfinite(error_out + error_lse), "PyTorch itself overflows on this data; make it smaller"
    return error_out, error_lse


def neighbour(request: Request, generator: torch.Generator) -> Request:
    """The same problem with every row of q and every value multiplied by a factor from 3/4 to 5/4."""

    def jitter(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x * (0.75 + 0.5 * torch.rand(shape, generator=generator, device=x.device)).to(x.dtype)

    return replace(
        request, q=jitter(request.q, (*request.q.shape[:3], 1)), v=jitter(request.v, tuple(request.v.shape))
    )


def _difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64; 0 where both are the same infinity; NaN becomes infinite."""
    got = got.double()
    difference = torch.where(got == want, 0.0, (got - want).abs())
    return difference.nan_to_num(nan=math.inf, posinf=math.inf)


def _largest_error(got: Tensor, want: Tensor) -> float:
    return _difference(got, want).max().item() if got.numel() else 0.0


def _assert_close(name: str, got: Tensor, want: Tensor, error: float) -> None:
    if got.numel() == 0:
        return
    finfo = torch.finfo(got.dtype)
    rounding = (want.abs().nan_to_num(posinf=0.0) * (finfo.eps / 2)).clamp_min(finfo.tiny * finfo.eps / 2)
    allowed = 10 * rounding.clamp_min(error) if got.dtype == torch.float32 else 2 * error + rounding
    allowed = allowed + FLUSHED
    difference = _difference(got, want)
    excess = torch.where(difference.isinf(), math.inf, difference - allowed)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    assert excess[worst] <= 0, (
        f"{name}{list(worst)} = {got[worst].item():.9g}, float64 says {want[worst].item():.9g}: "
        f"error {difference[worst].item():.3g}, allowed {allowed[worst].item():.3g}; "
        f"{int((excess > 0).sum())} of {excess.numel()} elements of {name} are wrong"
    )
