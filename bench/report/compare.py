"""What got faster or slower between two result files, and by how much beyond the noise?

The noise of a row is that of its samples: how far the ratio of the two medians moves when the samples of
both are drawn again and again (bootstrap). What differs between two runs as wholes, such as clocks, no sample
within one shows; so a change of less than LEAST_CHANGE is never called one, and how far the rivals moved, to
which nobody did anything, stands above the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..results import Row
from .ranking import counts, geometric_mean, is_tilewise
from .sections import Section
from .table import Table
from .units import count, duration, times

RESAMPLES, CONFIDENCE, SEED = 2000, 0.99, 0
FEWEST_SAMPLES = 5  # of which a median can be drawn again
LEAST_CHANGE = 1.01

Verdict = Literal["slower", "faster", "no change beyond noise", "too few samples", "status"]


@dataclass(frozen=True)
class Change:
    """One row in both files. ratio: the old median over the new one, so that above 1 it got faster."""

    old: Row
    new: Row
    verdict: Verdict
    ratio: float | None = None
    low: float | None = None  # the interval of the ratio
    high: float | None = None

    @property
    def is_large(self) -> bool:
        """Whether the medians differ by LEAST_CHANGE, or a status does."""
        return self.ratio is None or max(self.ratio, 1 / self.ratio) >= LEAST_CHANGE

    @property
    def text(self) -> str:
        """ "slower 1.08× (1.05× to 1.11×)", or what became of the status."""
        if self.ratio is None:
            new = f": {self.new.reason}" if self.new.reason else ""
            return f"was {self.old.status}, is {self.new.status}{new}"
        ratio, low, high = self.ratio, self.low, self.high
        way = "faster"
        if ratio < 1:  # said the other way round, so that the number is above 1
            way, ratio = "slower", 1 / ratio
            low, high = (1 / high, 1 / low) if low and high else (None, None)
        if self.verdict not in ("slower", "faster"):
            way = f"{self.verdict}: {way}"
        return f"{way} {times(ratio)}" + (f" ({times(low)} to {times(high)})" if low and high else "")


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """Where the ratio of the medians, old over new, lies with CONFIDENCE, by the same draws each time."""
    generator = np.random.default_rng(SEED)
    medians = [
        np.median(generator.choice(np.asarray(seconds), (RESAMPLES, len(seconds))), axis=1)
        for seconds in (old, new)
    ]
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[0] / medians[1], (outside, 100 - outside))
    return float(low), float(high)


def change(old: Row, new: Row) -> Change:
    """What became of one row."""
    if not counts(old) or not counts(new):
        return Change(old, new, "no change beyond noise" if old.status == new.status else "status")
    assert old.median and new.median
    ratio = old.median / new.median
    if min(len(old.seconds), len(new.seconds)) < FEWEST_SAMPLES:
        return Change(old, new, "too few samples", ratio)
    low, high = interval(old.seconds, new.seconds)
    verdict: Verdict = "faster" if low > 1 else "slower" if high < 1 else "no change beyond noise"
    found = Change(old, new, verdict, ratio, low, high)
    return found if found.is_large else replace(found, verdict="no change beyond noise")


@dataclass(frozen=True)
class Comparison:
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    changes: tuple[Change, ...]
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]

    def table(self) -> Table:
        """What changed, tilewise's rows first and what got slower above what got faster; the rest is counted
        in the notes."""
        order = ("status", "slower", "faster", "too few samples")
        shown = [one for one in self.changes if one.verdict in order and one.is_large]
        shown.sort(
            key=lambda one: (
                not is_tilewise(one.new.implementation),
                order.index(one.verdict),
                -abs(np.log(one.ratio)) if one.ratio else 0.0,
            )
        )
        lines = [
            (
                one.new.group,
                one.new.case if one.new.work in one.new.group else f"{one.new.case}, {one.new.work}",
                one.new.implementation,
                duration(one.old.median) if one.old.median else "",
                duration(one.new.median) if one.new.median else "",
                one.text,
            )
            for one in shown
        ]
        verdicts, notes = [one.verdict for one in self.changes], []
        for verdict in ("no change beyond noise", "too few samples"):
            if verdict in verdicts:
                notes.append(f"{count(verdicts.count(verdict), 'row')} of {len(verdicts)}: {verdict}")
        for which, rows in (("first", self.only_old), ("second", self.only_new)):
            if rows:
                groups = dict.fromkeys(f"{row.implementation} in {row.group}" for row in rows)
                notes.append(f"only in the {which} file: {count(len(rows), 'row')}: {', '.join(groups)}")
        return Table(
            "What changed from the first file to the second",
            ("group", "case", "implementation", "first", "second", "change"),
            tuple(lines),
            tuple(is_tilewise(one.new.implementation) for one in shown),
            tuple(notes),
        )


def compare_sections(old: Section, new: Section) -> Comparison:
    """Every row of both, matched by group, case, work and implementation."""
    before, after = ({(*row.key, row.implementation): row for row in one.rows} for one in (old, new))
    changes = [change(before[key], after[key]) for key in before if key in after]
    return Comparison(
        tuple(_warnings(old, new)),
        tuple(_remarks(old, new, changes)),
        tuple(changes),
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
    )


def _warnings(old: Section, new: Section) -> list[str]:
    """What makes the two files unfit to be compared."""
    lines = []
    if old.name != new.name:
        lines.append(
            f"Warning: two machines, {old.name} and {new.name}: no difference is a change of the code."
        )
    if not (old.on_gpu and new.on_gpu):
        lines.append("Warning: made without a GPU, so the times of kernels say nothing about speed.")
    return lines


def _remarks(old: Section, new: Section, changes: Sequence[Change]) -> list[str]:
    """What else differs, and how far tilewise and the rivals moved as wholes."""
    lines = [f"first: {old.name}: {old.made_with}", f"second: {new.name}: {new.made_with}"]
    one, other = old.machine.versions, new.machine.versions
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            lines.append(f"{name}: {one.get(name, 'not installed')}, then {other.get(name, 'not installed')}")
    for who, ours in (("the rivals, to which nobody did anything", False), ("tilewise", True)):
        ratios = [c.ratio for c in changes if c.ratio and is_tilewise(c.new.implementation) == ours]
        if ratios:
            mean = geometric_mean(ratios)
            way = "faster" if mean >= 1 else "slower"
            lines.append(f"{who}: {times(max(mean, 1 / mean))} {way}, geometric mean of {len(ratios)}")
    return lines
