"""What the demo prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .measure import LayerReport

CLOSEST_SHOWN = 10


def print_sentences(console: Console, sentences: list[str]) -> None:
    for number, sentence in enumerate(sentences, 1):
        console.print(Text.assemble((f"{number:4}  ", "bold"), sentence), overflow="ellipsis", no_wrap=True)


def print_similarities(console: Console, similarities: dict[str, Tensor], width: int) -> None:
    """The three matrices, each row's closest other sentence in bold; the closest pairs where those are too
    wide for the console. width: the embeddings' own, for the title."""
    titles = {
        "dot": "dot: e · f",
        "scaled dot": f"scaled dot: e · f / √{width}",
        "cosine": "cosine: e · f / (|e| |f|)",
    }
    rows = {name: matrix.tolist() for name, matrix in similarities.items()}
    n = len(rows["cosine"])
    widest = max(len(hundredths(value)) for matrix in rows.values() for row in matrix for value in row)
    if 5 + n * (widest + 2) > console.width:
        print_closest_pairs(console, similarities)
        return
    for name, matrix in rows.items():
        console.print(titles[name], style="italic", markup=False)
        table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for column in ["", *(str(i + 1) for i in range(n))]:
            table.add_column(column, justify="right", no_wrap=True)
        for i, row in enumerate(matrix):
            closest = max((value for j, value in enumerate(row) if j != i), default=None)
            cells = [Text(hundredths(value), style="bold" if value == closest else "") for value in row]
            table.add_row(Text(str(i + 1), style="bold"), *cells)
        console.print(table)


def print_closest_pairs(console: Console, similarities: dict[str, Tensor]) -> None:
    """The pairs of sentences with the largest cosine, by number."""
    cosine = similarities["cosine"]
    n = cosine.shape[0]
    pairs = [(cosine[i, j].item(), i, j) for i in range(n) for j in range(i + 1, n)]
    console.print("closest pairs (all are in similarity.csv)", style="italic")
    table = Table(box=SIMPLE_HEAD)
    for column in ("sentences", *similarities):
        table.add_column(column, justify="right")
    for _, i, j in sorted(pairs, reverse=True)[:CLOSEST_SHOWN]:
        table.add_row(f"{i + 1} and {j + 1}", *(f"{matrix[i, j]:.3f}" for matrix in similarities.values()))
    console.print(table)


def print_layers(console: Console, layers: list[LayerReport], dtype: str, kernel: str) -> None:
    """Errors and times, a row a layer. kernel: how the kernel ran, for the heading of its time."""
    title = f"attention, layer by layer: largest error against float64, and time ({dtype})"
    console.print(title, style="italic", markup=False)
    table = Table(box=SIMPLE_HEAD)
    for column in ("layer", "kernel's error", "PyTorch's error", f"kernel, {kernel}", "PyTorch"):
        table.add_column(column, justify="right")
    for number, layer in enumerate(layers, 1):
        table.add_row(
            str(number),
            f"{layer.kernel_error:.1e}",
            f"{layer.torch_error:.1e}",
            duration(layer.kernel_seconds),
            duration(layer.torch_seconds),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{max(layer.kernel_error for layer in layers):.1e}",
        f"{max(layer.torch_error for layer in layers):.1e}",
        duration(sum(layer.kernel_seconds for layer in layers)),
        duration(sum(layer.torch_seconds for layer in layers)),
    )
    console.print(table)


def hundredths(value: float) -> str:
    """A number with two digits after the point, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} µs"
