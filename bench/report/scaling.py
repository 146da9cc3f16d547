"""How does speed change with length? A panel a series of cases that differ in length alone, a line an
implementation."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results import Row, Work
from .cases import group_title, kind
from .ranking import counts, is_contender
from .sections import Section
from .style import GREY, SETTINGS, frame, handle, in_order, look, no_ticks

FEWEST = 3  # lengths that make a curve


@dataclass(frozen=True)
class Series:
    """The rows of one panel: same case but for the length that its name ends in."""

    name: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What the cases have in common, in words: "head_dim 64, causal mask"."""
        return kind(self.name)

    @property
    def lengths(self) -> list[int]:
        return sorted({row.sizes["kv_len"] for row in self.rows})


def all_series(rows: list[Row], work: Work) -> list[Series]:
    """The right and timed rows of `work` by case name without its length, where there are lengths enough."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name, _, length = row.case.rpartition("-")
        if counts(row) and row.work == work and row.flops and length == str(row.sizes.get("kv_len")):
            found.setdefault(name, []).append(row)
    series = [Series(name, tuple(rows)) for name, rows in found.items()]
    return [one for one in series if len(one.lengths) >= FEWEST]


def draw_scaling(section: Section, group: str, work: Work) -> Figure | None:
    """TFLOP/s over length; None where the group holds no curve, or nothing was timed on a GPU."""
    series = all_series(section.groups.get(group, []), work) if section.on_gpu else []
    if not series:
        return None
    # Full above causal where the grid has both; the panels run along head_dim.
    kinds = list(dict.fromkeys(one.name.rpartition("-")[2] for one in series))
    rows = len(kinds) if set(kinds) == {"full", "causal"} and len(series) % 2 == 0 else 1
    columns = -(-len(series) // rows)
    names = in_order(row.implementation for one in series for row in one.rows)
    with matplotlib.rc_context(SETTINGS):
        width, below = max(3.4 * columns + 0.4, 7.2), 2.6 * rows + 0.4
        figure = Figure(figsize=(width, below))
        title = group_title(group) if work in group else f"{group_title(group)}, {work}"
        handles = [handle(name, line=True) for name in names]
        height = frame(figure, section, f"{title}: speed by length", handles, below)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        ordered = (
            sorted(series, key=lambda one: kinds.index(one.name.rpartition("-")[2])) if rows > 1 else series
        )
        for number, axes in enumerate(panels.flat):
            if number < len(ordered):
                _panel(axes, section, ordered[number], names)
            else:
                axes.set_visible(False)
        panels[0, 0].set_ylim(
            0, panels[0, 0].get_ylim()[1] * 1.06
        )  # all share it; room for the ceiling's name
        for axes in panels[:, 0]:
            axes.set_ylabel("TFLOP/s")
        for axes in panels[-1]:
            axes.set_xlabel("tokens")
        figure.subplots_adjust(
            left=0.62 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=(below - 0.35) / height,
            wspace=0.08, hspace=0.32,
        )  # fmt: skip
    return figure


def _panel(axes: Axes, section: Section, series: Series, names: list[str]) -> None:
    axes.set_title(series.title)
    axes.set_xscale("log", base=2)
    for name in reversed(names):  # tilewise last, on top
        points = sorted(
            (row.sizes["kv_len"], row.flops / row.median / 1e12)
            for row in series.rows
            if row.implementation == name and row.median
        )
        colour, marker, dashes = look(name)
        ours = is_contender(name)
        axes.plot(
            *zip(*points, strict=True) if points else ([], []),
            color=colour, marker=marker, linestyle=dashes, label=name,
            linewidth=2.4 if ours else 1.4, markersize=6 if ours else 5,
        )  # fmt: skip
    _ceiling(axes, section, series)
    axes.set_xticks(series.lengths, [str(n) if n < 1024 else f"{n / 1024:g}k" for n in series.lengths])
    axes.minorticks_off()
    no_ticks(axes)


def _ceiling(axes: Axes, section: Section, series: Series) -> None:
    """A dashed line at the matmul rate of the same run."""
    rates = section.ceilings.matmul_flops_per_second if section.ceilings else {}
    rate = rates.get(series.rows[0].dtype)
    if not rate:
        return
    axes.axhline(rate / 1e12, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    label = f"large matmul, measured: {rate / 1e12:.0f}"
    axes.annotate(
        label, (0, rate / 1e12), xycoords=("axes fraction", "data"), xytext=(3, 3),
        textcoords="offset points", fontsize=7.5, color=GREY,
    )  # fmt: skip
