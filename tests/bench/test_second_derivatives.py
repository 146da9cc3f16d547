"""Second derivatives and forward mode: who has them, and is a wrong one found out?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from bench.groups import comparisons
from bench.implementations import IMPLEMENTATIONS, Implementation, for_group
from bench.implementations.base import Prepared
from bench.measure import measure
from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

GROUP = "second derivatives"
PAIRS = comparisons(GROUP, quick=True, tiny=True)
HAVE_BOTH = {"tilewise portable", "tilewise torch", "sdpa math"}
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def test_whoever_differentiates_once_says_so():
    for case, work in PAIRS:
        for each in for_group(GROUP):
            reason = each.refuses(case, work)
            assert (reason is None) == (each.name in HAVE_BOTH), (each.name, reason)
            assert reason is None or len(reason.split()) >= 6
        assert IMPLEMENTATIONS["flex"].refuses(case, "forward") is None


class Changed(Implementation):
    """PyTorch's math path with something added to out that is 0, but has a derivative."""

    needs_gpu = False

    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change = name, change

    def unsupported(self, case: Case, work: Any) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        prepared = IMPLEMENTATIONS["sdpa math"].prepare(case, inputs, work)
        still = forward_ad.unpack_dual(inputs.q).primal if work == "forward mode" else inputs.q
        return replace(prepared, call=lambda: prepared.call() + self.change(inputs.q, still.detach()))


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[f"{case.name}, {work}" for case, work in PAIRS])
def test_a_wrong_derivative_of_the_right_order_is_found(number):
    case, work = PAIRS[number]
    right, first, second = measure(
        case, work,
        [
            Changed("right", lambda q, still: 0 * q),
            Changed("first order", lambda q, still: q - still),
            Changed("second order", lambda q, still: (q - still) ** 2),
        ],
        group=GROUP, seconds=0.0, device="cpu", rounds=1, least=1,
    )  # fmt: skip
    assert right.status == "ok" and len(right.seconds) == 1 and 0 < right.error <= right.allowed_error
    assert right.flops == case.flops(work) > case.flops()
    wrong, untouched = (first, second) if work == "forward mode" else (second, first)
    assert wrong.status == "wrong" and (
        "tangent of out" in wrong.reason or "derivative of dq" in wrong.reason
    )
    assert untouched.status == "ok"  # which it does not ask for
