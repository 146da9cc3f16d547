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
    side = min(max(0.5 * n, 2.0), 14.0)
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
    side = min(max(0.36 * n, 2.5), 24.0)
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


def heat_map(
    figure: Figure, axes: Axes, values: Tensor, meaning: str, low: float, high: float | None
) -> None:
    """values [rows, columns] as coloured squares, with a scale that says what they mean."""
    image = axes.imshow(values.cpu().numpy(), cmap=COLOURS, vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label=meaning, shrink=0.8)


def write_numbers(axes: Axes, values: Tensor) -> None:
    """Each value in its cell, dark on light and light on dark."""
    low, high = axes.images[0].get_clim()
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            colour = "black" if value > (low + high) / 2 else "white"
            axes.text(column, row, hundredths(value), ha="center", va="center", color=colour, fontsize=8)


def label(axes: Axes, columns: list[str], rows: list[str]) -> None:
    """A label a row and a column, or plain indices where labels would overlap."""
    if len(rows) <= MOST_LABELLED:
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
