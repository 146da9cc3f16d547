"""Statistics of the softmax: who has which, and is a wrong one found out?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bench.answers_known import judge_statistics
from bench.groups import comparisons
from bench.implementations import IMPLEMENTATIONS, Implementation, flex, for_group
from bench.implementations.base import Known, Prepared
from bench.measure import measure
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import shrunk
from tilewise_reference.cases import Case, paper_grid

from .test_implementations import MORE

GROUP = "statistics"
PAIRS = comparisons(GROUP, quick=True, tiny=True)
CASE = PAIRS[0][0]
BY_HAND = "pytorch by hand"
HAVE_ALL = {"tilewise portable", "tilewise torch", BY_HAND, f"{BY_HAND}, compiled"}
CPU = torch.device("cpu")


def judged(each: Implementation, case: Case, work: Any = "statistics") -> Any:
    with torch.no_grad():
        inputs = case_inputs(case, CPU)
        return judge_statistics(each, case, inputs, each.prepare(case, inputs, work), work)


def test_whoever_returns_less_says_what_is_missing():
    assert [work for _, work in PAIRS] == ["max logit", "statistics"]
    for case, work in PAIRS:
        has = HAVE_ALL | ({"flex"} if work == "max logit" else set())
        for each in for_group(GROUP):
            reason = each.refuses(case, work)
            assert (reason is None) == (each.name in has), (each.name, reason)
            assert reason is None or "max_logit" in reason or "return_stats" in reason or each.name == "flex"
    assert IMPLEMENTATIONS["flex"].refuses(CASE, "statistics") == (
        "flex returns no entropy and no key_mass of its softmax"
    )
    assert "written for" in (IMPLEMENTATIONS[BY_HAND].refuses(CASE, "forward") or "")
    assert BY_HAND not in {each.name for each in for_group("forward grid")}


@pytest.mark.parametrize(
    ("name", "more"),
    [(BY_HAND, ("window-offset", "bias-heads", "alibi-offset")), ("tilewise torch", ("sink-dropout",))],
)
def test_they_agree_with_the_oracle(name, more):
    longer = shrunk(
        next(paper_grid((128,), (1024,), "bfloat16")), batch=2, kv_heads=2, group=1, length=100, suffix=""
    )
    for case in (longer, *(case for case in MORE if case.name in more)):
        assert IMPLEMENTATIONS[name].refuses(case, "statistics") is None
        judgement = judged(IMPLEMENTATIONS[name], case)
        assert not judgement.wrong, (case.name, judgement)


def test_the_kernels_are_judged_too(device):
    ours = IMPLEMENTATIONS["tilewise portable"]
    inputs = case_inputs(CASE, device)
    with torch.no_grad():
        prepared = ours.prepare(CASE, inputs, "statistics")
        assert not judge_statistics(ours, CASE, inputs, prepared, "statistics").wrong


def test_flex_gives_its_max_scores():
    """Where there is a GPU; the arithmetic of its uncompiled form is the same here, once it is let."""
    with pytest.raises(flex.UnsupportedError, match="no max scores on a CPU"):
        IMPLEMENTATIONS["flex"].prepare(CASE, case_inputs(CASE, CPU), "max logit")

    class Let(flex.Flex):
        def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
            run = flex.uncompiled(flex.attend(case, inputs, work))

            def call() -> Any:
                with patch.object(flex.module, "_apply_kernel_options", lambda *args: {"BACKEND": "AUTO"}):
                    return run(*inputs[:3])

            return Prepared(call)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in (CASE, next(case for case in MORE if case.name == "alibi-offset")):
            assert not judged(Let(), case, "max logit").wrong


class Spoiled(Implementation):
    """By hand, with one statistic changed."""

    needs_gpu, statistics = False, ("max_logit", "entropy", "key_mass")

    def __init__(self, name: str, change: Callable[[Known], Known]) -> None:
        self.name, self.change = name, change

    def unsupported(self, case: Case, work: Any) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        prepared = IMPLEMENTATIONS[BY_HAND].prepare(case, inputs, work)
        return replace(prepared, call=lambda: self.change(prepared.call()))


def test_a_wrong_statistic_is_found():
    case, work = PAIRS[1]
    spoils: dict[str, Callable[[Known], Known]] = {
        "right": lambda known: known,
        "entropy": lambda known: known._replace(entropy=known.entropy / 0.6931),  # in bits
        "key_mass": lambda known: known._replace(key_mass=known.key_mass.roll(1, 2)),
        "max_logit": lambda known: known._replace(max_logit=known.max_logit + 0.1),
        "out": lambda known: known._replace(out=known.out + 0.1),
        "there is no key_mass": lambda known: known._replace(key_mass=None),
        "key_mass has 23 elements": lambda known: known._replace(key_mass=known.key_mass[..., 1:]),
    }
    right, *wrong = measure(
        case, work, [Spoiled(name, change) for name, change in spoils.items()],
        group=GROUP, seconds=0.0, device="cpu", rounds=1, least=1,
    )  # fmt: skip
    assert right.status == "ok" and len(right.seconds) == 1 and 0 < right.error <= right.allowed_error
    assert right.flops == case.flops() and right.work == work
    for row in wrong:
        assert row.status == "wrong" and row.reason.startswith(row.implementation), row
