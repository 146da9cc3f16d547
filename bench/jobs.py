"""What is there to do in a run? Pieces of work, each done in another process, and who makes lists of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from tilewise.tools.poison import poisoned_memory
from tilewise.tools.shrink import shrunk
from tilewise.tools.tune.plan import dim_of
from tilewise_reference.cases import Case

from . import checks, faults
from .ceilings import measure_ceilings
from .groups import Comparison, comparisons
from .implementations import for_group, select
from .measure import measure
from .results import Check, CheckStatus, Entry, Row, Status, Work

# Hopper's forward waits at barriers of its own, and no GPU has run it yet: gate.py says when it may.
PORTABLE, SUSPECT = "tilewise portable", "tilewise hopper"


@dataclass(frozen=True)
class Setting:
    """What every job of a run shares. folder: where its results go."""

    device: str
    seed: int
    folder: Path = Path()

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Job:
    """A piece of a stage: `function(*arguments)` gives the entries to write down and a remark, which says why
    it does not apply here; where it is `timed`, it is also told how many seconds to measure for.

    key: what a resumed run knows it by. implementations: those that it compares, all of which have a row once
    it is done. hopper: the rows of the tile table, by their width, with which it runs Hopper's forward.
    limit: seconds after which it counts as hung, where that is not what its stage says.
    """

    key: Hashable
    name: str
    function: Callable[..., tuple[list[Any], str]]
    arguments: tuple[Any, ...]
    timed: bool = False
    implementations: tuple[str, ...] = ()
    hopper: tuple[int, ...] = ()
    is_canary: bool = False
    limit: float | None = None
    fault: faults.Fault | None = None  # planted, to see what becomes of it

    @property
    def is_comparison(self) -> bool:
        """Whether it calls several implementations, the fourth of its arguments."""
        return self.function in (do_measure, compile_ahead)

    @property
    def lane(self) -> str:
        """Hopper's forward by itself shares no process with anything else."""
        return "hopper" if self.hopper and not self.is_comparison else ""

    def call(self, *more: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a process is handed, with further arguments."""
        if self.fault is None:
            return self.function, (*self.arguments, *more)
        return faults.perform, (self.fault, self.function, *self.arguments, *more)


Jobs = Callable[[Setting], list[Job]]
Order = Callable[[Comparison], Any]

# ---- Ceilings


def ceiling_jobs(setting: Setting) -> list[Job]:
    return [Job("ceilings", "copy and matmul", do_ceilings, (setting.device,), timed=True)]


def do_ceilings(device: str, seconds: float) -> tuple[list[Entry], str]:
    return [measure_ceilings(torch.device(device), seconds)], ""


# ---- The canary: does each kernel work at all? Before anything is built upon it.

CANARY = (  # what compiles longest comes first
    (PORTABLE, "backward"),
    (SUSPECT, "forward"),
    (PORTABLE, "forward"),
)  # fmt: skip
CANARY_DIMS = (128, 64, 256)
PATIENCE = 25.0  # seconds for a canary of Hopper's: compiling takes 5 to 8 s on a core, more beside others


def canary_case(dim: int, causal: bool) -> Case:
    """4096 rows and grouped heads. What the judge of gradients makes of it is the same call to a compiler."""
    return Case(
        name=f"canary-d{dim}-{'causal' if causal else 'full'}", batch=2, q_heads=8, kv_heads=2, q_len=4096,
        kv_len=4096, head_dim=dim, value_dim=dim, dtype="bfloat16", phase="training",
        provenance="the papers' grid with grouped heads",
        features={"causal": "bottom_right"} if causal else {},
    )  # fmt: skip


def canary_jobs(setting: Setting) -> list[Job]:
    """Every kernel at every width, full and causal, each held against float64 in a process of its own."""
    jobs = []
    for (name, work), dim, causal in itertools.product(CANARY, CANARY_DIMS, (False, True)):
        case = canary_case(dim, causal)
        mask = "causal" if causal else "full"
        title = f"canary: {name.removeprefix('tilewise ')} {work}, width {dim}, {mask}"
        jobs.append(
            Job(
                ("check", title), title, do_canary,
                (title, case if setting.on_gpu else tiny(case), work, name, setting.device, setting.seed),
                hopper=(dim,) if name == SUSPECT else (), is_canary=True,
                limit=PATIENCE if name == SUSPECT else None,
            )
        )  # fmt: skip
    return jobs


def tiny(case: Case) -> Case:
    """Two tiles of keys at the least, for the interpreter."""
    return shrunk(case, batch=1, kv_heads=1, group=2, length=40, suffix="-tiny")


OF_ROW: dict[Status, CheckStatus] = {
    "ok": "right",
    "wrong": "wrong",
    "failed": "failed",
    "unsupported": "not applicable",
    "unavailable": "not applicable",
    "left out": "left out",
}


def do_canary(
    title: str, case: Case, work: Work, name: str, device: str, seed: int
) -> tuple[list[Check], str]:
    where = torch.device(device)
    with poisoned_memory():
        (row,) = measure(
            case, work, select([name]), group="canary", seconds=0, device=where, seed=seed, rounds=1, least=1
        )
    detail = row.reason
    if row.status == "ok" and row.error is not None and row.allowed_error is not None:
        detail = f"{row.error:.2g} from float64 where {row.allowed_error:.2g} is allowed"
    return [Check(title, OF_ROW[row.status], sum(row.seconds), detail)], ""


# ---- Checks


def check_jobs(stage: str) -> Jobs:
    """The checks of a stage."""

    def jobs(setting: Setting) -> list[Job]:
        return [
            Job(
                ("check", name), name, checks.perform, (name, setting.device, setting.seed),
                hopper=(checks.TRIALS[name].width,) if checks.TRIALS[name].width else (),
            )
            for name in checks.trials(torch.device(setting.device), stage)
        ]  # fmt: skip

    return jobs


# ---- Comparisons


def measure_jobs(
    *groups: str,
    order: Order | None = None,
    names: Iterable[str] | None = None,
    only: Callable[[Case], bool] = lambda case: True,
) -> Jobs:
    """The comparisons of these groups in turns, so that a cut leaves some of each; a group in its own order
    or by `order`. names: whom to compare; everybody by default. only: which cases."""
    wanted = None if names is None else {*names}

    def jobs(setting: Setting) -> list[Job]:
        by_group = []
        for group in groups:
            pairs = [pair for pair in comparisons(group, tiny=not setting.on_gpu) if only(pair[0])]
            names = tuple(each.name for each in for_group(group) if wanted is None or each.name in wanted)
            pairs = sorted(pairs, key=order) if order else pairs
            by_group.append([measure_job(setting, group, case, work, names) for case, work in pairs])
        return in_turns(by_group)

    return jobs


def measure_job(setting: Setting, group: str, case: Case, work: Work, names: tuple[str, ...]) -> Job:
    return Job(
        (group, case.name, work), f"{case.name}, {work}", do_measure,
        (group, case, work, names, setting.device, setting.seed), timed=True, implementations=names,
        hopper=(dim_of(case, "hopper", "sm_90"),) if SUSPECT in names else (),
    )  # fmt: skip


def do_measure(
    group: str, case: Case, work: Work, names: tuple[str, ...], device: str, seed: int, seconds: float
) -> tuple[list[Row], str]:
    rows = measure(
        case, work, select(names), group=group, seconds=seconds, device=torch.device(device), seed=seed
    )
    return rows, ""


def compile_jobs(jobs: Jobs) -> Jobs:
    """These comparisons, to be compiled beside one another before they are timed one by one. The interpreter
    compiles nothing."""

    def ahead(setting: Setting) -> list[Job]:
        if not setting.on_gpu:
            return []
        return [
            replace(
                job, key=("compiled", job.key), name=f"compile {job.name}", function=compile_ahead,
                timed=False, implementations=(),
            )
            for job in jobs(setting)
        ]  # fmt: skip

    return ahead


COMPILED = (PORTABLE, SUSPECT, "flex")  # the implementations compiled for each case


def compile_ahead(
    group: str, case: Case, work: Work, names: tuple[str, ...], device: str, seed: int
) -> tuple[list[Row], str]:
    """Fill the compilers' caches on the disk; what goes wrong here shows when the case is measured."""
    compiled = select([name for name in names if name in COMPILED])
    with torch._inductor.config.patch(compile_threads=1):  # the other cores compile other cases
        measure(case, work, compiled, group=group, seconds=0, device=device, seed=seed, rounds=1, least=1)
    return [], ""


def one_after_the_other(*lists: Jobs) -> Jobs:
    return lambda setting: [job for jobs in lists for job in jobs(setting)]


def one_of_each(*lists: Jobs) -> Jobs:
    return lambda setting: in_turns(jobs(setting) for jobs in lists)


def in_turns(lists: Iterable[list[Job]]) -> list[Job]:
    """The first of each list, then the second of each, ..."""
    return [job for turn in itertools.zip_longest(*lists) for job in turn if job is not None]


HEAD_DIMS, LENGTHS = (128, 64, 256), (4096, 16384, 1024, 8192, 2048, 512)


def most_telling(comparison: Comparison) -> tuple[int, int, int]:
    """Sorts the papers' grid so that every beginning of it is a fair sample of the whole: head_dim 128 at 4k,
    full and causal, then what is next in either list."""
    case, _ = comparison
    dim = HEAD_DIMS.index(case.head_dim)
    length = LENGTHS.index(case.q_len) if case.q_len in LENGTHS else len(LENGTHS)  # a tiny one
    return dim + length, dim, length
