"""How do all pictures look? The colour and mark of each implementation, titles, legends, files."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .ranking import is_contender, is_tilewise
from .sections import Section

Case = TypeVar("Case")

# One strong hue is tilewise's, in every picture: the further a row is from its kernels as users call them,
# the paler. Rivals have calmer colours, none of that hue and no two the same, since bars have no marks. By
# how a name begins, the longest beginning first.
LOOKS: dict[str, tuple[str, str, Any]] = {  # colour, marker, dashes
    "tilewise portable": ("#E8480C", "o", "-"),
    "tilewise hopper": ("#A81500", "D", "-"),
    "tilewise portable, no launch": ("#F5A98C", "o", ":"),
    "tilewise hopper, no launch": ("#D98A80", "D", ":"),
    "tilewise portable, compiled": ("#FA8A3C", "o", "--"),
    "tilewise portable, no launch, compiled": ("#F8D3BF", "o", ":"),
    "tilewise portable, fp8": ("#7A1F00", "v", "-"),
    "tilewise portable, fp8 and quantize": ("#C98A70", "v", "--"),
    "tilewise portable quantize": ("#FFB37A", "v", ":"),
    "tilewise portable quantize, rotated": ("#B35A1F", "v", "-."),
    "tilewise torch": ("#F9C4AB", "o", ":"),
    "tilewise": ("#F0764A", "P", "--"),
    "sdpa cudnn": ("#0072B2", "s", "-"),
    "sdpa flash": ("#56B4E9", "^", "-"),
    "sdpa efficient": ("#009E73", "v", "-"),
    "sdpa math": ("#999999", "X", ":"),
    "sdpa": ("#2F5D8C", "s", ":"),
    "pytorch by hand": ("#A8A8C8", "X", "-."),
    "pytorch by hand, compiled": ("#4A4A8F", "X", "-"),
    "sdpa, compiled": ("#88B7D8", "s", "--"),
    "varlen_attn": ("#C2A500", "d", "-"),
    "flex": ("#CC79A7", "P", "-"),
    "flash_attn cute": ("#9B7BC8", "<", "--"),
    "flash_attn 3": ("#C9A6E8", "<", "-."),
    "flash_attn": ("#5A3D8A", ">", "-"),
    "flashinfer": ("#7A7A1F", "p", "-."),
    "xformers": ("#8FB89A", "h", "-."),
    "jax": ("#3E4A56", "*", "-"),
}
UNKNOWN = ("#4C9A9A", "#6B6ECF", "#31A354", "#756BB1", "#636363")
GREY, WARNING = "#555555", "#A40000"
TITLE_CHARACTER, CHARACTER = 0.12, 0.068  # inches that a character of the title and of what follows takes
NO_GPU = "No GPU: Triton's interpreter on tiny cases. These times say nothing about speed."
ERRORS_COUNT = "No GPU: Triton's interpreter on tiny cases. The errors say whether the answers are right."
LINE = 0.165  # inches between two lines of a label
TALLEST = 13.0  # inches of clusters in one column; what is taller is drawn in two
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


def frame(
    figure: Figure,
    section: Section,
    title: str,
    handles: list[Line2D],
    below: float,
    notes: Sequence[str] = (),
    is_timed: bool = True,
) -> float:
    """Write the title, where and with what it was measured, how to read it (`notes`), and the legend above
    what follows, and make the picture so high that `below` inches are left for that. Returns the height in
    inches, with all of it. is_timed: whether it shows times, which say nothing without a GPU."""
    width = figure.get_size_inches()[0]
    lines = [(GREY, line) for line in _wrapped(f"{section.name}: {section.made_with}", width)]
    if not section.on_gpu:
        lines.append((WARNING, NO_GPU) if is_timed else (GREY, ERRORS_COUNT))
    lines += [("black", line) for note in notes for line in _wrapped(note, width)]
    as_lines = any(one.get_linestyle() != "None" for one in handles)
    longest = max(len(str(one.get_label())) for one in handles)
    entry = longest * CHARACTER * 9 / 8.5 + (0.75 if as_lines else 0.5)  # inches
    columns = min(max(1, int((width - 0.3) / entry)), len(handles))
    titles = textwrap.wrap(title, int((width - 0.3) / TITLE_CHARACTER))
    lines_at = 0.17 + 0.23 * len(titles)
    legend_at = lines_at + 0.04 + 0.17 * len(lines)
    height = legend_at + 0.06 + 0.2 * -(-len(handles) // columns) + below
    figure.set_size_inches(width, height)
    left = 0.15 / width
    for number, line in enumerate(titles):
        at = 1 - (0.12 + 0.23 * number) / height
        figure.text(left, at, line, fontsize=13, fontweight="bold", va="top")
    for number, (colour, line) in enumerate(lines):
        figure.text(left, 1 - (lines_at + 0.17 * number) / height, line, fontsize=8.5, color=colour, va="top")
    figure.legend(
        handles=row_by_row(handles, columns),
        loc="upper left",
        bbox_to_anchor=(left, 1 - legend_at / height),
        ncols=columns,
        borderaxespad=0,
        borderpad=0.3,
        handlelength=2.4 if as_lines else 1.0,
        columnspacing=1.6,
    )
    return height


def _wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, int((width - 0.3) / CHARACTER))


def row_by_row(handles: list[Line2D], columns: int) -> list[Line2D]:
    """The entries so that a legend, which fills column by column, shows them in their order line by line."""
    return [one for column in range(columns) for one in handles[column::columns]]


def columns_of(cases: Sequence[Case], each: float) -> list[Sequence[Case]]:
    """The cases, `each` inches high, in one column, or in two halves where that would be too tall."""
    if len(cases) < 2 or len(cases) * each <= TALLEST:
        return [cases] if cases else []
    half = -(-len(cases) // 2)
    return [cases[:half], cases[half:]]


def handle(implementation: str, line: bool) -> Line2D:
    """The legend's entry of an implementation, as a line with marks or as a patch of colour."""
    colour, marker, dashes = look(implementation)
    if line:
        width = 2.4 if is_contender(implementation) else 1.4
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
