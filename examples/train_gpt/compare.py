"""Whether two implementations of attention train the same model, and how that can be told.

Both start from the same weights and see the same batches, so their losses differ by rounding alone: by
nothing much in the first steps. Each step then feeds its rounding into the next one's weights, and the
curves drift apart, slowly at first; a wrong gradient shows as soon as the weights that it moved are used.
So what is compared closely is the first steps. How close is close is measured rather than guessed: a third
model, the control, trains beside them with PyTorch's attention, of which every result is moved at random by
up to one rounding. It is as right as PyTorch's; how far its losses drift away is what rounding alone can do.

    allowed = factor · max(the control's largest gap, one rounding of an fp32 loss)

The factor follows the numerics contract: in fp32 a kernel's error may be ten times PyTorch's, in bf16 twice
and one rounding. Roundings of bf16 are so large that only fp32 shows small mistakes. Later losses are not
compared one by one. Those on the held-out tail at the end are, loosely: both must have learnt the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

COMPARED = 20  # steps, from the first
FACTORS = {"fp32": 10.0, "bf16": 4.0}
ALLOWED_AT_THE_END = 0.05  # nats


class Comparison(NamedTuple):
    """gap: the largest of the compared steps, reached at `step`; count: of those steps.

    allowed: `factor` times the control's largest gap in them, or times one rounding of the loss where that is
    more.
    """

    gap: float
    step: int
    count: int
    factor: float
    control_gap: float
    rounding: float

    @property
    def allowed(self) -> float:
        return self.factor * max(self.control_gap, self.rounding)

    @property
    def agrees(self) -> bool:
        return self.gap <= self.allowed  # False for NaN


def gaps_between(losses: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, others, strict=False)]


def compare(tested: list[float], trusted: list[float], control: list[float], dtype: str) -> Comparison:
    """Compare the first losses of two implementations. control: losses that are as far as rounding leads."""
    count = min(COMPARED, len(tested), len(trusted), len(control))
    gaps = gaps_between(tested[:count], trusted[:count])
    step = max(range(count), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
    rounding = torch.finfo(torch.float32).eps * max(trusted[:count])
    control_gap = max(gaps_between(control[:count], trusted[:count]))
    return Comparison(gaps[step], step, count, FACTORS[dtype], control_gap, rounding)
