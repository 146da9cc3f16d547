"""How does an evidence run get through its stages in time, and go on where another one stopped?"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .machine import clocks_now, describe
from .progress import Progress
from .results import Check, Entry, Machine, Results, Stage, append
from .stages import Job, Plan, Setting, broken, not_for, runs_suspect, salvage, without_suspect
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
    """One evidence run, as far as it has come."""

    path: Path
    setting: Setting
    hands: Hands
    progress: Progress
    deadline: Deadline
    known: dict[Hashable, set[str]] = field(default_factory=dict)
    shortfall: list[str] = field(default_factory=list)  # what there was no time for
    suspected: Hashable = None  # the job at which the suspect broke a process, as far as anybody knows

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

    def stage(self, plan: Plan, seconds: float) -> None:
        """One stage: hand out its jobs, in order, and write down what comes back."""
        try:
            jobs = deque(job for job in plan.jobs(self.setting) if not self.is_done(plan, job))
        except Exception as failure:
            self.add(Check(f"{plan.name}: its jobs", False, 0.0, repr(failure)))
            return
        planned, done, until = len(jobs), 0, self.deadline.clock() + seconds
        if not jobs:
            return
        clocks = self.clocks() if self.setting.on_gpu and seconds > 0 else {}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        append(self.path, Stage(plan.name, planned, seconds, self.setting.seed, date, clocks))
        self.progress.stage(plan.name, planned, seconds)
        given: dict[int, Job] = {}
        took: list[float] = []

        def tasks() -> Iterator[Task]:
            while jobs:
                left = max(0.0, until - self.deadline.clock())
                if took and left < statistics.median(took) / 2:
                    return  # it would take more from the stages that follow than it has itself
                measuring = left / len(jobs) / 2  # the other half goes into compiling and checking
                job = self.allowed(jobs.popleft())
                arguments = (*job.arguments, min(plan.most, measuring)) if job.timed else job.arguments
                task = Task(job.name, job.function, arguments, plan.limit)
                given[id(task)] = job
                yield task

        for outcome in self.hands.run(tasks(), until, plan.processes(self.setting)):
            job = given[id(outcome.task)]
            took.append(outcome.seconds)
            again = self.take(plan, job, outcome)
            if again is not None:
                jobs.appendleft(again)
            elif not outcome.cut:
                done += 1
            self.progress.show(plan.name, done, planned)
        if done < planned:
            self.shortfall.append(f"{plan.name}: there was time for {done} of {planned}")

    def take(self, plan: Plan, job: Job, outcome: Outcome) -> Job | None:
        """Write down what became of the job; what to do again, if anything."""
        if outcome.cut:
            self.progress.note(f"{job.name}: {outcome.error}")
            return None
        entries, remark = outcome.value or ([], "")
        again = None
        if outcome.broken and not entries:
            self.suspect(job)
        if outcome.broken and job.implementations:
            entries, again = salvage(job, entries)
        self.add(*entries)
        if outcome.error:
            self.add(broken(plan, job, outcome.seconds, outcome.error))
        if remark:
            self.progress.note(f"not applicable: {job.name}: {remark}")
        return again

    def suspect(self, job: Job) -> None:
        """A process hung or ended at this job, and nobody knows by what. Where it ran the suspect, that is
        left out from now on; where it did not, and was the same job made again, it was not the suspect."""
        if runs_suspect(job):
            self.suspected = self.suspected or job.key
        elif self.suspected == job.key:
            self.suspected = None

    def allowed(self, job: Job) -> Job:
        """The job, its comparison without the suspect where that is left out."""
        if self.suspected is None or not runs_suspect(job) or not job.is_comparison:
            return job
        job, rows = without_suspect(job)
        self.add(*rows)
        return job

    def add(self, *entries: Entry) -> None:
        append(self.path, *entries)
        self.progress.results(entries)

    def clocks(self) -> dict[str, float]:
        """How the GPU stands, asked for in another process: this one stays clear of it."""
        until = self.deadline.clock() + 20.0
        outcomes = list(self.hands.run(iter([Task("clocks", clocks_now, (), 20.0)]), until))
        return (outcomes[0].value or {}) if outcomes else {}

    def is_done(self, plan: Plan, job: Job) -> bool:
        """Whether the results that are there have this job's, or say that it could not be done."""
        if ("check", broken(plan, job, math.nan, "").name) in self.known:
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
