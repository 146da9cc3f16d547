"""What does the static model say of a call that was timed? A line beside what was measured.

`model.json` holds what `tilewise.tools.rank --shipped` found out about the shipped tiles, compiled without a
GPU: clocks of a step, and what limits it. Here they become TFLOP/s of a call, by arithmetic alone. The rates
are those of the H100's and H200's datasheets (SXM, 1.83 GHz), which a GPU under load does not reach.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from tilewise.kernels.tile import Pass, tile_from
from tilewise.tools.rank.call_model import Overlap, Step, TileModel, call_seconds
from tilewise.tools.rank.rank import CHIP, read_rows
from tilewise_reference import Case, paper_grid

from ..results import Row
from .ranking import HOPPER, PORTABLE, counts

MODEL = Path(__file__).parents[1] / "model.json"


class Kernel(NamedTuple):
    """The shipped tile of a pass as compiled: what the model says, and what a thread has."""

    model: TileModel
    registers: int
    spill_bytes: int


@functools.cache
def kernels() -> dict[tuple[Pass, int, str], Kernel]:
    """All of `model.json`, by pass, dimension and mask."""
    return {(row["pass"], row["dim"], row["mask"]): kernel_of(row) for row in read_rows(MODEL)}


def kernel_of(row: dict[str, Any]) -> Kernel:
    full, cut = (Step(**row[name]) for name in ("full", "cut"))
    model = TileModel(
        row["pass"],
        row["dim"],
        tile_from(row["pass"], row),
        row["programs"],
        row["start"],
        full,
        cut,
        row["limit"],
    )
    return Kernel(model, row["registers"], row["spill_bytes"])


@functools.cache
def grid() -> dict[str, Case]:
    return {case.name: case for case in paper_grid(dtype="bfloat16")}


def kernels_behind(row: Row) -> list[Kernel]:
    """Those that a row of the papers' grid runs, one after another; none where it is of something else."""
    case = grid().get(row.case)
    if case is None or row.implementation not in (PORTABLE, HOPPER):
        return []
    if row.work == "forward":
        passes: tuple[Pass, ...] = ("hopper",) if row.implementation == HOPPER else ("forward",)
    elif row.work == "backward":  # Hopper's forward has the portable backward
        passes = ("dkv", "dq")
    else:
        return []
    mask = "causal" if "causal" in case.features else "full"
    return [kernels()[work, case.head_dim, mask] for work in passes]


def words(row: Row) -> str:
    """The model's words on a timed row of the papers' grid; empty for any other row.

    "measured 410 TFLOP/s; the model allows 560 if softmax and matmul do not overlap, 980 if they do, and
    expects 600; limit: matmul; 255 registers, no spill". The kernel that prepares the backward is left out.
    """
    behind = kernels_behind(row)
    if not behind or not counts(row) or not row.median:
        return ""
    apart, together, expected = (rate(row, behind, how) for how in ("none", "full", "expected"))
    return "; ".join(
        [
            f"measured {teraflops(row.flops / row.median)} TFLOP/s",
            f"the model allows {teraflops(apart)} if softmax and matmul do not overlap, "
            f"{teraflops(together)} if they do, and expects {teraflops(expected)}",
            "limit: " + ", ".join(named(kernel, behind, kernel.model.limit) for kernel in behind),
            ", ".join(named(kernel, behind, takes(kernel)) for kernel in behind),
        ]
    )


def rate(row: Row, behind: list[Kernel], how: Overlap) -> float:
    """FLOP/s of these kernels on the row's case by the model."""
    case = grid()[row.case]
    return row.flops / sum(call_seconds(kernel.model, case, CHIP, how) for kernel in behind)


def teraflops(flops: float) -> str:
    return f"{flops / 1e12:.0f}"


def named(kernel: Kernel, behind: list[Kernel], what: str) -> str:
    """With the kernel's name where there are several."""
    return f"{kernel.model.work} {what}" if len(behind) > 1 else what


def takes(kernel: Kernel) -> str:
    spill = f"{kernel.spill_bytes} bytes spilled" if kernel.spill_bytes else "no spill"
    return f"{kernel.registers} registers, {spill}"
