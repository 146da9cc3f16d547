"""The two pictures: how alike the sentences are, and where one attention head looks."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from .report import hundredths

COLOURS = "viridis"  # reads the same with and without colour vision, and in grey
MOST_NUMBERED = 16  # above this many rows, numbers in the cells would not be legible
MOST_LABELLED = 64


def draw_similarity(path: Path, cosine: Tensor, sentences: list[str]) -> None:
    """A heat map of cosine [n, n], with sentences as labels, to a PNG file."""
    n = len(sentences)
    side = inches(n, 0.5 if n <= MOST_NUMBERED else 0.25)
    with matplotlib.rc_context({"text.parse_math": False}):  # a sentence may hold dollar signs
        figure = Figure(figsize=(side + 2, side))
        axes = figure.add_subplot()
        heat_map(figure, axes, cosine, "cosine similarity", low=min(0.0, cosine.min().item()), high=1.0)
        if n <= MOST_NUMBERED:
            write_numbers(axes, cosine)
        numbers = [str(i + 1) for i in range(n)]
        rows = [f"{textwrap.shorten(s, 70, placeholder='…')}  {i}" for i, s in enumerate(sentences, 1)]
        label(axes, numbers, rows)
        axes.set_xlabel("sentence")
        axes.set_title("How alike the sentences are", loc="left")
        figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_attention(path: Path, weights: Tensor, words: list[str], title: str) -> None:
    """A heat map of one head's attention weights [length, length] over word pieces, to a PNG file."""
    with matplotlib.rc_context({"text.parse_math": False}):
        attention_figure(weights, words, title).savefig(path, dpi=150, bbox_inches="tight")


def attention_figure(weights: Tensor, words: list[str], title: str) -> Figure:
    """The weights to the first and the last piece in grey, beside those to the words in colours.

    Many heads give most of their weight to those two, [CLS] and [SEP], which are no words of the sentence. On
    one scale with them little else could be seen, so they stand apart, and the colours are the words' alone.
    """
    n, gap = len(words), 0.2
    apart, between = [0, n - 1], list(range(1, n - 1))
    side = inches(n, 0.36)
    cell = side / n
    strip = 2 * max(cell, 0.22)  # wide enough for the two labels where cells are small
    figure = Figure(figsize=(side + 2, side))
    width, height = figure.get_size_inches()
    left = figure.add_axes((0, 0, strip / width, 1))
    squares(left, weights[:, apart], "Greys", Normalize(0, 1))
    left.set_aspect("auto")
    label(left, [], words)
    left.set_xticks((1, 2), [words[i] for i in apart])
    left.set_ylabel("from this word piece …")
    if n <= MOST_LABELLED:
        write_numbers(left, weights[:, apart], dark_is_high=True)
    high = None
    if between:
        high = max(weights[:, between].max().item(), 1e-6)  # above 0 even where no word is looked at
        right = figure.add_axes(((strip + gap) / width, 0, len(between) * cell / width, 1))
        image = squares(right, weights[:, between], COLOURS, PowerNorm(0.5, 0, high), first=2)
        label(right, words, [""] * n)
        right.set_xlim(1.5, n - 0.5)
        right.tick_params(labelleft=False)
        right.set_xlabel("… to this word piece")
        edge = strip + gap + len(between) * cell
        bar = figure.add_axes(((edge + 0.2) / width, 0.1, 0.15 / width, 0.8))
        figure.colorbar(image, cax=bar, label="attention weight")
    for axes in figure.axes[:2]:
        axes.tick_params(axis="x", rotation=90)
    lines = textwrap.wrap(how_to_read(words, high), max(40, round(13 * (side + 1))))
    figure.text(0, 1 + (0.1 + 0.16 * len(lines)) / height, title, fontsize=12, va="bottom")
    figure.text(0, 1 + 0.08 / height, "\n".join(lines), fontsize=8, va="bottom", color="#444444")
    return figure


def how_to_read(words: list[str], high: float | None) -> str:
    """What the greys and the colours of the attention picture stand for. high: where the colours end."""
    said = (
        f"{words[0]} and {words[-1]}, marks that the model adds, have a scale of their own: white 0, black 1."
    )
    if high is not None:
        said += (
            f" The colours are those of the words alone: they end at {high:.2g}, the largest weight to a "
            "word, and grow with its square root, so that small weights show. A row sums to 1 with its grey "
            "part."
        )
    pieces = any(word.startswith("##") for word in words)
    return said + (" ## goes on with the word before it." if pieces else "")


def inches(rows: int, each: float) -> float:
    """The side of a square picture with `each` inches a row, as long as the rows have labels."""
    return max(2.5, rows * each) if rows <= MOST_LABELLED else 10.0


def heat_map(
    figure: Figure, axes: Axes, values: Tensor, meaning: str, low: float, high: float | None
) -> None:
    """values [rows, columns] as coloured squares, with a scale that says what they mean."""
    image = squares(axes, values, COLOURS, Normalize(low, high))
    figure.colorbar(image, ax=axes, label=meaning, shrink=0.8)


def squares(axes: Axes, values: Tensor, colours: str, scale: Normalize, first: int = 1) -> AxesImage:
    """values [rows, columns] as coloured squares, the first row at the top. first: the number of the first
    column."""
    rows, columns = values.shape
    edges = (first - 0.5, first + columns - 0.5, rows + 0.5, 0.5)  # so that rows count from 1
    return axes.imshow(values.cpu().numpy(), cmap=colours, norm=scale, extent=edges)


def write_numbers(axes: Axes, values: Tensor, dark_is_high: bool = False) -> None:
    """Each value in its cell, dark on light and light on dark."""
    low, high = axes.images[0].get_clim()
    for row, line in enumerate(values.tolist(), 1):
        for column, value in enumerate(line, 1):
            is_light = (value > (low + high) / 2) != dark_is_high
            text, colour = hundredths(value), "black" if is_light else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def label(axes: Axes, columns: list[str], rows: list[str]) -> None:
    """A label a row and a column, or some of the numbers from 1 where labels would overlap."""
    if len(rows) <= MOST_LABELLED:
        axes.set_xticks(range(1, len(columns) + 1), columns)
        axes.set_yticks(range(1, len(rows) + 1), rows)
    axes.tick_params(length=0)
