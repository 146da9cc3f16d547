"""Runs without processes and without waiting: what the tests of runs share."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from bench import workers
from bench.jobs import Job, Setting
from bench.machine import describe
from bench.progress import Progress
from bench.results import Check, Machine, Row
from bench.run import Deadline, Run
from bench.workers import Outcome, Task

MACHINE = Machine(None, None, None, {"torch": "2.13.0"}, "abc", "2026-11-24T00:00:00+00:00")
SETTING = Setting("cuda" if torch.cuda.is_available() else "cpu", 7)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Hands:
    """Does the tasks in this process, and calls a task that raises what Workers calls it."""

    def __init__(self, clock=time.monotonic, broken: tuple[str, ...] = ()) -> None:
        self.clock, self.broken, self.asked = clock, broken, []

    def run(self, tasks: Iterator[Task], until: float, count: int = 1) -> Iterator[Outcome]:
        while self.clock() < until:
            task = next(tasks, None)
            if task is None:
                return
            self.asked.append(task)
            if task.name in self.broken:
                first = self.broken.index(task.name)
                self.broken = self.broken[:first] + self.broken[first + 1 :]
                yield Outcome(task, 1.0, error="its process ended with exit code 3", broken=True)
                continue
            try:
                value = MACHINE if task.function is describe else task.function(*task.arguments)
            except Exception as raised:
                yield Outcome(task, 1.0, error=workers.last_lines(raised))
            else:
                yield Outcome(task, 1.0, value)

    stuck = 0

    def hire(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def row(case: str, implementation: str = "tilewise portable", status: str = "ok", **also) -> Row:
    return Row("g", case, "forward", implementation, status, seconds=[1e-3] * (status == "ok"), **also)


def passing(name: str) -> Job:
    return Job(("check", name), name, lambda: ([Check(name, "right", 0.1)], ""), ())


def make_run(path: Path, hands: Hands, seconds: float = 60.0) -> Run:
    console = Console(file=io.StringIO(), width=200)
    deadline = Deadline(seconds, hands.clock(), hands.clock)
    return Run(path, SETTING, hands, Progress(console, time.monotonic(), seconds, SETTING.on_gpu), deadline)


def printed(run: Run) -> str:
    return run.progress.console.file.getvalue()
