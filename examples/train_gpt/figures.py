"""The picture: both loss curves, and the gap between them."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare import Comparison, gaps_between
from .training import Run

# Told apart in grey and without colour vision; the second is dashed and drawn over the first.
STYLES = {
    "tilewise": dict(color="#0072b2", linewidth=2.5, linestyle="-"),
    "sdpa": dict(color="#e69f00", linewidth=1.2, linestyle="--"),
}
CONTROL = "#777777"


def draw_losses(path: Path, runs: dict[str, Run], bigram: float, comparison: Comparison | None) -> None:
    """Write a PNG or SVG file, whichever the name ends in. Below the losses: their gap, if there are two."""
    rows = 1 if comparison is None else 2
    with matplotlib.rc_context({"svg.hashsalt": "tilewise"}):  # the same run draws the same file
        figure = Figure(figsize=(8, 3.5 * rows), layout="constrained")
        axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
        draw_curves(axes[0], runs, bigram)
        if comparison is not None:
            draw_gap(axes[1], runs, comparison)
        axes[-1].set_xlabel("step")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def draw_curves(axes: Axes, runs: dict[str, Run], bigram: float) -> None:
    for variant, style in STYLES.items():
        if variant in runs:
            run = runs[variant]
            axes.plot(run.losses, label=f"{variant}: training batches", alpha=0.8, **style)
            marks = dict(marker="o" if variant == "tilewise" else "x", markersize=7, linestyle="none")
            steps, losses = list(run.validation), list(run.validation.values())
            axes.plot(steps, losses, label=f"{variant}: held-out tail", color=style["color"], **marks)
    axes.axhline(bigram, color=CONTROL, linestyle=":", label="bigram counts: held-out tail")
    axes.set_ylabel("loss (nats a character)")
    axes.set_title("A character-level GPT in training", loc="left")
    axes.legend(fontsize="small")


def draw_gap(axes: Axes, runs: dict[str, Run], comparison: Comparison) -> None:
    """|tilewise − sdpa|, step by step, on a logarithmic axis; equal losses have no point there."""
    trusted = runs["sdpa"].losses
    for variant, color, marker in (("tilewise", "#0072b2", "."), ("control", CONTROL, "x")):
        gaps = [gap or math.nan for gap in gaps_between(runs[variant].losses, trusted)]
        axes.plot(gaps, marker, color=color, markersize=4, label=f"|{variant} − sdpa|")
    axes.plot(
        [-0.5, comparison.count - 0.5],
        [comparison.allowed] * 2,
        color="black",
        label="allowed gap of the first steps",
    )
    axes.set_yscale("log")
    axes.set_ylabel("gap of the loss (nats)")
    axes.set_title("How far apart they are", loc="left")
    axes.legend(fontsize="small")
