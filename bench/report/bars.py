"""How fast is each implementation in each case? Bars, a cluster a case, in the unit that says most of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mode

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results import Row
from .cases import case_labels, extent, group_title
from .ranking import Contest, contests, counts, has_rate, limit
from .sections import Section
from .style import GREY, LINE, SETTINGS, columns_of, frame, handle, in_order, look, no_ticks
from .units import digits, unit_of

BAR, GAP = 0.145, 0.13  # inches: a bar, and between two clusters
CLEARLY = 2.0  # a case near the ridge stays beside its neighbours, in TFLOP/s
UNITS = {"TFLOP/s": "more is better", "GB/s": "memory-bound: more is better", "time": "less is better"}
MISSING = {  # the words in place of a bar
    "unsupported": "cannot do what the case asks for",
    "unavailable": "not installed, or not for this machine",
    "wrong": "the answer is wrong, so its time does not count",
    "failed": "raised an error",
    "left out": "a check of it did not pass in this run",
    "not asked": "nobody ran it here",
}


def unit(contest: Contest, section: Section) -> str:
    """What the case's bars show: TFLOP/s, GB/s where memory bounds it, time where nobody counted FLOPs or the
    machine has no GPU."""
    if not section.on_gpu or not any(map(has_rate, contest.rows)):
        return "time"
    bound = {limit(row, section.ceilings, CLEARLY) for row in contest.rows if counts(row)}
    return "GB/s" if bound == {"memory"} else "TFLOP/s"


def value(row: Row, shown: str) -> float:
    """The length of a bar: TFLOP/s, GB/s or seconds."""
    assert row.median
    return {
        "TFLOP/s": row.flops / row.median / 1e12,
        "GB/s": row.bytes / row.median / 1e9,
        "time": row.median,
    }[shown]


def draw_bars(section: Section, group: str) -> Figure | None:
    """A panel a unit and column; None where the group has no right and timed row."""
    rows = section.groups[group]
    drawn = [contest for contest in contests(rows) if any(map(counts, contest.rows))]
    if not drawn:
        return None
    names = in_order(row.implementation for row in rows if counts(row) or row.status == "wrong")
    labels = case_labels(rows)
    wide, lines = extent(labels[contest.key] for contest in drawn)
    cluster = max(len(names) * BAR, lines * LINE) + GAP
    panels: list[tuple[str, Sequence[Contest]]] = []
    for shown in UNITS:
        these = [contest for contest in drawn if unit(contest, section) == shown]
        panels += [(shown, part) for part in columns_of(these, cluster)]
    with matplotlib.rc_context(SETTINGS):
        tallest = max(len(part) for _, part in panels) * cluster
        margin = 0.25 + 0.073 * wide  # room for the labels
        width, below = max(len(panels) * (margin + 3.0) + 0.2, 7.2), tallest + 0.9
        figure = Figure(figsize=(width, below))
        handles = [handle(name, line=False) for name in names]
        units = dict.fromkeys(shown for shown, _ in panels)
        title = f"{group_title(group)}: {' and '.join(units)}"
        height = frame(figure, section, title, handles, below, missing_words(drawn, names))
        each = (width - 0.2) / len(panels)
        longest = {shown: max(value(row, shown) for s, part in panels if s == shown for contest in part
                              for row in contest.rows if counts(row)) for shown, _ in panels}  # fmt: skip
        for number, (shown, part) in enumerate(panels):
            tall = len(part) * cluster
            box = (number * each + margin, below - 0.3 - tall, each - margin - 0.15, tall)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _panel(axes, part, names, shown, longest[shown], BAR / cluster)
            axes.set_yticks(range(len(part)), [labels[contest.key] for contest in part])
            if shown != "time":
                _ceiling(axes, section, shown, part)
    return figure


def word(contest: Contest, name: str) -> str:
    """What stands in place of the bar of an implementation that has none; empty where it has one."""
    row = next((row for row in contest.rows if row.implementation == name), None)
    if row is None:
        return "not asked"
    return "" if counts(row) else "not asked" if row.status == "ok" else row.status


def missing_words(drawn: Sequence[Contest], names: list[str]) -> list[str]:
    """What the words in place of bars mean, of those that the picture has."""
    found = {word(contest, name) for contest in drawn for name in names}
    said = [f"{status} ({meaning})" for status, meaning in MISSING.items() if status in found]
    return [f"In place of a bar: {', '.join(said)}."] if said else []


def _panel(
    axes: Axes, part: Sequence[Contest], names: list[str], shown: str, longest: float, tall: float
) -> None:
    """The clusters from the top down; a number at the end of each bar, a word where a bar is missing. tall:
    the height of a bar, where a cluster with the gap below it is 1."""
    unit_name, size = unit_of(longest) if shown == "time" else (shown, 1.0)
    for place, contest in enumerate(part):
        by_name = {row.implementation: row for row in contest.rows}
        for number, name in enumerate(names):
            y = place + (number - (len(names) - 1) / 2) * tall
            row = by_name.get(name)
            if row is not None and counts(row):
                length = value(row, shown) / size
                axes.barh(y, length, height=tall * 0.92, color=look(name)[0], label=name)
                text, colour, at = digits(length), "black", length
            else:
                text, colour, at = word(contest, name), GREY, 0.0
            axes.annotate(
                text, (at, y), xytext=(3, 0), textcoords="offset points", va="center_baseline", fontsize=7,
                color=colour, bbox=dict(facecolor="white", edgecolor="none", pad=0.4),  # over the ceiling
            )  # fmt: skip
    axes.set_ylim(len(part) - 0.5, -0.5)
    axes.set_xlim(0, longest / size * 1.14)
    axes.set_xlabel(f"{unit_name}   ({UNITS[shown]})")
    axes.grid(False, axis="y")
    no_ticks(axes)


def _ceiling(axes: Axes, section: Section, shown: str, part: Sequence[Contest]) -> None:
    """A dashed line at the rate that the machine reached in the same run; for matmuls in the dtype that most
    of the cases have."""
    if section.ceilings is None:
        return
    if shown == "GB/s":
        rate, what = (section.ceilings.copy_bytes_per_second or 0.0) / 1e9, "copy"
    else:
        dtype = mode(contest.rows[0].dtype for contest in part)
        rate = section.ceilings.matmul_flops_per_second.get(dtype, 0.0) / 1e12
        what = f"matmul in {dtype}"
    if not rate:
        return
    axes.set_xlim(0, max(axes.get_xlim()[1], rate * 1.05))
    axes.axvline(rate, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
        f"{what}, measured: {digits(rate)}", (rate, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="right", fontsize=7.5, color=GREY,
    )  # fmt: skip
