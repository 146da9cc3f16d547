"""Are the answers right? Every row's error against float64, as a multiple of PyTorch's own error."""

from __future__ import annotations

from math import isfinite

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Row
from .ranking import case_names
from .sections import Section
from .style import GREY, SETTINGS, frame, in_order, look, mark, no_ticks

SPREAD = 0.6  # of a line, from the first mark to the last: equal errors stand beside one another
LEAST = 2.0**-4  # a smaller multiple is drawn here: an exact answer has no place on a logarithmic axis


def points(rows: list[Row]) -> list[Row]:
    """The rows whose error can be held against PyTorch's."""
    return [row for row in rows if row.error is not None and isfinite(row.error) and row.torch_error]


def draw_accuracy(section: Section, group: str) -> Figure | None:
    """A line a case: a mark an implementation, and a stroke at the error that is still allowed. None where no
    row of the group has an error."""
    rows = points(section.groups[group])
    if not rows:
        return None
    named = case_names(section.groups[group])
    places = {key: place for place, key in enumerate(dict.fromkeys(row.key for row in rows))}
    cases = [named[key] for key in places]
    names = in_order(row.implementation for row in rows)
    with matplotlib.rc_context(SETTINGS):
        margin = 0.25 + 0.073 * max(map(len, cases))
        width, below = max(margin + 5.2, 7.2), 0.25 * len(cases) + 0.75
        figure = Figure(figsize=(width, below))
        limit = Line2D([], [], color=GREY, marker="|", linestyle="", markersize=9, label="allowed")
        handles = [*(mark(name) for name in names), limit]
        title = f"{group}: error against float64, PyTorch's own being 1"
        height = frame(figure, section, title, handles, below)
        axes = figure.add_axes(
            (margin / width, 0.55 / height, 1 - (margin + 0.2) / width, (below - 0.75) / height)
        )
        axes.set_xscale("log", base=2)
        for number, name in reversed(list(enumerate(names))):
            colour, marker, _ = look(name)
            shift = SPREAD * ((number + 0.5) / len(names) - 0.5)
            mine = [row for row in rows if row.implementation == name]
            axes.plot(
                [_multiple(row, row.error) for row in mine], [places[row.key] + shift for row in mine],
                linestyle="", marker=marker, color=colour, label=name, markersize=6, alpha=0.85,
                markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        allowed = [row for row in rows if row.allowed_error is not None]
        axes.plot(
            [_multiple(row, row.allowed_error) for row in allowed],
            [places[row.key] for row in allowed],
            linestyle="", marker="|", color=GREY, markersize=9, label="allowed",
        )  # fmt: skip
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("largest error, in multiples of PyTorch's in the same dtype   (less is better)")
        no_ticks(axes)
    return figure


def _multiple(row: Row, error: float | None) -> float:
    assert error is not None and row.torch_error is not None
    return max(error / row.torch_error, LEAST)
