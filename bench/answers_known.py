"""Are statistics of a softmax right? Held against float64, before they are timed.

Like gradients (answers.py): on some rows of the case itself what is of a row, the largest score and the
entropy; on a shortened copy of the case every element, and the mass of keys too, which is a sum over all
rows. Packed sequences and caches are not looked at: no group has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tilewise_reference
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import shortened
from tilewise_reference.cases import Case
from tilewise_reference.yardstick import largest_difference, math_statistics

from .answers import at, judge_forward, places, problem_at, request_of, whole
from .implementations.base import STATISTICS, Implementation, Prepared
from .judgement import Judgement, Problem, judge
from .results import Work

Tensor = torch.Tensor
OF_A_ROW = ("max_logit", "entropy")


def judge_statistics(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, work: Work, seed: int = 0
) -> Judgement:
    """Hold out and what the work asks of the softmax against float64; the judgement closest to its limit."""
    known, asked = prepared.call(), STATISTICS[work]
    judgements = [judge_forward(implementation, case, inputs, Prepared(lambda: known.out), work)]
    found = places(case, inputs.q.device)
    problems = [problem_at(case, inputs, place, None) for place in found]
    of_rows = {name: getattr(known, name) for name in asked if name in OF_A_ROW}
    judgements += _judge(of_rows, problems, lambda x: torch.cat([at(case, x, place) for place in found]))
    little = shortened(case)
    small = case_inputs(little, inputs.q.device, seed)
    again = implementation.prepare(little, small, work).call()
    all_of_it = {name: getattr(again, name) for name in asked}
    judgements += _judge(all_of_it, [whole(request_of(small), None)], torch.flatten)
    return max(judgements, key=lambda judgement: judgement.excess)


def _judge(
    given: dict[str, Tensor | None], problems: list[Problem], pick: Callable[[Tensor], Tensor]
) -> list[Judgement]:
    """A judgement of each statistic. pick: its elements that the problems are about, in a row."""
    missing = [name for name, x in given.items() if x is None]
    if missing:
        return [Judgement(float("inf"), 0.0, 0.0, f"there is no {' and no '.join(missing)}")]
    got = {name: pick(x) for name, x in given.items() if x is not None}
    fewest = min(x.numel() for x in got.values())
    exact: dict[str, list[Tensor]] = {name: [] for name in got}
    errors = dict.fromkeys(got, 0.0)
    for problem in problems:
        for near in problem.neighbours(fewest):
            wanted, own = in_float64(near), by_math(near)
            for name in got:
                errors[name] = max(errors[name], largest_difference(own[name], wanted[name]))
                if near is problem:
                    exact[name].append(wanted[name].flatten())
    judgements = []
    for name, x in got.items():
        want = torch.cat(exact[name])
        if x.shape != want.shape:
            words = f"{name} has {x.numel()} elements where {want.numel()} are wanted"
            judgements.append(Judgement(float("inf"), 0.0, 0.0, words))
        else:
            judgements.append(judge(name, x, want, errors[name], problems[0].q.dtype))
    return judgements


def in_float64(problem: Problem) -> dict[str, Tensor]:
    found = tilewise_reference.statistics.statistics(problem.q, problem.k, problem.v, **problem.options)
    return found._asdict()


def by_math(problem: Problem) -> dict[str, Tensor]:
    """As PyTorch's math path computes them in the dtype of the case."""
    found = math_statistics(problem.q, problem.k, problem.v, **problem.options)
    return dict(zip(("max_logit", "entropy", "key_mass"), found, strict=True))
