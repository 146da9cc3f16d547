"""How fast is each implementation in each case? Bars, a cluster a case, in the unit that says most of it."""

from __future__ import annotations

from statistics import mode

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results import Row
from .ranking import Contest, case_names, contests, counts, has_rate, limit
from .sections import Section
from .style import GREY, SETTINGS, frame, handle, in_order, look, no_ticks
from .units import digits, unit_of

BAR, GAP = 0.145, 0.13  # inches: a bar, and between two clusters
MOST_IN_A_COLUMN = 60  # bars
CLEARLY = 2.0  # a case near the ridge stays beside its neighbours, in TFLOP/s
UNITS = {"TFLOP/s": "more is better", "GB/s": "memory-bound: more is better", "time": "less is better"}


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
    cases = case_names(rows)
    panels: list[tuple[str, list[Contest]]] = []
    for shown in UNITS:
        these = [contest for contest in drawn if unit(contest, section) == shown]
        panels += [(shown, part) for part in _split(these, max(1, MOST_IN_A_COLUMN // len(names)))]
    with matplotlib.rc_context(SETTINGS):
        cluster = max(len(names) * BAR, 0.2) + GAP
        tallest = max(len(part) for _, part in panels) * cluster
        margin = 0.12 + 0.073 * max(len(cases[contest.key]) for contest in drawn)  # room for the names
        width, below = max(len(panels) * (margin + 3.0) + 0.2, 7.2), tallest + 0.9
        figure = Figure(figsize=(width, below))
        handles = [handle(name, line=False) for name in names]
        height = frame(figure, section, f"{group}: each case", handles, below)
        each = (width - 0.2) / len(panels)
        longest = {shown: max(value(row, shown) for s, part in panels if s == shown for contest in part
                              for row in contest.rows if counts(row)) for shown, _ in panels}  # fmt: skip
        for number, (shown, part) in enumerate(panels):
            tall = len(part) * cluster
            box = (number * each + margin, below - 0.3 - tall, each - margin - 0.15, tall)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _panel(axes, part, names, shown, longest[shown], [cases[contest.key] for contest in part])
            if shown != "time":
                _ceiling(axes, section, shown, part)
    return figure


def _split(found: list[Contest], most: int) -> list[list[Contest]]:
    """Parts of at most `most` cases, as equal as can be."""
    if not found:
        return []
    parts = -(-len(found) // most)
    size = -(-len(found) // parts)
    return [found[i : i + size] for i in range(0, len(found), size)]


def _panel(
    axes: Axes, part: list[Contest], names: list[str], shown: str, longest: float, cases: list[str]
) -> None:
    """The clusters from the top down; a number at the end of each bar, a word where a bar is missing."""
    unit_name, size = unit_of(longest) if shown == "time" else (shown, 1.0)
    tall = BAR / (len(names) * BAR + GAP)  # of a bar, where a cluster is 1
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
                text, colour, at = row.status if row else "not asked", GREY, 0.0
            axes.annotate(
                text, (at, y), xytext=(3, 0), textcoords="offset points", va="center_baseline", fontsize=7,
                color=colour, bbox=dict(facecolor="white", edgecolor="none", pad=0.4),  # over the ceiling
            )  # fmt: skip
    axes.set_yticks(range(len(part)), cases)
    axes.set_ylim(len(part) - 0.5, -0.5)
    axes.set_xlim(0, longest / size * 1.14)
    axes.set_xlabel(f"{unit_name}   ({UNITS[shown]})")
    axes.grid(False, axis="y")
    no_ticks(axes)


def _ceiling(axes: Axes, section: Section, shown: str, part: list[Contest]) -> None:
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
