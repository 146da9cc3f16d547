"""How far from float64 is an answer, and how far may it be? By the rule that tilewise's own tests have.

The rule, and PyTorch's own computation by which it measures, are `tilewise_reference.yardstick`: rivals are
held to what tilewise is held to. Where a result has few elements, PyTorch's error is the largest of several
problems that differ a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import tilewise_reference
from tilewise_reference.yardstick import FLUSHED, allowed_error, difference, pytorch_attention

Tensor = torch.Tensor
SAMPLES, NEIGHBOURS = 4096, 8


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
        return pytorch_attention(self.q, self.k, self.v, **self.options)[0]

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


def judge(
    name: str, got: Tensor, want: Tensor, torch_error: float, dtype: torch.dtype | None = None
) -> Judgement:
    """Hold one result to the rule. want: float64. torch_error: E. dtype: whose rule, if not got's own: that
    of the matmuls which a result in fp32 comes from."""
    if got.numel() == 0:
        return Judgement(0.0, torch_error, FLUSHED, "")
    allowed = allowed_error(want, dtype or got.dtype, torch_error)
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
