"""When does the GPU run know what? Its stages in simulated time.

A kernel compiles in 8 s on a core, a process is ready after 10: both are estimates.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench import first_light, run
from bench.jobs import Setting, do_canary, do_measure
from bench.machine import describe
from bench.results import Check, Row, load
from bench.workers import Outcome, Task

from .runs import MACHINE, Clock, make_run

COMPILING, STARTING, GRACE = 8.0, 10.0, 8.0


class Beside:
    """Does as many tasks at a time as are asked for, in simulated time, as `bench.workers.Workers` would."""

    def __init__(self, clock: Clock, hung: tuple[str, ...] = ()) -> None:
        self.clock, self.hung, self.processes = clock, hung, 0
        self.ended: dict[str, float] = {}

    def run(self, tasks: Iterator[Task], until: float, count: int = 1) -> Iterator[Outcome]:
        busy: list[tuple[float, int, float, Task]] = []
        number = itertools.count()
        more = True
        while True:
            while more and self.clock() < until and len(busy) < count:
                task = next(tasks, None)
                more = task is not None
                if task is not None:
                    starting = STARTING if len(busy) >= self.processes else 0.0
                    ready = self.clock() + starting
                    end = ready + min(seconds_of(task) if task.name not in self.hung else 1e9, task.seconds)
                    heapq.heappush(busy, (min(end, until + GRACE), next(number), ready, task))
                    self.processes = max(self.processes, len(busy))
            if not busy:
                return
            end, _, ready, task = heapq.heappop(busy)
            self.clock.now = max(self.clock.now, end)
            self.ended[task.name] = self.clock.now
            yield self.outcome(task, end - ready, end >= until + GRACE)

    def outcome(self, task: Task, seconds: float, is_cut: bool) -> Outcome:
        if is_cut:
            return Outcome(task, seconds, error="the time was up", broken=True, cut=True)
        if task.name in self.hung:
            return Outcome(task, seconds, error="not done", broken=True, hung=True)
        return Outcome(task, seconds, MACHINE if task.function is describe else (answer(task), ""))


def seconds_of(task: Task) -> float:
    """How long it takes from when its process is ready."""
    if task.function is describe:
        return 1.0
    if task.function is do_canary:
        kernels = 3 if "backward" in task.name else 1
        return COMPILING * kernels + 3.0
    if task.name.startswith("compile "):
        return COMPILING * (3 if "backward" in task.name else 2) + 3.0
    if task.function is do_measure:
        return task.arguments[-1] + 3.0  # as long as it was told to measure, and the check of its answers
    if task.name.startswith("tests/"):
        return task.arguments[-1]
    return 2 * COMPILING + 2.0 if task.name.startswith("hopper") else 3 * COMPILING + 2.0


def answer(task: Task) -> list:
    if task.function is not do_measure:
        return [Check(task.name, "right", 1.0)]
    group, case, work, names, *_ = task.arguments
    return [Row(group, case.name, work, name, "ok", seconds=[1e-3]) for name in names]


@pytest.fixture
def carry_out(tmp_path, monkeypatch):
    """The first run on 16 cores, in simulated time; when each job ended, and the results."""
    monkeypatch.setattr("os.sched_getaffinity", lambda which: range(16))
    monkeypatch.setattr(run, "clocks_now", dict)

    def carry_out(*hung: str):
        clock = Clock()
        began, hands = clock.now, Beside(clock, hung)
        going = make_run(tmp_path / "results.jsonl", hands, seconds=405.0)
        going.setting = replace(Setting("cuda", 0), folder=tmp_path)
        going.begin(None)
        going.stages([*first_light.FIRST])
        return {name: end - began for name, end in hands.ended.items()}, load(going.path), clock.now - began

    return carry_out


def test_ratios_are_there_before_half_of_the_time_is_over(carry_out):
    ended, results, seconds = carry_out()
    canaries = [end for name, end in ended.items() if name.startswith("canary")]
    assert len(canaries) == 18 and max(canaries) < 60
    assert not [check for check in results.checks if check.status != "right"]
    ratios = [end for name, end in ended.items() if name.startswith("paper-d128")]
    assert len(ratios) == 12 and min(ratios) < 110 and max(ratios) < 200
    assert all("tilewise hopper" in {row.implementation for row in results.rows if row.case == name}
               for name in ("paper-d128-full-4096", "paper-d128-causal-16384"))  # fmt: skip
    others = [name for name in ended if name.startswith(("paper-d64", "paper-d256"))]
    assert len(others) == 15 and "copy and matmul" in ended and seconds < 420


def test_a_canary_that_hangs_costs_no_ratio(carry_out):
    """Every one of Hopper's at 128 and 64: what is known of the rest comes as early, at 256 with Hopper's."""
    hung = [f"canary: hopper forward, width {w}, {m}" for w in (128, 64) for m in ("full", "causal")]
    ended, results, seconds = carry_out(*hung)
    found = {check.name: check.status for check in results.checks}
    assert all(found[name] == "hung" for name in hung)
    ratios = [end for name, end in ended.items() if name.startswith("paper-d128")]
    assert len(ratios) == 12 and min(ratios) < 110 and max(ratios) < 200 and seconds < 420
    right = {(row.case, row.implementation) for row in results.rows if row.status == "ok"}
    assert ("paper-d128-causal-4096", "tilewise portable") in right
    assert ("paper-d128-causal-4096", "tilewise hopper") not in right
    assert ("paper-d256-causal-4096", "tilewise hopper") in right
