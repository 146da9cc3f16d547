"""Are the answers right? Every row's error against float64, as a multiple of PyTorch's own error."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Row
from .cases import case_labels, extent, group_title
from .sections import Section
from .style import GREY, LINE, SETTINGS, columns_of, frame, in_order, look, mark, no_ticks

LANE, GAP = 0.11, 0.14  # inches: a mark's own lane, and between two cases
SIZE = 7.0  # points of a mark, which its lane has room for
LEAST = 2.0**-4  # a smaller multiple is drawn here: an exact answer has no place on a logarithmic axis
ALLOWED = "most that counts as right"
TORCH = "PyTorch's own error"
Key = tuple[str, str, str]


def points(rows: list[Row]) -> list[Row]:
    """The rows whose error can be held against PyTorch's."""
    return [row for row in rows if row.error is not None and isfinite(row.error) and row.torch_error]


def draw_accuracy(section: Section, group: str) -> Figure | None:
    """A lane an implementation in each case, so that equal errors stand one below another: its mark, and a
    stroke at the error that is still allowed. None where no row of the group has an error."""
    rows = points(section.groups[group])
    if not rows:
        return None
    labels = case_labels(section.groups[group])
    keys = list(dict.fromkeys(row.key for row in rows))
    names = in_order(row.implementation for row in rows)
    wide, lines = extent(labels[key] for key in keys)
    band = max(len(names) * LANE, lines * LINE) + GAP
    panels = columns_of(keys, band)
    with matplotlib.rc_context(SETTINGS):
        margin = 0.25 + 0.073 * wide  # room for the labels
        width, below = max(len(panels) * (margin + 4.2) + 0.2, 7.2), len(panels[0]) * band + 0.8
        figure = Figure(figsize=(width, below))
        title = f"{group_title(group)}: how far from the exact answer"
        handles = [*map(mark, names), *_limits()]
        height = frame(figure, section, title, handles, below, _notes(rows), is_timed=False)
        low, high = _ends(rows)
        each = (width - 0.2) / len(panels)
        for number, part in enumerate(panels):
            box = (number * each + margin, below - 0.25 - len(part) * band, each - margin - 0.15)
            axes = figure.add_axes(
                (box[0] / width, box[1] / height, box[2] / width, len(part) * band / height)
            )
            axes.set_xscale("log", base=2)
            axes.set_xlim(low, high)
            _panel(axes, rows, part, names, LANE / band)
            axes.set_yticks(range(len(part)), [labels[key] for key in part])
    return figure


def _limits() -> list[Line2D]:
    """The legend's entries of what is no implementation."""
    stroke = Line2D([], [], color="black", marker="|", linestyle="", markersize=9, label=ALLOWED)
    torch = Line2D([], [], color=GREY, marker="|", linestyle="", markersize=12, label=TORCH)
    torch.set_markeredgewidth(3)
    return [stroke, torch]


def _notes(rows: list[Row]) -> list[str]:
    """How to read the picture."""
    said = (
        "Each mark is an answer's largest error against float64, divided by that of PyTorch's own "
        "computation in the same dtype: left of 1 it is the closer one. The thin stroke in a mark's lane is "
        "the most that counts as right: a mark beyond it is wrong."
    )
    least = any(_multiple(row, row.error) == LEAST for row in rows)
    return [said + (f" What is below {LEAST:g} stands at {LEAST:g}." if least else "")]


def _ends(rows: list[Row]) -> tuple[float, float]:
    """The axis' ends: the same in all panels, with PyTorch's 1 between them."""
    found = [_multiple(row, row.error) for row in rows]
    found += [_multiple(row, row.allowed_error) for row in rows if row.allowed_error is not None]
    return min(*found, 1.0) / 1.25, max(*found, 1.0) * 1.25


def _panel(axes: Axes, rows: list[Row], part: Sequence[Key], names: list[str], lane: float) -> None:
    """The cases from the top down. lane: the height of one, where a case with the gap below it is 1."""
    for place in range(1, len(part), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    axes.axvline(1, color=GREY, linewidth=2, alpha=0.6)
    places = {key: place for place, key in enumerate(part)}
    for number, name in enumerate(names):
        colour, marker, _ = look(name)
        shift = lane * (number - (len(names) - 1) / 2)
        mine = [row for row in rows if row.implementation == name and row.key in places]
        limited = [row for row in mine if row.allowed_error is not None]
        axes.plot(
            [_multiple(row, row.allowed_error) for row in limited],
            [places[row.key] + shift for row in limited],
            linestyle="", marker="|", color="black", markersize=LANE * 72, label=f"_allowed {name}",
        )  # fmt: skip
        axes.plot(
            [_multiple(row, row.error) for row in mine], [places[row.key] + shift for row in mine],
            linestyle="", marker=marker, color=colour, label=name, markersize=SIZE,
            markeredgecolor="white", markeredgewidth=0.4,
        )  # fmt: skip
    axes.set_ylim(len(part) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("error, in multiples of PyTorch's   (less is better)")
    no_ticks(axes)


def _multiple(row: Row, error: float | None) -> float:
    assert error is not None and row.torch_error is not None
    return max(error / row.torch_error, LEAST)
