"""What the demo prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .measure import LayerReport

CLOSEST_SHOWN = 10
MOST_ALIKE = 3  # pairs, in words


def print_sentences(console: Console, sentences: list[str]) -> None:
    for number, sentence in enumerate(sentences, 1):
        console.print(Text.assemble((f"{number:4}  ", "bold"), sentence), overflow="ellipsis", no_wrap=True)


def print_similarities(
    console: Console, similarities: dict[str, Tensor], sentences: list[str], width: int
) -> None:
    """The three matrices, each row's closest other sentence in bold and the most alike pairs below; the
    closest pairs alone where those are too wide for the console. width: of an embedding, for the title."""
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
        print_most_alike(console, similarities["cosine"], sentences)
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
        print_most_alike(console, similarities[name], sentences)


def most_alike(matrix: Tensor) -> list[tuple[float, int, int]]:
    """All pairs of different sentences as (similarity, first, second), the most alike first."""
    n = matrix.shape[0]
    pairs = [(matrix[i, j].item(), i, j) for i in range(n) for j in range(i + 1, n)]
    return sorted(pairs, key=lambda pair: -pair[0])


def print_most_alike(console: Console, matrix: Tensor, sentences: list[str]) -> None:
    """The most alike pairs in the sentences' own words, cut where two do not fit into a line."""
    pairs = most_alike(matrix)[:MOST_ALIKE]
    for number, (value, i, j) in enumerate(pairs):
        beginning, end = ("most alike: " if number == 0 else " " * 12), f" ({hundredths(value)})"
        room = (console.width - len(beginning) - len("'' and ''") - len(end)) // 2
        first, second = Text(sentences[i]), Text(sentences[j])
        spare = max(0, room - first.cell_len), max(0, room - second.cell_len)  # the other one may have it
        first.truncate(room + spare[1], overflow="ellipsis")
        second.truncate(room + spare[0], overflow="ellipsis")
        console.print(Text.assemble(beginning, "'", first, "' and '", second, "'", end), no_wrap=True)
    if pairs:
        console.print()


def print_closest_pairs(console: Console, similarities: dict[str, Tensor]) -> None:
    """The pairs of sentences with the largest cosine, by number."""
    console.print("closest pairs (all are in similarity.csv)", style="italic")
    table = Table(box=SIMPLE_HEAD)
    for column in ("sentences", *similarities):
        table.add_column(column, justify="right")
    for _, i, j in most_alike(similarities["cosine"])[:CLOSEST_SHOWN]:
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
