"""How do all pictures look? The colour and mark of each implementation, titles, legends, files."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .ranking import is_tilewise
from .sections import Section

# Okabe and Ito's colours, which differ for every kind of colour vision; where two implementations share one,
# their marks and dashes differ. By how a name begins, the longest beginning first.
LOOKS: dict[str, tuple[str, str, Any]] = {  # colour, marker, dashes
    "tilewise portable": ("#D55E00", "o", "-"),
    "tilewise portable, no launch": ("#F2AE7E", "o", ":"),
    "tilewise portable, compiled": ("#8A3B00", "o", "--"),
    "tilewise portable, no launch, compiled": ("#C49A82", "o", ":"),
    "tilewise hopper": ("#000000", "D", "-"),
    "tilewise torch": ("#B9A38F", "o", ":"),
    "tilewise": ("#D55E00", "P", "--"),
    "sdpa cudnn": ("#0072B2", "s", "-"),
    "sdpa flash": ("#56B4E9", "^", "-"),
    "sdpa efficient": ("#009E73", "v", "-"),
    "sdpa math": ("#999999", "X", ":"),
    "sdpa": ("#0072B2", "s", ":"),
    "sdpa, compiled": ("#88B7D8", "s", "--"),
    "flex": ("#CC79A7", "P", "-"),
    "flash_attn cute": ("#E69F00", "<", "--"),
    "flash_attn": ("#E69F00", ">", "-"),
    "flashinfer": ("#A6761D", "p", "-."),
    "xformers": ("#5D8A66", "h", "-."),
    "jax": ("#7E57C2", "*", "-"),
}
UNKNOWN = ("#8C6D31", "#6B6ECF", "#31A354", "#756BB1", "#636363")
GREY, WARNING = "#555555", "#A40000"
CHARACTER = 0.068  # inches that a character of the second line takes
NO_GPU = "No GPU: Triton's interpreter on tiny cases. These times say nothing about speed."
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a case's name may hold dollar signs
    "svg.hashsalt": "tilewise",  # the same picture is the same file
}


def look(implementation: str) -> tuple[str, str, Any]:
    """Colour, marker and dashes: the same in every picture and every report."""
    beginning = beginning_of(implementation)
    if beginning is not None:
        return LOOKS[beginning]
    return UNKNOWN[zlib.crc32(implementation.encode()) % len(UNKNOWN)], "d", "-."


def beginning_of(implementation: str) -> str | None:
    """The longest key of LOOKS that the name begins with."""
    return max((key for key in LOOKS if implementation.startswith(key)), key=len, default=None)


def in_order(implementations: Iterable[str]) -> list[str]:
    """tilewise first, then the rivals as LOOKS has them, then the rest by name."""
    names = list(LOOKS)

    def place(name: str) -> tuple[bool, int, str]:
        known = names.index(matched) if (matched := beginning_of(name)) else len(names)
        return not is_tilewise(name), known, name

    return sorted(set(implementations), key=place)


def frame(figure: Figure, section: Section, title: str, handles: list[Line2D], below: float) -> float:
    """Write the title, where and with what it was measured, and the legend above what follows, and make the
    picture so high that `below` inches are left for that. Returns the height in inches, with all of it."""
    width = figure.get_size_inches()[0]
    where = textwrap.wrap(f"{section.name}: {section.made_with}", int(width / CHARACTER))
    where += [] if section.on_gpu else [NO_GPU]
    as_lines = any(one.get_linestyle() != "None" for one in handles)
    longest = max(len(str(one.get_label())) for one in handles)
    entry = longest * CHARACTER * 9 / 8.5 + (0.75 if as_lines else 0.5)  # inches
    columns = min(max(1, int((width - 0.3) / entry)), len(handles))
    legend_at = 0.4 + 0.17 * len(where)
    height = legend_at + 0.06 + 0.2 * -(-len(handles) // columns) + below
    figure.set_size_inches(width, height)
    left = 0.15 / width
    figure.text(left, 1 - 0.12 / height, title, fontsize=13, fontweight="bold", va="top")
    for number, line in enumerate(where):
        colour = WARNING if line == NO_GPU else GREY
        figure.text(left, 1 - (0.4 + 0.17 * number) / height, line, fontsize=8.5, color=colour, va="top")
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, 1 - legend_at / height),
        ncols=columns,
        borderaxespad=0,
        borderpad=0.3,
        handlelength=2.4 if as_lines else 1.0,
        columnspacing=1.6,
    )
    return height


def handle(implementation: str, line: bool) -> Line2D:
    """The legend's entry of an implementation, as a line with marks or as a patch of colour."""
    colour, marker, dashes = look(implementation)
    if line:
        width = 2.4 if is_tilewise(implementation) else 1.4
        return Line2D(
            [], [], color=colour, marker=marker, linestyle=dashes, linewidth=width, label=implementation
        )
    return Line2D([], [], color=colour, marker="s", linestyle="", markersize=8, label=implementation)


def mark(implementation: str) -> Line2D:
    """The legend's entry of an implementation that is drawn as points."""
    colour, marker, _ = look(implementation)
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=implementation)


def no_ticks(axes: Axes) -> None:
    axes.tick_params(length=0)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the picture as SVG and as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150)
    return paths
