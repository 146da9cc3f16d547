"""Which results belong together? One section a machine and set of versions, whatever files they came in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..results import Ceilings, Check, Machine, Results, Row, Stage

# Named in titles; the versions of rivals stand in the report's own table.
SHOWN = ("torch", "triton", "cuda")


@dataclass
class Section:
    """What was measured on one machine with one set of versions."""

    machine: Machine
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    repeated: int = 0  # rows that a later one for the same thing took the place of

    @property
    def on_gpu(self) -> bool:
        return self.machine.gpu is not None

    @property
    def name(self) -> str:
        return self.machine.gpu or "CPU"

    @property
    def groups(self) -> dict[str, list[Row]]:
        """The rows by group, in the order in which they were measured."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups

    @property
    def days(self) -> str:
        """ "2026-11-24", or the first and the last day."""
        days = sorted({date[:10] for date in self.dates})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

    @property
    def made_with(self) -> str:
        """Versions, revision and date in one line."""
        versions = [
            f"{name} {self.machine.versions[name]}" for name in SHOWN if name in self.machine.versions
        ]
        driver = [f"driver {self.machine.driver}"] if self.machine.driver else []
        return ", ".join([*versions, *driver, f"revision {short(self.machine.revision)}", self.days])


def short(revision: str | None) -> str:
    """The first 12 digits of a git revision, and whether files differed from it."""
    if revision is None:
        return "unknown"
    digits, dirty, _ = revision.partition("-dirty")
    return digits[:12] + dirty


def gather(results: list[Results]) -> list[Section]:
    """Merge results of the same machine and versions. Of several rows for one implementation, case and work
    the last counts: what was measured first may have been measured again because something was amiss."""
    sections: dict[tuple[object, ...], Section] = {}
    for result in results:
        machine = result.machine
        versions = tuple(sorted(machine.versions.items()))
        identity = (machine.gpu, machine.arch, machine.driver, versions, machine.revision)
        section = sections.setdefault(identity, Section(machine))
        section.files.append(result.name)
        section.dates.append(machine.date)
        section.ceilings = result.ceilings or section.ceilings
        section.checks += result.checks
        section.stages += result.stages
        section.rows += result.rows
    for section in sections.values():
        last = {(row.key, row.implementation): row for row in section.rows}
        section.repeated = len(section.rows) - len(last)
        section.rows = list(last.values())
    return list(sections.values())
