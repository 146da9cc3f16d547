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
    "tilewise": dict(color="#E8480C", linewidth=2.5, linestyle="-"),
    "sdpa": dict(color="#0072B2", linewidth=1.2, linestyle="--"),
}
CONTROL = "#777777"


def draw_losses(path: Path, runs: dict[str, Run], bigram: float, comparison: Comparison | None) -> None:
    """Write a PNG or SVG file, whichever the name ends in. Below the losses: their gap, if there are two."""
    rows = 1 if comparison is None else 2
    with matplotlib.rc_context({"svg.hashsalt": "tilewise"}):  # the same run draws the same file
        figure = Figure(figsize=(8, 3.7 * rows), layout="constrained")
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
    """|tilewise − sdpa| and |control − sdpa|, step by step. The axis is logarithmic down to one rounding of
    the loss, and straight from there to 0, where losses that are equal have their marks."""
    marks = {
        "tilewise": dict(color=STYLES["tilewise"]["color"], marker=".", markersize=5, zorder=3),
        "control": dict(color=CONTROL, marker="o", markersize=7, markerfacecolor="none"),
    }
    labels = {
        "control": "control and sdpa (the control is sdpa with every result moved by up to one rounding)"
    }
    highest = comparison.allowed
    for variant, mark in marks.items():
        gaps = gaps_between(runs[variant].losses, runs["sdpa"].losses)
        label = labels.get(variant, f"{variant} and sdpa")
        axes.plot(gaps, linestyle="none", label=label, **mark)
        highest = max(highest, *gaps)
    axes.plot(
        [-0.5, comparison.count - 0.5],
        [comparison.allowed] * 2,
        color="black",
        label=f"allowed over the first {comparison.count} steps",
    )
    least = comparison.rounding
    decades = range(math.ceil(math.log10(least)), math.ceil(math.log10(highest)) + 1)
    axes.set_yscale("symlog", linthresh=least, linscale=0.7)
    axes.set_yticks([0.0, *(10.0**decade for decade in decades)])
    axes.minorticks_off()
    axes.set_ylim(-0.3 * least, 2 * highest)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_ylabel("distance (nats)")
    axes.set_title(f"How far apart the losses are (logarithmic above {least:.0e}, one rounding)", loc="left")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
