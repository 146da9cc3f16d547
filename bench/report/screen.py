"""How did a GPU run go? One screen: right, wrong, hung, not reached; ratios and goals; the largest gaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from ..results import Check, Results, Row, Stage
from .model import words
from .ranking import Contest, contests, counts, has_rate, is_tilewise, kernels_of
from .sections import Section, gather
from .summary import NO_SPEED, ceiling_line, gain_table, goal_table
from .table import Table
from .units import count, duration, one_line, times

GAPS = 3
OF_ROW = {"ok": "right", "wrong": "wrong", "failed": "failed", "left out": "left out"}
COLUMNS = ("right", "wrong", "failed", "hung", "crashed", "left out", "not applicable", "not reached")
LISTED = 15  # lines about what is bad


@dataclass(frozen=True)
class Reached:
    """What became of a stage's jobs: how many checks and rows of tilewise's of each kind, and the names of
    jobs of which there is nothing."""

    stage: str
    counts: dict[str, int]
    missing: tuple[str, ...]


def reached(results: Results) -> list[Reached]:
    """Each stage, as its jobs were planned."""
    checks: dict[str, list[Check]] = {}
    for check in results.checks:
        checks.setdefault(check.name, []).append(check)
    rows: dict[str, list[Row]] = {}
    for row in results.rows:
        rows.setdefault(f"{row.case}, {row.work}", []).append(row)
    taken = {name for stage in results.stages for job in stage.jobs for name in names_of(stage, job)}
    return [one_stage(stage, checks, rows, results, taken) for stage in results.stages]


def names_of(stage: Stage, job: str) -> tuple[str, ...]:
    """What checks of this job are called."""
    return job, f"{stage.name}: {job}", f"all of {job}"


def one_stage(
    stage: Stage,
    checks: dict[str, list[Check]],
    rows: dict[str, list[Row]],
    results: Results,
    taken: set[str],
) -> Reached:
    counted, missing = dict.fromkeys(COLUMNS, 0), []
    for job in stage.jobs:
        mine = [check for name in names_of(stage, job) for check in checks.get(name, [])]
        timed = [row for row in rows.get(job, []) if is_tilewise(row.implementation)]
        for check in mine:
            counted[check.status] += 1
        for row in timed:
            counted[OF_ROW.get(row.status, "not applicable")] += 1
        if job.endswith(".py"):  # its tests are checks by themselves
            for check in results.checks:
                if check.name not in taken and check.name.startswith(tuple(job.split())):
                    counted[check.status] += 1
        is_ceiling = job == "copy and matmul" and results.ceilings is not None
        if not (mine or timed or is_ceiling or job.startswith("compile ")):
            missing.append(job)
    counted["not reached"] = len(missing)
    return Reached(stage.name, counted, tuple(missing))


def stage_table(results: Results) -> Table:
    found = reached(results)
    used = [name for name in COLUMNS if name == "right" or any(each.counts[name] for each in found)]
    lines = [(each.stage, *(str(each.counts[name] or "") for name in used)) for each in found]
    return Table("Checks, and rows of tilewise's", ("stage", *used), tuple(lines))


def bad_lines(section: Section) -> list[str]:
    """What was wrong, failed, hung or crashed, the first of it in a line each."""
    lines = [f"{c.status.upper()} {c.name}: {one_line(c.detail, 200)}" for c in section.checks if c.is_bad]
    for row in section.rows:
        if is_tilewise(row.implementation) and row.status in ("wrong", "failed"):
            where = f"{row.implementation}, {row.case}, {row.work}"
            lines.append(f"{row.status.upper()} {where}: {one_line(row.reason, 200)}")
    reasons = dict.fromkeys(c.detail for c in section.checks if c.status == "left out")
    reasons |= dict.fromkeys(row.reason for row in section.rows if row.status == "left out")
    more = [f"and {count(len(lines) - LISTED, 'more')}"] if len(lines) > LISTED else []
    return [*lines[:LISTED], *more, *(f"left out: {reason}" for reason in reasons)]


def ratio_lines(section: Section) -> Table:
    """Each case of the papers' grid: the time of each of tilewise's kernels and its ratio to the fastest
    rival."""
    ours = kernels_of(section.rows)
    lines = []
    for contest in timed_contests(section.rows):
        cells = []
        for name in ours:
            row = contest.fastest((name,))
            ratio = None if row is None else contest.ratio(row)
            cells.append("" if row is None or row.median is None else duration(row.median))
            cells.append("" if ratio is None else times(ratio))
        rival = contest.rival
        beside = (
            ""
            if rival is None or rival.median is None
            else f"{rival.implementation} {duration(rival.median)}"
        )
        lines.append((contest.case, contest.work, *cells, beside))
    columns = [column for name in ours for column in (name.removeprefix("tilewise "), "ratio")]
    return Table(
        "Times, and ratios to the fastest rival (above 1: tilewise is faster)",
        ("case", "work", *columns, "fastest rival"),
        tuple(lines),
    )


def timed_contests(rows: Iterable[Row]) -> list[Contest]:
    """Those of the papers' grid that have a time of tilewise's."""
    grid = [row for row in rows if row.case.startswith("paper-") and has_rate(row)]
    ours = set(kernels_of(grid))
    return [each for each in contests(grid) if each.fastest(ours) is not None]


def gap_lines(section: Section) -> list[str]:
    """The cases in which the faster of tilewise's kernels is furthest behind, and what the static model of
    the kernel says of each."""
    ours = set(kernels_of(section.rows))
    found: list[tuple[float, Contest, Row]] = []
    for contest in timed_contests(section.rows):
        row = contest.fastest(ours)
        ratio = None if row is None else contest.ratio(row)
        if row is not None and ratio is not None and counts(row):
            found.append((ratio, contest, row))
    found.sort(key=lambda each: each[0])
    return [
        f"{times(ratio)} {contest.case}, {contest.work}, {row.implementation}: {words(row)}"
        for ratio, contest, row in found[:GAPS]
    ]


def gpu_screen(results: Results, shortfall: list[str]) -> RenderableType:
    """The whole of it."""
    (section,) = gather([results])
    parts: list[RenderableType] = [Text(f"{section.name}: {section.made_with}", style="bold")]
    parts.append(stage_table(results).rich())
    parts += map(Text, bad_lines(section) or ["nothing was wrong"])
    if section.on_gpu:
        goals = goal_table(section)
        tables = [ratio_lines(section), gain_table(section), *([goals] if goals else [])]
        parts += [table.rich() for table in tables if table.lines]
        gaps = gap_lines(section)
        parts += [Text("The largest gaps, and the static model of the kernel:", style="bold")] if gaps else []
        parts += map(Text, gaps)
        parts.append(Text(ceiling_line(section)))
    else:
        parts.append(Text(NO_SPEED))
    return Group(*parts, *map(Text, shortfall))
