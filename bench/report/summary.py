"""How does tilewise stand, in one screen? Its ratios by group, the goals, and what was wrong or failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ..results import Row
from .goals import GOALS, concerns, outcome
from .ranking import (
    FASTER,
    Contest,
    contests,
    counts,
    geometric_mean,
    is_contender,
    kernels_of,
    over_portable,
)
from .sections import Section
from .table import Table, reasons
from .units import count, digits, one_line, times

NO_SPEED = (
    "Made without a GPU: the kernels ran in Triton's interpreter, on tiny cases. The times say nothing about "
    "speed; the errors say whether the answers are right."
)
LISTED = 12  # reasons why rows are wrong or failed


@dataclass(frozen=True)
class Standing:
    """One implementation of tilewise in one group and work, against the fastest rival of each case."""

    group: str
    work: str
    implementation: str
    ratios: dict[str, float]  # by case, where tilewise and a rival are right and timed
    alone: tuple[str, ...]  # cases in which tilewise is right and no rival is
    missing: tuple[str, ...]  # cases in which tilewise has no right answer that was timed

    @property
    def mean(self) -> float | None:
        return geometric_mean(self.ratios.values()) if self.ratios else None


def standings(rows: Iterable[Row]) -> list[Standing]:
    """A standing for every group, work and contender of tilewise's that was asked there; where several of its
    kernels have answers, one for the faster of them in each case."""
    found: dict[tuple[str, str], list[Contest]] = {}
    for contest in contests(rows):
        found.setdefault((contest.rows[0].group, contest.work), []).append(contest)
    lines = []
    for (group, work), same in found.items():
        of_group = [row for contest in same for row in contest.rows]
        ours = {r.implementation: {r.implementation} for r in of_group if is_contender(r.implementation)}
        answering = kernels_of(filter(counts, of_group))
        if len(answering) > 1:
            ours[FASTER] = {*answering}
        for implementation, names in ours.items():
            ratios, alone, missing = {}, [], []
            for contest in same:
                row = contest.fastest(names)
                if row is None:
                    missing.append(contest.case)
                elif (ratio := contest.ratio(row)) is None:
                    alone.append(contest.case)
                else:
                    ratios[contest.case] = ratio
            lines.append(Standing(group, work, implementation, ratios, tuple(alone), tuple(missing)))
    return lines


def ratio_table(section: Section) -> Table:
    """The geometric mean of the ratio to the fastest rival, by group and implementation of tilewise."""
    lines = []
    for standing in standings(section.rows):
        ratios = standing.ratios
        best = max(ratios, key=ratios.__getitem__, default=None)
        worst = min(ratios, key=ratios.__getitem__, default=None)
        lines.append(
            (
                standing.group if standing.work in standing.group else f"{standing.group}, {standing.work}",
                standing.implementation,
                "" if standing.mean is None else times(standing.mean),
                str(len(ratios)),
                "" if worst is None else f"{times(ratios[worst])} {worst}",
                "" if best is None else f"{times(ratios[best])} {best}",
                str(len(standing.alone) or ""),
                str(len(standing.missing) or ""),
            )
        )
    return Table(
        "Ratio to the fastest rival, geometric mean (above 1: tilewise is faster)",
        ("group", "implementation", "ratio", "cases", "lowest", "highest", "no rival could", "no answer"),
        tuple(lines),
    )


def gain_table(section: Section) -> Table:
    """What Hopper's forward gains over the portable one, by group; the backward is the same for both."""
    found: dict[str, dict[str, float]] = {}
    for contest in contests(section.rows):
        gain = over_portable(contest)
        if gain is not None and contest.work != "backward":
            group = contest.rows[0].group
            name = group if contest.work in group else f"{group}, {contest.work}"
            found.setdefault(name, {})[contest.case] = gain
    lines = []
    for name, gains in found.items():
        worst, best = (choose(gains, key=gains.__getitem__) for choose in (min, max))
        ends = (f"{times(gains[case])} {case}" for case in (worst, best))
        lines.append((name, times(geometric_mean(gains.values())), str(len(gains)), *ends))
    return Table(
        "Hopper's forward over the portable one, geometric mean (above 1: Hopper's is faster)",
        ("group", "ratio", "cases", "lowest", "highest"),
        tuple(lines),
    )


def goal_table(section: Section) -> Table | None:
    """The goals with what was reached, by each implementation and by the faster of tilewise's kernels, which
    is what counts; None where they were not set for this machine."""
    gpu = section.machine.gpu
    if gpu is None or not concerns(gpu):
        return None
    found = contests(section.rows)
    ours = sorted({row.implementation for row in section.rows if is_contender(row.implementation)})
    kernels, lines = kernels_of(section.rows), []
    for goal in GOALS:
        outcomes = [(name, outcome(goal, found, (name,), gpu)) for name in ours]
        levels = tuple(map(goal.written, (goal.floor, goal.target, goal.stretch)))
        reached = [(name, result) for name, result in outcomes if result.value is not None]
        several = [name for name, _ in reached if name in kernels]
        if len(several) > 1:
            reached.append((FASTER, outcome(goal, found, several, gpu)))
        if not reached:
            lines.append((goal.name, *levels, "", "", "", "no row"))
        for name, result in reached:
            assert result.value is not None
            verdict = goal.verdict(result.value)
            cases = str(len(result.cases))
            lines.append((goal.name, *levels, name, goal.written(result.value), cases, verdict))
    return Table(
        "Against the goals, which were set for an H200",
        ("goal", "floor", "target", "stretch", "implementation", "result", "cases", "level"),
        tuple(lines),
    )


def status_lines(section: Section) -> list[str]:
    """How many rows are ok, wrong, ...; why some are wrong or failed; the checks."""
    statuses = [row.status for row in section.rows]
    parts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    lines = [f"{count(len(statuses), 'row')}: {', '.join(parts)}"] if statuses else []
    bad = reasons(section.rows, ("wrong", "failed"))
    lines += bad[:LISTED]
    if len(bad) > LISTED:
        lines.append(f"and {count(len(bad) - LISTED, 'other reason')} why rows are wrong or failed")
    if section.checks:
        made = [check for check in section.checks if check.passed or check.is_bad]
        passed = sum(check.passed for check in made)
        lines.append(f"{passed} of {count(len(made), 'check')} passed")
        lines += [f"{c.status}: {c.name}: {one_line(c.detail)}" for c in made if c.is_bad]
        left_out = [check for check in section.checks if check.status == "left out"]
        if left_out:
            lines.append(f"{count(len(left_out), 'check')} left out: {one_line(left_out[0].detail)}")
    return lines


def ceiling_line(section: Section) -> str:
    """What the machine itself did in the same run."""
    ceilings = section.ceilings
    if ceilings is None:
        return "no ceiling was measured in this run"
    parts = [
        f"matmul in {dtype} {digits(rate / 1e12)} TFLOP/s"
        for dtype, rate in ceilings.matmul_flops_per_second.items()
    ]
    if ceilings.copy_bytes_per_second:
        parts.append(f"copy {digits(ceilings.copy_bytes_per_second / 1e9)} GB/s")
    return f"measured in this run: {', '.join(parts) or 'nothing'}"


def screen(section: Section) -> Group:
    """The section in one screen."""
    parts: list[RenderableType] = [Text(f"{section.name}: {section.made_with}", style="bold")]
    if section.on_gpu:
        parts.append(Text(ceiling_line(section)))
        goals = goal_table(section)
        tables = [ratio_table(section), gain_table(section), *([goals] if goals else [])]
        parts += [table.rich() for table in tables if table.lines]
    else:
        parts.append(Text(NO_SPEED))
    return Group(*parts, *map(Text, status_lines(section)))


def print_summary(sections: list[Section], console: Console) -> None:
    """One screen a machine."""
    for section in sections:
        console.print(screen(section))
