"""What does an evidence run do, in which order, and how much of its time goes where?"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
import torch._inductor.config

from tilewise_reference.cases import Case

from . import checks
from .ceilings import measure_ceilings
from .groups import Comparison, comparisons
from .implementations import for_group, select
from .measure import blank, measure
from .report.ranking import is_tilewise
from .results import Check, Entry, Row, Work

MOST_PROCESSES = 10  # of checks beside one another: the GPU's memory is shared by all


@dataclass(frozen=True)
class Setting:
    """What every job of a run shares."""

    device: str
    seed: int

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Job:
    """A piece of a stage, done in another process: `function(*arguments)` gives the entries to write down and
    a remark; where it is `timed`, it is also told how many seconds to measure for. key: what a resumed run
    knows it by. implementations: those that it compares, all of which have a row once it is done."""

    key: Hashable
    name: str
    function: Callable[..., tuple[list[Any], str]]
    arguments: tuple[Any, ...]
    timed: bool = False
    implementations: tuple[str, ...] = ()

    @property
    def is_comparison(self) -> bool:
        """Whether it calls several implementations, the fourth of its arguments."""
        return self.function in (do_measure, compile_ahead)


@dataclass(frozen=True)
class Plan:
    """A stage. weight: of its time beside that of the stages that follow. most: seconds of measuring that one
    job gets. limit: seconds after which a job counts as hung: compiling is most of them. parallel: jobs may
    run beside one another."""

    name: str
    weight: float
    jobs: Callable[[Setting], list[Job]]
    most: float = 0.0
    limit: float = 150.0
    parallel: bool = False

    def processes(self, setting: Setting) -> int:
        """How many processes work on it: most of a check's time on a GPU is compiling, on one core."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(MOST_PROCESSES, max(1, cores - 2)) if self.parallel and setting.on_gpu else 1


# ---- Jobs


def ceiling_jobs(setting: Setting) -> list[Job]:
    return [Job("ceilings", "copy and matmul", do_ceilings, (setting.device,), timed=True)]


def do_ceilings(device: str, seconds: float) -> tuple[list[Entry], str]:
    return [measure_ceilings(torch.device(device), seconds)], ""


def check_jobs(stage: str) -> Callable[[Setting], list[Job]]:
    """The checks of a stage."""

    def jobs(setting: Setting) -> list[Job]:
        return [
            Job(("check", name), name, checks.perform, (name, setting.device, setting.seed))
            for name in checks.trials(torch.device(setting.device), stage)
        ]

    return jobs


def measure_jobs(
    *groups: str, order: Callable[[Comparison], Any] | None = None
) -> Callable[[Setting], list[Job]]:
    """The comparisons of these groups in turns, so that a cut leaves some of each; a group in its own order
    or by `order`."""

    def jobs(setting: Setting) -> list[Job]:
        by_group = []
        for group in groups:
            pairs = comparisons(group, tiny=not setting.on_gpu)
            names = tuple(each.name for each in for_group(group))
            pairs = sorted(pairs, key=order) if order else pairs
            by_group.append([measure_job(setting, group, case, work, names) for case, work in pairs])
        return in_turns(by_group)

    return jobs


def measure_job(setting: Setting, group: str, case: Case, work: Work, names: tuple[str, ...]) -> Job:
    arguments = (group, case, work, names, setting.device, setting.seed)
    key = (group, case.name, work)
    return Job(key, f"{case.name}, {work}", do_measure, arguments, timed=True, implementations=names)


def do_measure(
    group: str, case: Case, work: Work, names: tuple[str, ...], device: str, seed: int, seconds: float
) -> tuple[list[Row], str]:
    rows = measure(
        case, work, select(names), group=group, seconds=seconds, device=torch.device(device), seed=seed
    )
    return rows, ""


def compile_jobs(
    *groups: str, order: Callable[[Comparison], Any] | None = None
) -> Callable[[Setting], list[Job]]:
    """The comparisons of these groups, to be compiled beside one another before they are timed one by one.
    The interpreter compiles nothing."""

    def jobs(setting: Setting) -> list[Job]:
        if not setting.on_gpu:
            return []
        return [
            replace(job, key=("compiled", job.key), function=compile_ahead, timed=False, implementations=())
            for job in measure_jobs(*groups, order=order)(setting)
        ]

    return jobs


def compile_ahead(
    group: str, case: Case, work: Work, names: tuple[str, ...], device: str, seed: int
) -> tuple[list[Row], str]:
    """Fill the compilers' caches on the disk; what goes wrong here shows when the case is measured."""
    compiled = select([name for name in names if name in COMPILED])
    with torch._inductor.config.patch(compile_threads=1):  # the other cores compile other cases
        measure(case, work, compiled, group=group, seconds=0, device=device, seed=seed, rounds=1, least=1)
    return [], ""


def in_turns(lists: Iterable[list[Job]]) -> list[Job]:
    """The first of each list, then the second of each, ..."""
    return [job for turn in itertools.zip_longest(*lists) for job in turn if job is not None]


COMPILED = ("tilewise portable", "tilewise hopper", "flex")  # the implementations compiled for each case
HEAD_DIMS, LENGTHS = (128, 64, 256), (4096, 16384, 1024, 8192, 2048, 512)


def most_telling(comparison: Comparison) -> tuple[int, int, int]:
    """Sorts the papers' grid so that every beginning of it is a fair sample of the whole: head_dim 128 at 4k,
    full and causal, then what is next in either list."""
    case, _ = comparison
    dim = HEAD_DIMS.index(case.head_dim)
    length = LENGTHS.index(case.q_len) if case.q_len in LENGTHS else len(LENGTHS)  # a tiny one
    return dim + length, dim, length


# ---- After a process broke


# Hopper's forward waits at barriers of its own, and no GPU has run it yet: where nobody knows what a process
# hung or ended at, it is the first to be left out.
SUSPECT = "tilewise hopper"


def runs_suspect(job: Job) -> bool:
    """Whether it is a check of Hopper's forward, or calls it among others."""
    if job.function is checks.perform:
        return job.name in checks.trials(torch.device(job.arguments[1]), "hopper")
    return job.is_comparison and SUSPECT in job.arguments[3]


def without_suspect(job: Job) -> tuple[Job, list[Row]]:
    """The comparison without Hopper's forward, and the row that says so where it was to have one."""
    group, case, work, names, *where = job.arguments
    left = tuple(name for name in names if name != SUSPECT)
    kept = tuple(name for name in job.implementations if name != SUSPECT)
    (suspect,) = select([SUSPECT])
    row = blank(case, work, group, suspect)
    row.status, row.reason = "failed", "left out: a process of this run hung or ended with it aboard"
    changed = replace(job, arguments=(group, case, work, left, *where), implementations=kept)
    return changed, [row] if SUSPECT in job.implementations else []


def salvage(job: Job, entries: list[Entry]) -> tuple[list[Entry], Job | None]:
    """What to keep of what came from a process that lost its GPU or ended, and what to do again in a new one:
    the comparison without the implementation that broke it, as those after that could not but fail; or, where
    nothing came, so that nobody knows which one it was, without the one that is suspected, then tilewise
    alone."""
    culprit = next((entry.implementation for entry in entries if broke_the_gpu(entry)), None)
    if culprit is not None:
        entries = [row for row in entries if isinstance(row, Row) and row.implementation == culprit]
        names = tuple(name for name in job.implementations if name != culprit)
    elif entries:
        return entries, None
    elif SUSPECT in job.implementations:
        again, rows = without_suspect(job)
        return [*rows], again
    else:
        names = tuple(filter(is_tilewise, job.implementations))
    if names in ((), job.implementations):
        return entries, None
    group, case, work, _, device, seed = job.arguments
    return entries, measure_job(Setting(device, seed), group, case, work, names)


def broke_the_gpu(entry: Entry) -> TypeGuard[Row]:
    """Whether it is the row of a call after which a process has no GPU any more. Too little memory is not."""
    if not isinstance(entry, Row) or entry.status != "failed":
        return False
    return "CUDA" in entry.reason and not entry.reason.startswith("out of memory")


# ---- The stages

STAGES: tuple[Plan, ...] = (
    Plan("ceilings", 3, ceiling_jobs, most=10),
    Plan("hopper", 12, check_jobs("hopper"), limit=75, parallel=True),
    Plan("correctness", 20, check_jobs("correctness"), parallel=True),
    Plan("correctness at size", 7, check_jobs("correctness at size")),
    Plan("compilation", 15, compile_jobs("forward grid", "backward grid", order=most_telling), parallel=True),
    Plan("forward grid", 19, measure_jobs("forward grid", order=most_telling), most=2.5),
    Plan("backward grid", 17, measure_jobs("backward grid", order=most_telling), most=2.5),
    Plan(
        "models and features",
        18,
        measure_jobs(
            "features forward", "features backward", "models forward", "models backward", "short forward"
        ),
        most=2,
    ),
    Plan("overheads", 5, measure_jobs("host", "cold start"), most=2),
)


def not_for(setting: Setting) -> list[str]:
    """The checks that this device cannot run."""
    return checks.left_out(torch.device(setting.device))


def broken(plan: Plan, job: Job, seconds: float, error: str) -> Check:
    """The record of a job that gave no result."""
    name = job.name if isinstance(job.key, tuple) and job.key[0] == "check" else f"{plan.name}: {job.name}"
    return Check(name, False, seconds, error)
