"""When may Hopper's forward run? Once its canary has passed at that width, until something breaks with it.

No GPU has run it yet, and it waits at barriers of its own: a mistake can hang where the portable kernel would
be wrong. So nothing else of it is tried at a width before a small call has come back right in a process of
its own; and where a process hung or ended and nobody knows by what, it is the first to be left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import TypeGuard

from .implementations import select
from .jobs import SUSPECT, Job, Setting, canary_jobs, measure_job
from .measure import blank
from .report.ranking import is_tilewise
from .results import Check, Entry, Row


class Gate:
    """What is known of Hopper's forward, by the widths of its tiles."""

    def __init__(self, setting: Setting) -> None:
        self.awaited: dict[int, set[str]] = {}  # canaries that have not passed yet
        self.shut: dict[int, tuple[Hashable, str]] = {}  # at which job, its key and name
        for job in canary_jobs(setting):
            for width in job.hopper:
                self.awaited.setdefault(width, set()).add(job.name)

    def see(self, entries: Iterable[Entry]) -> None:
        """Take note of canaries. One that does not apply stops nobody: Hopper's forward says so by itself."""
        passed = {e.name for e in entries if isinstance(e, Check) and e.status in ("right", "not applicable")}
        for names in self.awaited.values():
            names -= passed

    def against(self, job: Job) -> str:
        """Why the job must not run as it is; empty where it may."""
        if job.is_canary:
            return ""
        for width in job.hopper:
            if self.awaited.get(width):
                return f"the canary of Hopper's forward has not passed at width {width}"
            if width in self.shut:
                return f"a process hung or ended with it aboard, at {self.shut[width][1]}"
        return ""

    def blame(self, job: Job) -> None:
        """A process hung or ended at this job, and nobody knows by what. Where it ran Hopper's forward, that
        is left out from now on; where it did not, and was the same job made again, it was not to blame."""
        for width in job.hopper:
            self.shut.setdefault(width, (job.key, job.name))
        if not job.hopper:
            self.shut = {width: at for width, at in self.shut.items() if at[0] != job.key}


def without_suspect(job: Job, reason: str) -> tuple[Job, list[Row]]:
    """The comparison without Hopper's forward, and the row that says why where it was to have one."""
    group, case, work, names, *where = job.arguments
    left = tuple(name for name in names if name != SUSPECT)
    kept = tuple(name for name in job.implementations if name != SUSPECT)
    (suspect,) = select([SUSPECT])
    row = blank(case, work, group, suspect)
    row.status, row.reason = "left out", reason
    changed = replace(
        job, arguments=(group, case, work, left, *where), implementations=kept, hopper=(), fault=None
    )
    return changed, [row] if SUSPECT in job.implementations else []


def salvage(job: Job, entries: list[Entry]) -> tuple[list[Entry], Job | None]:
    """What to keep of what came from a process that lost its GPU or ended, and what to do again in a new one:
    the comparison without the implementation that broke it, as those after that could not but fail; or, where
    nothing came, so that nobody knows which one it was, without the one that is suspected, then tilewise
    alone."""
    guilty = culprit(entries)
    if guilty is not None:
        entries = [row for row in entries if isinstance(row, Row) and row.implementation == guilty]
        names = tuple(name for name in job.implementations if name != guilty)
    elif entries:
        return entries, None
    elif SUSPECT in job.implementations:
        again, rows = without_suspect(job, f"a process hung or ended with it aboard, at {job.name}")
        return [*rows], again
    else:
        names = tuple(filter(is_tilewise, job.implementations))
    if names in ((), job.implementations):
        return entries, None
    group, case, work, _, device, seed = job.arguments
    return entries, measure_job(Setting(device, seed), group, case, work, names)


def culprit(entries: Iterable[Entry]) -> str | None:
    """The implementation after whose call the process had no GPU any more."""
    return next((entry.implementation for entry in entries if broke_the_gpu(entry)), None)


def broke_the_gpu(entry: Entry) -> TypeGuard[Row]:
    """Whether it is the row of such a call. Too little memory is not."""
    if not isinstance(entry, Row) or entry.status != "failed":
        return False
    return "CUDA" in entry.reason and not entry.reason.startswith("out of memory")
