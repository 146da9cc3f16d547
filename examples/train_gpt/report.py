"""What is printed and written at the end."""

from __future__ import annotations

import csv
import statistics
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .compare import Comparison
from .training import Run

ROWS = 10


def print_losses(console: Console, runs: dict[str, Run]) -> None:
    """Losses of about ten steps, and those on the tail."""
    shown = {variant: run for variant, run in runs.items() if variant != "control"}
    steps = len(next(iter(shown.values())).losses)
    table = Table(box=SIMPLE_HEAD)
    for column in ("step", *shown, *(["gap"] if len(shown) == 2 else [])):
        table.add_column(column, justify="right")

    def add(name: str, losses: list[float]) -> None:
        gap = [f"{abs(losses[0] - losses[1]):.1e}"] if len(losses) == 2 else []
        table.add_row(name, *(f"{loss:.4f}" for loss in losses), *gap)

    for step in sorted({round(i * (steps - 1) / ROWS) for i in range(ROWS + 1)}):
        add(str(step), [run.losses[step] for run in shown.values()])
    table.add_section()
    for step in next(iter(shown.values())).validation:
        add(f"held-out tail after {step}", [run.validation[step] for run in shown.values()])
    table.add_section()
    times = [f"{1e3 * statistics.median(run.seconds):.1f} ms" for run in shown.values()]
    table.add_row("median time of a step", *times)
    console.print("loss, in nats a character", style="italic")
    console.print(table)


def describe(comparison: Comparison, tested: str, trusted: str) -> str:
    """The outcome of a comparison in a sentence."""
    verdict = "agree" if comparison.agrees else "DO NOT AGREE"
    return (
        f"{tested} and {trusted} {verdict}: over the first {comparison.count} steps the largest gap of their "
        f"losses is {comparison.gap:.1e}, at step {comparison.step}; allowed is {comparison.allowed:.1e}"
    )


def write_losses(path: Path, runs: dict[str, Run]) -> None:
    """A CSV file with a row a step, in all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *runs])
        columns = (map(repr, run.losses) for run in runs.values())
        writer.writerows([step, *row] for step, row in enumerate(zip_longest(*columns, fillvalue="")))
