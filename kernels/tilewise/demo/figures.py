"""The two pictures: how alike the sentences are, and where one attention head looks."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
    n = len(words)
    side = inches(n, 0.36)
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(side + 2, side))
        axes = figure.add_subplot()
        heat_map(figure, axes, weights, "attention weight (each row sums to 1)", low=0.0, high=None)
        label(axes, words, words)
        for text in axes.get_xticklabels():
            text.set(rotation=90)
        axes.set_xlabel("… to this word")
        axes.set_ylabel("from this word …")
        axes.set_title(title, loc="left")
        figure.savefig(path, dpi=150, bbox_inches="tight")


def inches(rows: int, each: float) -> float:
    """The side of a square picture with `each` inches a row, as long as the rows have labels."""
    return max(2.5, rows * each) if rows <= MOST_LABELLED else 10.0


def heat_map(
    figure: Figure, axes: Axes, values: Tensor, meaning: str, low: float, high: float | None
) -> None:
    """values [rows, columns] as coloured squares, with a scale that says what they mean."""
    rows, columns = values.shape
    edges = (0.5, columns + 0.5, rows + 0.5, 0.5)  # so that rows and columns count from 1
    image = axes.imshow(values.cpu().numpy(), cmap=COLOURS, vmin=low, vmax=high, extent=edges)
    figure.colorbar(image, ax=axes, label=meaning, shrink=0.8)


def write_numbers(axes: Axes, values: Tensor) -> None:
    """Each value in its cell, dark on light and light on dark."""
    low, high = axes.images[0].get_clim()
    for row, line in enumerate(values.tolist(), 1):
        for column, value in enumerate(line, 1):
            colour = "black" if value > (low + high) / 2 else "white"
            axes.text(column, row, hundredths(value), ha="center", va="center", color=colour, fontsize=8)


def label(axes: Axes, columns: list[str], rows: list[str]) -> None:
    """A label a row and a column, or some of the numbers from 1 where labels would overlap."""
    if len(rows) <= MOST_LABELLED:
        axes.set_xticks(range(1, len(columns) + 1), columns)
        axes.set_yticks(range(1, len(rows) + 1), rows)
    axes.tick_params(length=0)
