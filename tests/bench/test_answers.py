"""Does the bench see a wrong answer? And does it look at the rows that it means to look at?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
import tilewise_reference
from bench.answers import (
    Place,
    judge_all_gradients,
    judge_backward,
    judge_forward,
    part,
    places,
    request_of,
    revealed_keep,
    seeded_keep,
    whole,
    whole_keep,
)
from bench.implementations import IMPLEMENTATIONS
from bench.implementations.base import Implementation, Prepared
from bench.judgement import judge
from harness import oracle
from harness.gradients import exact_gradients, pytorch_gradients
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise_reference.cases import Case, Features

CPU = torch.device("cpu")
TORCH = IMPLEMENTATIONS["tilewise torch"]


def a_case(dtype: str = "float32", q_len: int = 70, kv_len: int = 90, **features: Any) -> Case:
    return Case(
        name="a", batch=2, q_heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, head_dim=16, value_dim=8,
        dtype=dtype, phase="training", provenance="", features=Features(**features),
    )  # fmt: skip


EVERYTHING = dict(
    causal="bottom_right",
    window=(30, None),
    bool_mask=True,
    softcap=5.0,
    alibi=True,
    relative_position=(8, 20, True),
    bias=(1, 4, 70, 90),
    sink=True,
    similarity="cosine",
    temperature=True,
    dropout=0.3,
)


class Spoiled(Implementation):
    """tilewise's own, with something wrong on the way."""

    name, needs_gpu, seeded = "spoiled", False, True

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def unsupported(self, case: Case, work: Any) -> None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        prepared = TORCH.prepare(case, inputs, work)
        return replace(prepared, call=lambda: self.spoil(prepared.call(), inputs))


def judged(implementation: Implementation, case: Case) -> Any:
    inputs = case_inputs(case, CPU)
    return judge_forward(implementation, case, inputs, implementation.prepare(case, inputs, "forward"))


@pytest.mark.parametrize(
    "features", [{}, {"causal": "bottom_right"}, EVERYTHING], ids=["plain", "causal", "all"]
)
def test_rows_of_a_place_are_those_rows_of_the_whole(features):
    case = a_case(**features)
    inputs = case_inputs(case, CPU)
    request = request_of(inputs)
    keep = whole_keep(TORCH, case, inputs, "forward", request) if request.dropout else None
    everything = whole(request, keep).exact()
    found = places(case, CPU)
    assert len({(p.batch, p.head) for p in found}) >= 3
    for place in found:
        assert {0, 35, 69} <= set(place.rows.tolist())
        here = seeded_keep(request, place) if request.dropout else None
        got = part(request, place, here).exact()[0, 0]
        want = everything[place.batch, place.head][place.rows]
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_the_whole_is_what_the_oracle_says():
    case = a_case(**EVERYTHING)
    inputs = case_inputs(case, CPU)
    request = request_of(inputs)
    want, _ = oracle.exact(request)
    keep = whole_keep(TORCH, case, inputs, "forward", request)
    assert torch.equal(whole(request, keep).exact(), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [{}, {**EVERYTHING, "trained": True}], ids=["plain", "all"])
def test_a_whole_problem_is_judged_as_the_tests_judge_it(dtype, features):
    """Out and gradients of float64 and of PyTorch's own way, beside those of the tests' harness."""
    case = a_case(dtype, **features)
    inputs = case_inputs(case, CPU, gradients=True)
    request = request_of(inputs)
    keep = whole_keep(TORCH, case, inputs, "backward", request) if request.dropout else None
    problem = whole(request, keep)
    theirs, lse = oracle.pytorch(request, case.torch_dtype)
    ours = problem.pytorch()
    assert torch.equal(ours, theirs)
    do = torch.randn_like(ours)
    from bench.answers import _all_gradients

    theirs_exact = exact_gradients(request, do, torch.zeros_like(lse))
    theirs_torch = pytorch_gradients(request, do, torch.zeros_like(lse))
    for dtype_, want in ((torch.float64, theirs_exact), (None, theirs_torch)):
        got = _all_gradients(request, problem, keep, do, dtype_)
        assert len(got) == len(want)
        renamed = {name.split(" ")[0].split(".")[-1]: x for name, x in want.items()}
        for name, gradient in got.items():
            assert torch.allclose(gradient, renamed[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_answer_is_right(dtype):
    judgement = judged(TORCH, a_case(dtype, causal="bottom_right", sink=True))
    assert not judgement.wrong and 0 < judgement.error <= judgement.allowed


def test_the_other_corner_is_wrong():
    case = a_case(causal="bottom_right")
    other = Spoiled(
        lambda out, i: tilewise.attention(i.q, i.k, i.v, mask=tilewise.Causal("top_left"), impl="torch")
    )
    judgement = judged(other, case)
    assert "out is" in judgement.wrong and judgement.error > judgement.allowed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, i: out * 1.0001,
        lambda out, i: out.clone().index_fill(2, torch.tensor([69]), 0.0),
        lambda out, i: torch.full_like(out, math.nan),
        lambda out, i: out.transpose(1, 2),
        lambda out, i: out.double(),
        lambda out, i: out[:, [1, 0, 3, 2]],
    ],
    ids=["a little", "last row", "nan", "layout", "dtype", "heads"],
)
def test_wrong_answers_are_wrong(spoil):
    assert judged(Spoiled(spoil), a_case()).wrong


def test_a_judgement_names_what_it_saw():
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    judgement = judge("out", torch.tensor([1.0, 2.5]), want, 1e-6)
    assert judgement.error == 0.5 and judgement.allowed == pytest.approx(1e-5)
    assert (
        judgement.wrong
        == "out is 0.5 from float64 where 1e-05 is allowed; 1 of 2 elements looked at are wrong"
    )
    assert judgement.excess == math.inf
    half = judge("out", torch.tensor([1.0, 2.0], dtype=torch.bfloat16), want + 1e-3, 1e-3)
    assert not half.wrong and half.error == pytest.approx(1e-3)
    assert half.allowed == pytest.approx(2e-3 + 2.001 * 2**-8, rel=0.5)


# ---- Gradients


def scaled_gradient(name: str, factor: float) -> Any:
    """An implementation whose gradient of one tensor is off by a factor."""

    class Off(Spoiled):
        def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
            prepared = TORCH.prepare(case, inputs, work)

            class Backward(Prepared):
                def gradients(self, got: Any) -> dict[str, torch.Tensor]:
                    found = prepared.gradients(got)
                    return {n: x * factor if n == name else x for n, x in found.items()}

            return Backward(prepared.call, prepared.leaves)

    return Off(None)


FEATURES = dict(causal="bottom_right", sink=True, bias=(1, 4, 70, 90), alibi=True, trained=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_gradients_are_right(dtype):
    case = a_case(dtype, **FEATURES)
    judgements = judge_all_gradients(TORCH, case, CPU, "backward")
    assert len(judgements) == 6 and not any(j.wrong for j in judgements)
    inputs = case_inputs(case, CPU, gradients=True)
    prepared = TORCH.prepare(case, inputs, "backward")
    assert not judge_backward(TORCH, case, inputs, prepared, "backward").wrong


@pytest.mark.parametrize("name", ["q", "k", "v", "sink", "bias", "slopes"])
def test_a_wrong_gradient_is_wrong(name):
    case = a_case(**FEATURES)
    inputs = case_inputs(case, CPU, gradients=True)
    off = scaled_gradient(name, 1.001)
    judgement = judge_backward(off, case, inputs, off.prepare(case, inputs, "backward"), "backward")
    assert judgement.wrong.startswith(f"d{name} is")
    nan = scaled_gradient(name, math.nan)
    judgement = judge_backward(nan, case, inputs, nan.prepare(case, inputs, "backward"), "backward")
    assert judgement.wrong == f"the gradient of {name} is not finite"


# ---- Dropout


def test_a_rival_shows_which_pairs_it_dropped():
    """What the values tell is what its own random numbers were: here, those of a seed that is known."""
    case = a_case(dropout=0.4, causal="bottom_right")
    inputs = case_inputs(case, CPU)
    request = request_of(inputs)
    found = places(case, CPU)
    shown = revealed_keep(TORCH, case, inputs, "forward", found)
    for place, keep in zip(found, shown, strict=True):
        seen = place.rows[:, None] + 20 >= torch.arange(case.kv_len)
        assert torch.equal(keep, seeded_keep(request, place) & seen)
        assert 0.5 < keep[seen].float().mean() < 0.7


def test_seeded_pairs_are_those_of_the_reference():
    case = a_case(dropout=0.4)
    request = request_of(case_inputs(case, CPU, seed=3))
    want = tilewise_reference.dropout_keep(3, 0.4, request.shape.scores)
    place = Place(1, 2, torch.tensor([0, 5, 69]))
    assert torch.equal(seeded_keep(request, place), want[1, 2][place.rows])


@pytest.mark.parametrize("work", ["forward", "backward"])
def test_dropout_of_pytorchs_own_is_judged(work):
    case = replace(a_case(dropout=0.2, q_len=48, kv_len=48), value_dim=16)
    inputs = case_inputs(case, CPU, gradients=work == "backward")
    math_ = IMPLEMENTATIONS["sdpa math"]
    prepared = math_.prepare(case, inputs, work)
    judge_it = judge_backward if work == "backward" else judge_forward
    judgement = judge_it(math_, case, inputs, prepared, work)
    assert not judgement.wrong and judgement.error < 1e-5
    without = IMPLEMENTATIONS["sdpa math"].prepare(replace(case, features=Features()), inputs, work)
    assert judge_forward(math_, case, inputs, without, "forward").wrong
