"""Is an answer in fp8 right? Held against float64 of the numbers that were multiplied.

What these numbers stand for is exact, q = q_scale · q8; what quantizing has lost is no error of attention.
How far from float64 the answer may be is told by plain fp8 attention, which rounds its weights to 8 bits too
(tilewise_reference.fp8), as PyTorch's own computation tells it of 16 bits. Who multiplies in 16 bits is
judged by that. Numbers that are made are held against what they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import tilewise_reference
from tilewise.plan.request import Request
from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case
from tilewise_reference.fp8 import fp8_attention, quantize, rotation
from tilewise_reference.yardstick import largest_difference

from .answers import Place, judge_forward, judge_rows, part, places, request_of
from .implementations.base import Implementation, Prepared
from .implementations.fp8 import Quantize
from .judgement import Judgement, Problem, judge
from .results import Work

Tensor = torch.Tensor
FLOATS = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Fp8Problem(Problem):
    """q, k and v are fp8 numbers. scales: of their rows, [B, H, N or 1, 1] each."""

    scales: tuple[Tensor, Tensor, Tensor]
    dtype: torch.dtype  # of out

    def exact(self) -> Tensor:
        return self.exact_forward()[0]

    def pytorch(self) -> Tensor:
        return self.plain_forward()[0]

    def exact_forward(self) -> tuple[Tensor, Tensor]:
        """out and lse in float64."""
        numbers = zip((self.q, self.k, self.v), self.scales, strict=True)
        q, k, v = (x.double() * scale.double() for x, scale in numbers)
        return tilewise_reference.attention(q, k, v, **self.options, return_lse=True)

    def plain_forward(self) -> tuple[Tensor, Tensor]:
        """The same as plain fp8 attention computes them."""
        return fp8_attention(self.q, self.k, self.v, *self.scales, self.dtype, **self.options)

    def neighbours(self, elements: int) -> Iterator[Problem]:
        """This problem, and others near it whose scales of q differ, until enough elements are seen."""
        ones = Problem(torch.ones_like(self.scales[0]), self.k, torch.ones_like(self.scales[2]), {})
        for near in ones.neighbours(elements):
            q, k, v = self.scales
            yield replace(self, scales=(q * near.q, k, v * near.v))


def judge_fp8(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, work: Work
) -> Judgement:
    """Hold out against float64 on the rows of `places`."""
    numbers = prepared.numbers
    if numbers is None:
        return judge_forward(implementation, case, inputs, prepared, work)
    request = request_of(inputs._replace(q=numbers.q, k=numbers.k, v=numbers.v))
    of_rows = [each[:, :, None, None] for each in numbers.scales[:3]]  # [batch, heads, 1, 1]

    def problems() -> list[Problem]:
        return [
            fp8_part(request, of_rows, place, case.torch_dtype) for place in places(case, inputs.q.device)
        ]

    return judge_rows(case, inputs, prepared, problems)


def fp8_part(request: Request, of_rows: list[Tensor], place: Place, dtype: torch.dtype) -> Fp8Problem:
    """`part` of a call whose scales do not change along rows."""
    problem, kv_head = part(request, place, None), place.head // request.shape.group
    heads = (place.head, kv_head, kv_head)
    q_scale, k_scale, v_scale = (
        scale[place.batch, head][None, None] for scale, head in zip(of_rows, heads, strict=True)
    )
    return Fp8Problem(problem.q, problem.k, problem.v, problem.options, (q_scale, k_scale, v_scale), dtype)


def scale_of_rows(scale: Tensor, rows: int | None, length: int) -> Tensor:
    """A number for each row of [blocks, heads, length, dim], or for all of them: [.., .., length or 1, 1]."""
    return scale[..., None, None] if rows is None else scale.repeat_interleave(rows, 2)[:, :, :length, None]


def judge_quantized(implementation: Quantize, inputs: Inputs, prepared: Prepared) -> Judgement:
    """Hold all three against what they were made of; the judgement closest to its limit."""
    given = prepared.call()
    each = zip("qkv", inputs[:3], given[:3], given.scales[:3], strict=True)
    found = [
        judge_numbers(name, x, x8, scale, "head", implementation.rotate and name != "v")
        for name, x, x8, scale in each
    ]
    return max(found, key=lambda judgement: judgement.excess)


def judge_numbers(
    name: str, x: Tensor, x8: Tensor, scale: Tensor, per: str | int, is_rotated: bool
) -> Judgement:
    """Hold fp8 numbers of x [blocks, heads, length, dim] against float64, rounded once, and their scales
    against the reference's; bit for bit where nothing is rotated."""
    wanted = quantize(x, per, is_rotated)
    if x8.shape != x.shape or scale.shape != wanted.scale.shape:
        words = f"{name} has {tuple(x8.shape)} numbers and {tuple(scale.shape)} scales"
        return Judgement(math.inf, 0.0, 0.0, f"{words}, not {tuple(x.shape)} and {tuple(wanted.scale.shape)}")
    r = rotation(x.shape[3]).to(x.device)
    exact, own = (x.to(dtype) @ r.to(dtype) if is_rotated else x.to(dtype) for dtype in FLOATS)
    of_rows = scale_of_rows(scale, per if isinstance(per, int) else None, x.shape[2])
    exact, own = (y / of_rows.to(y.dtype) for y in (exact, own))
    numbers = judge(name, x8.double(), exact, largest_difference(own, exact), x8.dtype)
    if not is_rotated and not (same_bits(x8, wanted.x8) and same_bits(scale, wanted.scale)):
        return numbers._replace(wrong=numbers.wrong or f"{name} and its scales have not the reference's bits")
    scales = judge(f"the scale of {name}", scale, wanted.scale.double(), 0.0)
    return max(numbers, scales, key=lambda judgement: judgement.excess)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
