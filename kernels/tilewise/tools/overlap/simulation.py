"""How busy do its kernels keep Hopper's tensor cores? A prediction from the instructions of their main loops.

`overlap_machine` simulates one multiprocessor. Left out is what makes a GPU slower: the clock under a power
limit, most latencies, what the L2 cache as a whole can hand out, bank conflicts, the instructions of masks,
the uneven end of a grid. So a share is an upper bound, and its use is to compare one order of the same work
with another.

    python -m tilewise.tools.overlap                 # the tables in docs/hopper.md
    python -m tilewise.tools.overlap --svg docs      # its pictures
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..chips import Chip, find_chip
from .backward import KEYS, BackwardLoop, port_clocks
from .forward import ForwardLoop
from .machine import Counts, Machine
from .order import START

H200 = find_chip("H200")
# bf16, Triton 3.9.0: `tilewise inspect --arch sm_90 --mask full --kernel forward --kernel hopper --sass DIR`.
# Of Hopper's loops it is the full one of the warpgroup that has more instructions.
HOPPER = {
    64: ForwardLoop("hopper", 64, 128, Counts(438, 66, 68, 34, 66, 68, 32, 8)),
    128: ForwardLoop("hopper", 128, 128, Counts(494, 66, 68, 66, 66, 68, 32, 8)),
    256: ForwardLoop("hopper", 256, 64, Counts(457, 34, 36, 130, 34, 36, 16, 8)),
}
PORTABLE = {
    64: ForwardLoop("portable", 64, 128, Counts(510, 66, 68, 34, 66, 68, 32, 8)),
    128: ForwardLoop("portable", 128, 128, Counts(623, 66, 68, 66, 66, 68, 32, 8)),
    256: ForwardLoop("portable", 256, 32, Counts(432, 18, 20, 130, 18, 20, 8, 8)),
}


# The same of `harness.variants:hopper_backward_variants`, sm_90.
HOPPER_BACKWARD = {
    64: BackwardLoop(64, 128, Counts(808, 64, 64, 96, 128, 0, 64, 0), stores=16),
    128: BackwardLoop(128, 64, Counts(548, 32, 32, 48, 64, 0, 32, 0), stores=16),
}


def step_clocks(loop: ForwardLoop, chip: Chip = H200) -> float:
    """Clocks of the tensor cores that a step of all warpgroups takes."""
    return loop.warpgroups * 4 * 64 * loop.tile_kv * loop.dim / chip.matmul_flops


@functools.cache
def busy(loop: ForwardLoop, chip: Chip = H200) -> float:
    """Share of the time that the tensor cores work, in the middle of a long walk over keys."""
    begin, end = 4, 8  # one step is like another by then
    timeline = Machine(loop, end + 2, 1, chip).run().timeline
    starts = {work.step: work.begin for work in timeline if (work.role, work.name) == ("warpgroup 1", "S")}
    return (end - begin) * step_clocks(loop, chip) / (starts[end] - starts[begin])


@functools.cache
def tile_clocks(loop: ForwardLoop, steps: int, chip: Chip = H200) -> float:
    """Clocks that a tile of rows takes, where others come before and after it."""
    ends = Machine(loop, steps, 3, chip).run().ends
    return (ends[-1] - ends[loop.warpgroups - 1]) / 2


def busy_in_call(loop: ForwardLoop, length: int, is_causal: bool, chip: Chip = H200) -> float:
    """The share over a call on many heads, q_len = kv_len = length. Each tile of rows has a beginning and an
    end; what it computes beyond a causal mask counts for nothing."""
    rows, steps = 64 * loop.warpgroups, length // loop.tile_kv
    walks = [-(-rows * (i + 1) // loop.tile_kv) if is_causal else steps for i in range(length // rows)]
    first, a_step = tile_clocks(loop, 4, chip), (tile_clocks(loop, 8, chip) - tile_clocks(loop, 4, chip)) / 4
    clocks = sum(first + a_step * (walk - 4) for walk in walks)
    return step_clocks(loop, chip) * steps * len(walks) / (2 if is_causal else 1) / clocks


# ---- The backward


def backward_products(loop: BackwardLoop, chip: Chip = H200) -> float:
    """Clocks of the tensor cores that the five products of a step of all warpgroups take."""
    return loop.warpgroups * 5 * 2 * KEYS * loop.tile_q * loop.dim / chip.matmul_flops


@functools.cache
def backward_step(loop: BackwardLoop, chip: Chip = H200) -> float:
    """Clocks of a step in the middle of a long walk over rows: what the machine says, or those of the port of
    shared memory, whichever are more."""
    begin, end = 4, 10
    timeline = Machine(loop, end + 4, 1, chip).run().timeline
    starts = {work.step: work.begin for work in timeline if (work.role, work.name) == ("warpgroup 1", "S")}
    return max((starts[end] - starts[begin]) / (end - begin), port_clocks(loop, chip))


def backward_busy(loop: BackwardLoop, chip: Chip = H200) -> float:
    """Share of the time that the tensor cores work then."""
    return backward_products(loop, chip) / backward_step(loop, chip)


def backward_busy_in_call(loop: BackwardLoop, length: int, is_causal: bool, chip: Chip = H200) -> float:
    """The share over a call, q_len = kv_len = length: a program has a beginning (order.py), and what it
    computes beyond a causal mask counts for nothing."""
    keys, steps = KEYS * loop.warpgroups, length // loop.tile_q
    walks = [steps - (keys * i // loop.tile_q if is_causal else 0) for i in range(length // keys)]
    useful = steps * len(walks) / (2 if is_causal else 1)
    return backward_busy(loop, chip) * useful / sum(walk + START for walk in walks)


# ---- The tables

LENGTH, CLOCK_RATES = 16_384, (1.83e9, 1.6e9)  # that of the datasheet, and one under load
COLUMNS = (
    "head_dim",
    "tensor cores busy",
    "one warpgroup alone",
    "portable",
    "full, TFLOP/s",
    "causal, TFLOP/s",
)
BACKWARD_COLUMNS = ("head_dim", "tensor cores busy", "port of shared memory busy", *COLUMNS[-2:])


def table(chip: Chip = H200) -> list[str]:
    """The prediction of the forward in docs/hopper.md, a line a row."""
    rows = []
    for dim, loop in HOPPER.items():
        shares = [busy(each, chip) for each in (loop, replace(loop, warpgroups=1), PORTABLE[dim])]
        calls = [rates(busy_in_call(loop, LENGTH, is_causal, chip), chip) for is_causal in (False, True)]
        rows.append((str(dim), *(f"{share * 100:.0f} %" for share in shares), *calls))
    return in_lines(COLUMNS, rows)


def backward_table(chip: Chip = H200) -> list[str]:
    """That of the backward."""
    rows = []
    for dim, loop in HOPPER_BACKWARD.items():
        port = port_clocks(loop, chip) / backward_step(loop, chip)
        calls = [
            rates(backward_busy_in_call(loop, LENGTH, is_causal, chip), chip) for is_causal in (False, True)
        ]
        rows.append((str(dim), f"{backward_busy(loop, chip) * 100:.0f} %", f"{port * 100:.0f} %", *calls))
    return in_lines(BACKWARD_COLUMNS, rows)


def in_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *rows)]


def rates(share: float, chip: Chip) -> str:
    """TFLOP/s at each of CLOCK_RATES: "494 / 432"."""
    flops_a_clock = share * chip.matmul_flops * chip.multiprocessors
    return " / ".join(f"{flops_a_clock * clock / 1e12:.0f}" for clock in CLOCK_RATES)
