"""The rule for a match, and the one function that applies it.

The rule itself, and PyTorch's own computation by which it measures, are `tilewise_reference.yardstick`: there
is no tolerance to choose. The lse that goes with PyTorch's computation in fp16 or bf16 would carry the
rounding of Q Kᵀ, which the kernel, returning lse in fp32, may not hide behind: PyTorch's fp32 result is the
yardstick there. Gradients: `harness.gradients`.

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
from tilewise.parts.fp8 import FP8
from tilewise.plan.request import Request, request_of
from tilewise.pytorch.dequantized import dequantized, scales_of_rows
from tilewise.pytorch.pieces import by_sequence
from tilewise.pytorch.plain import Block, oracle_arguments
from tilewise_reference.fp8 import e4m3, fp8_attention
from tilewise_reference.yardstick import allowed_error, difference, largest_difference, pytorch_attention

Tensor = torch.Tensor
SAMPLES, NEIGHBOURS = 4096, 8
ALSO: list[
    str
] = []  # implementations that must give the answer too, where they take the call: `pytest --also`


def check(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Run `tilewise.attention` with these arguments and hold out and lse against float64.

    impl is "portable" unless given; then those of ALSO must give the answer too, where they take the call.
    Returns (out, lse) of the implementation under test. Raises AssertionError that names the output, the
    worst element and what was allowed there.
    """
    for impl in others_asked(q, k, v, **arguments):
        check(q, k, v, **arguments, impl=impl)
    arguments = {"impl": "portable"} | arguments
    out, lse = call(q, k, v, **arguments)
    assert_matches(*as_of_request(out, lse, arguments), request_of(q, k, v, **arguments))
    return out, lse


def call(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """out and lse of `tilewise.attention`; where offsets are given, of `tilewise.packed_attention`, and where
    lengths are, of `tilewise.cached_attention`."""
    if "kv_lens" in arguments:
        return tilewise.cached_attention(q, k, v, **arguments, return_lse=True)
    function = tilewise.packed_attention if "q_offsets" in arguments else tilewise.attention
    return function(q, k, v, **arguments, return_lse=True)


def as_of_request(out: Tensor, lse: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What `call` gave, with the dimensions that its request has."""
    return (out.transpose(0, 1)[None], lse[None]) if "q_offsets" in arguments else (out, lse)


def others_asked(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> list[str]:
    """Those of ALSO that take the call, where it does not say which implementation it means."""
    if "impl" in arguments:
        return []
    return [impl for impl in ALSO if not tilewise.why_not(q, k, v, **arguments, impl=impl)]


def assert_matches(out: Tensor, lse: Tensor, request: Request) -> None:
    """Assert that out and lse answer the request."""
    rows, dtype = request.q.shape[:3], request.out_dtype
    want_out, want_lse = exact(request)
    assert not want_out.isnan().any(), "the float64 oracle itself gives NaN: a query of this test sees NaN"
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == want_out.shape and lse.shape == rows
    assert out.device == lse.device == request.q.device
    if out.numel() == 0 and lse.numel() == 0:
        return
    error_out, error_lse = errors_of_pytorch(request, want_out, want_lse)
    if request.q.dtype == FP8 and dtype == torch.float32:
        error_out /= 5  # 2 · E, the rule of what is rounded to few bits, whatever out comes in
    _assert_close("out", out, want_out, error_out)
    _assert_close("lse", lse, want_lse, error_lse)


def exact(request: Request) -> tuple[Tensor, Tensor]:
    """out and lse of the float64 oracle; of packed sequences, one sequence after another."""

    def answer(one: Request, batch: int = 0) -> tuple[Tensor, Tensor]:
        arguments, one = oracle_arguments(one, whole(one, batch)), dequantized(one, torch.float64)
        return tilewise_reference.attention(one.q, one.k, one.v, **arguments, return_lse=True)

    return answer(request) if request.shape.is_dense else by_sequence(request, answer)


def whole(request: Request, batch: int) -> Block:
    """All of a request that is left of the packed sequence of this number."""
    return Block(0, request.shape.q_len, 0, request.shape.kv_len, batch)


def indices(request: Request) -> list[Tensor]:
    """batch, head, q_idx and kv_idx as the twins take them: each along its own one of four dimensions."""
    return [
        torch.arange(size, device=request.q.device).reshape([size if axis == a else 1 for a in range(4)])
        for axis, size in enumerate(request.shape.scores)
    ]


def kept_pairs(request: Request) -> Tensor:
    """The pairs that count in a dense request, [batch, q_heads, q_len, kv_len] bool."""
    keep = torch.ones(request.shape.scores, dtype=torch.bool, device=request.q.device)
    for mask in request.masks:
        keep = keep & mask.twin(request.shape)(*indices(request))
    return keep


def rows_that_see(request: Request) -> Tensor:
    """The rows that see a key, [batch, q_heads, q_len] bool; of packed sequences [1, q_heads, tokens]."""
    lse = exact(request)[1]
    return lse.isfinite() if request.sink is None else exact(replace(request, sink=None))[1].isfinite()


def pytorch(request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [.., in dtype] and lse [.., fp32] as PyTorch's math paths compute them on inputs of that dtype; of
    fp8, which they do not know, as plain fp8 attention does."""

    def answer(one: Request, batch: int = 0) -> tuple[Tensor, Tensor]:
        arguments = oracle_arguments(one, whole(one, batch))
        if dtype == FP8:
            scales = scales_of_rows(one)
            return fp8_attention(one.q, one.k, one.v, *scales, dtype=one.out_dtype, **arguments)
        q, k, v = (x.to(dtype) for x in dequantized(one).qkv().values())
        return pytorch_attention(q, k, v, **arguments)

    return answer(request) if request.shape.is_dense else by_sequence(request, answer)


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
        error_out = max(error_out, largest_difference(out, exact_out))
        error_lse = max(error_lse, largest_difference(lse, exact_lse))
    # Infinite would allow anything: such data has no yardstick.
    assert math.isfinite(error_out + error_lse), "PyTorch itself overflows on this data; make it smaller"
    return error_out, error_lse


def neighbour(request: Request, generator: torch.Generator) -> Request:
    """The same problem with every row of q and every value multiplied by a factor from 3/4 to 5/4."""

    def jitter(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        factor = 0.75 + 0.5 * torch.rand(shape, generator=generator, device=x.device)
        return e4m3(x.float() * factor) if x.dtype == FP8 else x * factor.to(x.dtype)

    return replace(
        request, q=jitter(request.q, (*request.q.shape[:3], 1)), v=jitter(request.v, tuple(request.v.shape))
    )


def _assert_close(name: str, got: Tensor, want: Tensor, error: float) -> None:
    if got.numel() == 0:
        return
    allowed = allowed_error(want, got.dtype, error)
    errors = difference(got, want)
    excess = torch.where(errors.isinf(), math.inf, errors - allowed)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    assert excess[worst] <= 0, (
        f"{name}{list(worst)} = {got[worst].item():.9g}, float64 says {want[worst].item():.9g}: "
        f"error {errors[worst].item():.3g}, allowed {allowed[worst].item():.3g}; "
        f"{int((excess > 0).sum())} of {excess.numel()} elements of {name} are wrong"
    )
