"""How does a run get through its stages in time, and go on where another one stopped?"""

from __future__ import annotations

import datetime
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .gate import Gate, culprit, salvage, without_suspect
from .jobs import SUSPECT, Job, Setting
from .machine import clocks_now, describe
from .progress import Progress
from .results import Check, Entry, Machine, Results, Stage, append
from .stages import Plan, broken, check_name, not_for
from .workers import Outcome, Task

SAME = ("gpu", "arch", "driver", "versions", "revision")  # of the machine, in all parts of one results file


class CannotBegin(Exception):
    """There is no machine to run on, or it is not that of the results that are there."""


class Hands(Protocol):
    """Who does the work: `bench.workers.Workers`."""

    def run(self, tasks: Iterator[Task], until: float, count: int = 1) -> Iterator[Outcome]: ...


@dataclass
class Deadline:
    """The end of the time, and how what is left is shared out."""

    seconds: float
    began: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        return max(0.0, self.began + self.seconds - self.clock())

    def share(self, weight: float, later: float) -> float:
        """The seconds of a stage of this weight, if stages that weigh `later` follow; what it leaves over is
        shared out among those."""
        return self.left * weight / (weight + later)


@dataclass
class Run:
    """One run, as far as it has come."""

    path: Path
    setting: Setting
    hands: Hands
    progress: Progress
    deadline: Deadline
    known: dict[Hashable, set[str]] = field(default_factory=dict)
    shortfall: list[str] = field(default_factory=list)  # what there was no time for
    after_stage: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.gate = Gate(self.setting)

    def begin(self, earlier: Results | None) -> None:
        """Write down the machine, or see that it is that of the results that are there.

        Raises:
            CannotBegin: it is not, or does not answer.
        """
        (outcome,) = self.hands.run(iter([Task("machine", describe, (), 60.0)]), self.deadline.clock() + 60.0)
        machine = outcome.value
        if not isinstance(machine, Machine):
            raise CannotBegin(f"the machine cannot be described: {outcome.error}")
        if earlier is None:
            append(self.path, machine)
        else:
            compare(earlier, machine, self.setting.seed)
            self.known = done_before(earlier)
            self.gate.see(earlier.checks)
            self.progress.note(f"going on after {len(earlier.checks)} checks and {len(earlier.rows)} rows")
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        self.progress.note(f"{machine.gpu or 'no GPU: kernels interpreted, all is tiny'}; {versions}")

    def stages(self, plans: list[Plan]) -> None:
        """All of them in order."""
        missing = not_for(self.setting) if any(plan.name.startswith("correctness") for plan in plans) else []
        if missing:
            self.progress.note(f"not applicable to this device: {'; '.join(missing)}")
        for number, plan in enumerate(plans):
            later = sum(plan.weight for plan in plans[number + 1 :])
            self.stage(plan, self.deadline.share(plan.weight, later))
            self.after_stage()

    def stage(self, plan: Plan, seconds: float) -> None:
        """One stage: hand out its jobs, in order, and write down what comes back."""
        try:
            jobs = deque(job for job in plan.jobs(self.setting) if not self.is_done(plan, job))
        except Exception as failure:
            self.add(Check(f"{plan.name}: its jobs", "failed", 0.0, repr(failure)))
            return
        planned, done, until = len(jobs), 0, self.deadline.clock() + seconds
        if not jobs:
            return
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        names = [job.name for job in jobs]
        append(self.path, Stage(plan.name, names, seconds, self.setting.seed, date, clocks_now()))
        self.progress.stage(plan.name, planned, seconds)
        given: dict[int, Job] = {}
        beside = plan.processes(self.setting)
        took: list[float] = []
        left_out = 0

        def tasks() -> Iterator[Task]:
            nonlocal left_out
            while jobs:
                left = max(0.0, until - self.deadline.clock())
                if took and left < statistics.median(took) / 2:
                    return  # it would take more from the stages that follow than it has itself
                rounds = -(-len(jobs) // beside)
                measuring = min(plan.most, left / rounds * plan.measuring)
                job = self.allowed(plan, jobs.popleft())
                if job is None:
                    left_out += 1
                    continue
                task = Task(job.name, *job.call(*[measuring] * job.timed), job.limit or plan.limit, job.lane)
                given[id(task)] = job
                yield task

        for outcome in self.hands.run(tasks(), until, beside):
            job = given[id(outcome.task)]
            took.append(outcome.seconds)
            again = self.take(plan, job, outcome)
            if again is not None:
                jobs.appendleft(again)
            elif not outcome.cut:
                done += 1
            self.progress.show(plan.name, done, planned)
        if done + left_out < planned:
            self.shortfall.append(f"{plan.name}: there was time for {done} of {planned - left_out}")

    def take(self, plan: Plan, job: Job, outcome: Outcome) -> Job | None:
        """Write down what became of the job; what to do again, if anything."""
        if outcome.cut:
            self.progress.note(f"{job.name}: {outcome.error}")
            if outcome.seconds > outcome.task.seconds / 2:  # it may have hung as well
                self.gate.blame(job)
            return None
        entries, remark = outcome.value or ([], "")
        again = None
        if outcome.broken and (not entries or culprit(entries) == SUSPECT):
            self.gate.blame(job)
        if outcome.broken and job.implementations:
            entries, again = salvage(job, entries)
        self.gate.see(entries)
        self.add(*entries)
        if outcome.error:
            self.add(broken(plan, job, outcome))
        if remark:
            self.add(Check(check_name(plan, job), "not applicable", outcome.seconds, remark))
        return again

    def allowed(self, plan: Plan, job: Job) -> Job | None:
        """The job as it may run: a comparison without Hopper's forward where that is left out; None where
        nothing is left."""
        reason = self.gate.against(job)
        if not reason:
            return job
        if not job.is_comparison:
            self.add(Check(check_name(plan, job), "left out", 0.0, reason))
            return None
        job, rows = without_suspect(job, reason)
        self.add(*rows)
        return job

    def add(self, *entries: Entry) -> None:
        append(self.path, *entries)
        self.progress.results(entries)

    def is_done(self, plan: Plan, job: Job) -> bool:
        """Whether the results that are there have this job's, or say that it could not be done."""
        if ("check", check_name(plan, job)) in self.known:
            return True
        return job.key in self.known and self.known[job.key] >= set(job.implementations)


def done_before(earlier: Results) -> dict[Hashable, set[str]]:
    """What need not be done again: by the key of its job, the implementations that have a row."""
    found: dict[Hashable, set[str]] = {("check", check.name): set() for check in earlier.checks}
    if earlier.ceilings is not None:
        found["ceilings"] = set()
    for row in earlier.rows:
        found.setdefault(row.key, set()).add(row.implementation)
    return found


def compare(earlier: Results, machine: Machine, seed: int) -> None:
    """Raise CannotBegin where the results that are there were made on another machine, with other versions or
    with another seed: one file speaks of one of each."""
    before, now = ({name: getattr(m, name) for name in SAME} for m in (earlier.machine, machine))
    seeds = {stage.seed for stage in earlier.stages} or {seed}
    differ = [
        f"{name} was {before[name]!r} and is {now[name]!r}" for name in SAME if before[name] != now[name]
    ]
    differ += [f"seed was {other} and is {seed}" for other in sorted(seeds - {seed})]
    if differ:
        raise CannotBegin(
            f"the results there cannot be gone on with: {'; '.join(differ)}; choose another --out"
        )
