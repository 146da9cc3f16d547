"""How long does a call of the papers' grid take with a tile? From compiled loops and a datasheet: a model.

No GPU has confirmed it. It adds to `bound`, which looks at one loop, what else tells tiles apart:

- programs of one multiprocessor run under one another: where P of them fit, a step takes as long as the
  busiest unit, or a P-th of what it takes alone, whichever is longer
- a step is a chain of results, each of which somebody waits for: the more steps, the more waits
- a step waits for its copies: with one stage for all of a copy, with more only where it is over before they
  are; and the L2 cache hands out so many bytes a clock to all
- steps that a mask cuts cost more, and a tile that crosses the diagonal computes what counts for nothing
- programs that add to dQ in turns start one behind the other, once, and each step asks for a turn
- programs start, and the last of them leave multiprocessors idle: they are dealt out one by one

Of Hopper's forward a step is what `overlap_machine` says, as its warpgroups exist to run under one another,
which counts cannot show. Neither sees bank conflicts, the power limit, nor what `has_turns` and a third stage
are for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tilewise_reference import Case

from ...kernels.tile import HopperTile, Pass, Tile
from ...parts.sequences import HEADS_TOGETHER
from ..chips import Chip
from ..compiled.bound import Bound, bound, occupancy
from ..compiled.compiler import Compiled
from ..compiled.main_loop import MainLoop
from ..overlap.forward import ForwardLoop
from ..overlap.machine import Counts
from ..overlap.simulation import tile_clocks

# Bytes a clock to all multiprocessors (NVIDIA A100 whitepaper; for Hopper no rate is published).
L2_BYTES = 5120
LATENCY = 500  # clocks from asking for a tile to having it: an assumption
WAIT = ForwardLoop.latency  # clocks from a result to whoever waits for it: an assumption
# Waits of a step besides those that are instructions of their own: rounds of the softmax, exponentials.
CHAIN: dict[Pass, int] = {"forward": 6, "dkv": 2, "dq": 2, "dqkv": 3}
TURN = 2 * LATENCY  # clocks of a step that are spent on turns: one is asked for, and one passed on
OWN_KEYS: tuple[Pass, ...] = ("dkv", "dqkv")
HEADS_BYTES = 24 << 20  # of keys and values that Hopper's programs walk over together (hopper/launch.py)

Overlap = Literal["none", "expected", "full"]


@dataclass(frozen=True)
class Step:
    """Clocks that a step of one program takes of its multiprocessor."""

    none: float  # where matmul, exponentials and the rest take turns
    expected: float  # by the rules above
    full: float  # where all units work all the time


@dataclass(frozen=True)
class TileModel:
    """A tile of a pass on a chip."""

    work: Pass
    dim: int
    tile: Tile
    programs: int  # that a multiprocessor holds at once
    start: float  # clocks that a program takes of it besides its steps
    full: Step  # over tiles in which every pair counts
    cut: Step  # over those that a mask cuts
    limit: str  # the unit that is busy longest in a full step


def model_of(compiled: Compiled, work: Pass, dim: int, tile: Tile, chip: Chip) -> TileModel:
    """What a compiled kernel of 16-bit inputs means for calls. Raises ValueError where its loops are not the
    two of a pass, or a multiprocessor holds no program."""
    held = occupancy(chip, compiled.warps, compiled.registers, compiled.shared_bytes).programs
    if held == 0:
        raise ValueError("a multiprocessor holds no program")
    full, cut = (slowest(compiled, name, chip) for name in ("full", "cut"))
    own, walked = rows_of(work, tile)
    wire = L2_BYTES / chip.multiprocessors
    step_bytes, own_bytes = 4 * walked * dim, 4 * own * dim
    if work == "dqkv":  # what is added to dQ in fp32
        step_bytes += 4 * walked * dim
    least = step_bytes / wire
    if isinstance(tile, HopperTile):
        first, a_step = hopper_clocks(full[0], dim, tile, chip)
        extra = cut[1].issue - full[1].issue
        steps = [max(least, busiest(full[1]), a_step), max(least, busiest(cut[1]), a_step + extra)]
        start = first
    else:
        copy = LATENCY + least
        steps = [
            max(least, busiest(b), with_copies(alone(work, loop, b), copy, tile.num_stages) / held)
            for loop, b in (full, cut)
        ]
        start = (2 * LATENCY + own_bytes / wire) / held
    whole, masked = (
        Step(in_turns(b), each, busiest(b)) for (_, b), each in zip((full, cut), steps, strict=True)
    )
    return TileModel(work, dim, tile, held, start, whole, masked, full[1].limit)


def slowest(compiled: Compiled, name: str, chip: Chip) -> tuple[MainLoop, Bound]:
    """The loop of this name, of several teams' the one that issues most, and its limits."""
    loops = [loop for loop in compiled.loops if loop.name.split()[0] == name]
    if not loops:
        raise ValueError(f"it has no loop {name!r} but {', '.join(loop.name for loop in compiled.loops)}")
    loop = max(loops, key=lambda loop: loop.issued)
    return loop, bound(loop, chip, 2)


def busiest(b: Bound) -> float:
    return max(b.matmul, b.exponentials, b.issue, b.shared)


def in_turns(b: Bound) -> float:
    return max(b.matmul, b.shared) + b.exponentials + b.other


def alone(work: Pass, loop: MainLoop, b: Bound) -> float:
    """A step of a program that is alone: units take turns, except that what stands where matmuls are under
    way runs under them, by the share of the exponentials that do; and the waits in between."""
    share = loop.overlapped / loop.exponentials if loop.exponentials else 0.0
    hidden = min(max(b.matmul, b.shared), share * (b.exponentials + b.other))
    turn = TURN if work == "dqkv" else 0
    return in_turns(b) - hidden + WAIT * (loop.waits + CHAIN[work]) + turn


def with_copies(clocks: float, copy: float, stages: int) -> float:
    """A step and what it waits for: `stages` - 1 copies are under way while it computes."""
    return clocks + copy if stages == 1 else max(clocks, copy / (stages - 1))


def hopper_clocks(loop: MainLoop, dim: int, tile: HopperTile, chip: Chip) -> tuple[float, float]:
    """Of Hopper's forward, clocks that a tile of rows takes besides its steps, and those of a step. A thread
    holds tile_kv / 2 scores of a row and dim / 2 numbers of O; what is done to them, `issued` includes."""
    scores, sums = tile.tile_kv // 2, dim // 2
    counts = Counts(
        issued=loop.issued, EX2=loop.exponentials, FFMA=scores + 4, FMUL=sums + 2, FADD=scores + 2,
        FMNMX=scores + 4, F2FP=scores // 2, SHFL=8,
    )  # fmt: skip
    order = ForwardLoop("hopper", dim, tile.tile_kv, counts, tile.warpgroups, tile.has_turns, tile.num_stages)
    four, eight = tile_clocks(order, 4, chip), tile_clocks(order, 8, chip)
    a_step = (eight - four) / 4
    return four - 4 * a_step, a_step


def rows_of(work: Pass, tile: Tile) -> tuple[int, int]:
    """The rows that a program owns, of queries, or in dkv and dqkv of keys; and those that it walks over in a
    step."""
    return (tile.tile_kv, tile.tile_q) if work in OWN_KEYS else (tile.tile_q, tile.tile_kv)


def steps_of(work: Pass, tile: Tile, length: int, is_causal: bool) -> list[tuple[int, int]]:
    """The full and the cut steps of each program of a head, in the order in which they start; `length` is a
    multiple of both sizes of the tile, or one tile."""
    own, walked = rows_of(work, tile)
    all_steps = -(-length // walked)
    if not is_causal:
        return [(all_steps, 0)] * -(-length // own)
    found = []
    for first in range(0, length, own):
        if work in OWN_KEYS:  # queries from the first key on; full where the first sees the last key
            begin, whole = first // walked, -(-(first + own - 1) // walked)
            steps, full = all_steps - begin, max(0, all_steps - whole)
        else:  # keys up to the last query; full where the first query sees the last of them
            steps = min(all_steps, -(-(first + own) // walked))
            full = min(steps, (first + 1) // walked)
        found.append((full, steps - full))
    return found if work in OWN_KEYS else found[::-1]


def call_clocks(model: TileModel, case: Case, chip: Chip, overlap: Overlap = "expected") -> float:
    """Clocks of a case of the papers' grid."""
    full, cut = getattr(model.full, overlap), getattr(model.cut, overlap)
    steps = steps_of(model.work, model.tile, case.q_len, "causal" in case.features)
    a_head = [model.start + full * f + cut * c for f, c in steps]
    heads = case.batch * case.q_heads
    if model.work == "hopper":
        together = max(1, HEADS_BYTES // (4 * case.kv_len * case.head_dim))
        return dealt_in_order(numbered(a_head, heads, together), chip.multiprocessors)
    if model.work == "dqkv":
        ends = in_order(model, steps, heads, full, cut, model.programs * chip.multiprocessors)
        return ends + finish_seconds(case, chip) * chip.clock
    together = HEADS_TOGETHER.value if model.work in OWN_KEYS else 1
    shared = (model.programs * clocks for clocks in numbered(a_head, heads, together))
    return dealt_to_the_first_free(shared, model.programs * chip.multiprocessors)


def call_seconds(model: TileModel, case: Case, chip: Chip, overlap: Overlap = "expected") -> float:
    return call_clocks(model, case, chip, overlap) / chip.clock


def numbered(a_head: list[float], heads: int, together: int) -> Iterable[float]:
    """The programs in the order of their numbers: of the heads that are taken together all first ones (of
    rows the last tiles), then all second ones, and so on."""
    for first in range(0, heads, together):
        for clocks in a_head:
            yield from [clocks] * min(together, heads - first)


def in_order(
    model: TileModel, steps: list[tuple[int, int]], heads: int, full: float, cut: float, places: int
) -> float:
    """When the last program of a backward in one walk ends: in each tile of rows, from the last to the first,
    it adds after the one before it has, which passes its turn on a step later."""
    free = [0.0] * places
    for first in range(0, heads, HEADS_TOGETHER.value):
        group = range(min(HEADS_TOGETHER.value, heads - first))
        # When the program before could pass on each tile of rows, from the last, by head.
        before: list[list[float]] = [[] for _ in group]
        for whole, masked in steps:
            for head in group:
                now, passed = free[0] + model.programs * model.start, []
                for step in range(whole + masked):
                    now += model.programs * (full if step < whole else cut)
                    now = max(now, before[head][step]) if step < len(before[head]) else now
                    passed.append(now)
                before[head] = [*passed[1:], now]
                heapq.heapreplace(free, now)
    return max(free)


def finish_seconds(case: Case, chip: Chip) -> float:
    """For dQ's sums, by the memory alone: zeros are written, sums read, q read and dQ written."""
    return case.batch * case.q_heads * case.q_len * case.head_dim * (4 + 4 + 2 + 2) / chip.memory_bytes


def dealt_in_order(work: Iterable[float], programs: int) -> float:
    """When the last program ends, if program i takes pieces i, i + n, i + 2n, ..."""
    ends = [0.0] * programs
    for number, clocks in enumerate(work):
        ends[number % programs] += clocks
    return max(ends)


def dealt_to_the_first_free(work: Iterable[float], places: int) -> float:
    """When the last ends, if each piece goes to the place that is free first."""
    free = [0.0] * places
    for clocks in work:
        heapq.heapreplace(free, free[0] + clocks)
    return max(free)
