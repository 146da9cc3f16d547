"""How far is each case from what the machine can do? Speed over arithmetic intensity, under the roof."""

from __future__ import annotations

from itertools import pairwise
from math import atan2, degrees
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..results import Row
from .cases import kind
from .ranking import contests, counts, is_contender
from .sections import Section
from .style import GREY, SETTINGS, frame, in_order, look, mark, no_ticks
from .units import digits

LOW_PRECISION = ("float16", "bfloat16")
# Where a name may stand beside its point, in points of type, the nearest first; a far one gets a line.
NEAR = ((7, -3, "left"), (-7, -3, "right"), (7, -12, "left"), (-7, -12, "right"), (7, 7, "left"))
FAR = tuple((x, y, "left") for y in range(-20, -100, -8) for x in (8, 24))
Point = tuple[float, float]


def points(section: Section) -> list[Row]:
    """The right and timed forward rows whose least memory traffic is known, in 16 bits: one roof for all."""
    return [
        row
        for row in section.rows
        if counts(row) and row.work == "forward" and row.bytes and row.flops and row.dtype in LOW_PRECISION
    ]


def place(row: Row) -> Point:
    """Where a row stands: FLOPs a byte, TFLOP/s."""
    assert row.median
    return row.flops / row.bytes, row.flops / row.median / 1e12


def roof(section: Section) -> tuple[float, float, str] | None:
    """FLOP/s, bytes a second, and whether they were "measured" or stand in the "datasheet"; None for a GPU of
    which neither is known."""
    ceilings = section.ceilings
    if ceilings and ceilings.copy_bytes_per_second:
        rates = [ceilings.matmul_flops_per_second.get(dtype, 0.0) for dtype in LOW_PRECISION]
        if any(rates):
            return max(rates), ceilings.copy_bytes_per_second, "measured"
    # Here, so that a report whose ceilings were measured need not import torch.
    from tilewise.tools.chips import find_chip

    try:
        chip = find_chip(section.machine.gpu or "")
    except ValueError:
        return None
    return chip.matmul_rate(2), chip.memory_bytes, "datasheet"


def draw_roofline(section: Section) -> Figure | None:
    """One picture for all groups; None where there is no point or no roof."""
    rows = points(section) if section.on_gpu else []
    limits = roof(section) if rows else None
    if limits is None:
        return None
    flops, bandwidth, source = limits
    names = in_order(row.implementation for row in rows)
    with matplotlib.rc_context(SETTINGS):
        width, below = 9.0, 5.2
        figure = Figure(figsize=(width, below))
        title = "Roofline: the forward against what the machine can do"
        height = frame(figure, section, title, [mark(name) for name in names], below)
        axes = figure.add_axes((0.75 / width, 0.55 / height, 1 - 0.95 / width, (below - 0.7) / height))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for name in reversed(names):
            colour, marker, _ = look(name)
            mine = [row for row in rows if row.implementation == name]
            axes.plot(
                *zip(*map(place, mine), strict=True),
                linestyle="", marker=marker, color=colour, label=name,
                markersize=7 if is_contender(name) else 5, alpha=0.85, markeredgecolor="white",
                markeredgewidth=0.5,
            )  # fmt: skip
        corners = _draw_roof(axes, flops, bandwidth, source)
        axes.set_xlabel("arithmetic intensity: FLOPs of the matmuls a byte that must move")
        axes.set_ylabel("TFLOP/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        no_ticks(axes)
        _name_cases(figure, axes, rows, corners)
    return figure


def _draw_roof(axes: Axes, flops: float, bandwidth: float, source: str) -> list[Point]:
    """The slope of the memory and the level of the matmuls, dashed where nobody measured them. Returns the
    line's corners."""
    ridge = flops / bandwidth
    low, high = axes.get_xlim()
    low, high = min(low, ridge / 4), max(high, ridge * 4)
    corners = [(low, low * bandwidth / 1e12), (ridge, flops / 1e12), (high, flops / 1e12)]
    style: Any = "-" if source == "measured" else (0, (5, 4))
    axes.plot(*zip(*corners, strict=True), color=GREY, linestyle=style, linewidth=1.6, label="_roof")
    axes.set_xlim(low, high)
    axes.set_ylim(top=flops / 1e12 * 1.6)
    text: Any = dict(textcoords="offset points", fontsize=8.5, color=GREY)
    level = f"matmul, {source}: {digits(flops / 1e12)} TFLOP/s"
    axes.annotate(level, corners[2], xytext=(-4, 4), ha="right", **text)
    slope, at = f"memory, {source}: {digits(bandwidth / 1e9)} GB/s", (low * ridge) ** 0.5
    (x0, y0), (x1, y1) = axes.transData.transform(corners[:2])
    text |= dict(ha="center", rotation=degrees(atan2(y1 - y0, x1 - x0)), rotation_mode="anchor")
    axes.annotate(slope, (at, at * bandwidth / 1e12), xytext=(-4, 4), **text)
    return corners


def _name_cases(figure: Figure, axes: Axes, rows: list[Row], corners: list[Point]) -> None:
    """Name the shapes of models beside the fastest of tilewise's points, where there is room."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [_around(axes.transData.transform(place(row)), by=4) for row in rows]
    for start, end in pairwise(axes.transData.transform(corners)):  # the roof, as a row of small boxes
        taken += [_around(start + (end - start) * step / 100, by=2) for step in range(101)]
    taken += [Text.get_window_extent(text, renderer) for text in axes.texts]  # of the roof
    inside = axes.get_window_extent(renderer)
    ours = {row.implementation for row in rows if is_contender(row.implementation)}
    for contest in contests(rows):
        row = contest.fastest(ours)
        if row is None or row.case.startswith(("paper-", "short-", "feature-")):
            continue
        for x, y, align in (*NEAR, *FAR):
            text: Any = dict(textcoords="offset points", ha=align, fontsize=7)
            if (x, y, align) in FAR:
                text["arrowprops"] = dict(arrowstyle="-", color=GREY, linewidth=0.5, relpos=(0, 1), shrinkB=3)
            written = axes.annotate(kind(row.case), place(row), xytext=(x, y), **text)
            written.update_positions(renderer)
            box = Text.get_window_extent(written, renderer)  # of the words, without the line
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not box.count_overlaps(taken)
            ):
                taken.append(box)
                break
            written.remove()


def _around(at: Any, by: float) -> Bbox:
    x, y = at
    return Bbox.from_extents(x - by, y - by, x + by, y + by)
