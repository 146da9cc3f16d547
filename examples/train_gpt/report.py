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
    sdpa = "; sdpa is PyTorch's scaled_dot_product_attention" if "sdpa" in shown else ""
    console.print(f"loss, in nats a character{sdpa}", style="italic")
    console.print(table)


def describe(comparison: Comparison, tested: str, trusted: str) -> str:
    """The outcome of a comparison in a sentence."""
    verdict = "agree" if comparison.agrees else "DO NOT AGREE"
    return (
        f"{tested} and {trusted} {verdict}: over the first {comparison.count} steps their losses are at most "
        f"{comparison.gap:.1e} apart, at step {comparison.step}; allowed is {comparison.allowed:.1e}"
    )


def explain_allowed(comparison: Comparison) -> str:
    """Where the allowed distance comes from, for somebody who has not heard of the control."""
    return (
        "why that much is allowed: a third model, the control, trained with PyTorch's own attention too, but "
        "with every result moved at random by up to one rounding. It is as right as PyTorch's, yet its "
        f"losses came to be {comparison.control_gap:.1e} from sdpa's: so far can two right runs drift apart "
        f"by rounding alone. Allowed is {comparison.factor:g} times that, or {comparison.factor:g} times one "
        f"rounding of the loss ({comparison.rounding:.1e}) where that is more"
    )


def write_losses(path: Path, runs: dict[str, Run]) -> None:
    """A CSV file with a row a step, in all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *runs])
        columns = (map(repr, run.losses) for run in runs.values())
        writer.writerows([step, *row] for step, row in enumerate(zip_longest(*columns, fillvalue="")))
