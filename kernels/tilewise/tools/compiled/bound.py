"""How fast can a main loop be at best? Occupancy and clocks from counts and a datasheet: an estimate.

Nothing here is measured, and everything is optimistic: no bank conflicts, no latency, every unit at its
datasheet's rate. What Blackwell's matmuls read from shared memory is not counted: their opcodes do not say.
So the shares are limits that a GPU stays below, not predictions.

Where warps have roles, a step is one of every team, for all share the units; what the producer's warp issues
is not counted (it is one warp of nine or thirteen, and computes nothing).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..chips import Chip
from .main_loop import MainLoop

# Programs at most on a multiprocessor (CUDA programming guide, "compute capabilities"); 32 where not listed.
PROGRAMS = {"sm_75": 16, "sm_86": 16, "sm_87": 16, "sm_89": 24, "sm_120": 24, "sm_121": 24}
TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell multiprocessor


@dataclass(frozen=True)
class Occupancy:
    """How many programs run at once on a multiprocessor, and what keeps out the next."""

    programs: int
    limit: str  # "registers", "shared memory", "threads", "programs" or "tensor memory"
    threads: float  # share of the threads that a multiprocessor can hold


def occupancy(chip: Chip, warps: int, registers: int, shared_bytes: int, tensor_memory: int = 0) -> Occupancy:
    """For programs of `warps` warps, `registers` a thread, and shared_bytes and tensor_memory (columns) a
    program; 0 programs where one alone is too much."""
    amd = chip.arch.startswith("gfx")
    # Registers are handed out by the warp, in pieces of 8 a thread, and each scheduler has a quarter of them.
    pieces = -(-max(registers, 1) // 8) * 8
    resident = chip.registers // 4 // (pieces * chip.warp) * 4
    # NVIDIA keeps 1 KiB for itself in each program's shared memory, and hands out pieces of 128 bytes.
    piece, reserved = (512, 0) if amd else (128, 1024)
    shared = -(-(shared_bytes + reserved) // piece) * piece
    limits = {
        "registers": resident // warps,
        "shared memory": chip.shared_bytes // shared if shared else chip.threads,
        "threads": chip.threads // (warps * chip.warp),
        "programs": PROGRAMS.get(chip.arch, 32),
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    programs = limits[limit]
    return Occupancy(programs, limit, programs * warps * chip.warp / chip.threads)


@dataclass(frozen=True)
class Bound:
    """Clocks that a tile step of one program, of all its teams, keeps each unit of a multiprocessor busy, and
    what follows."""

    matmul: float
    exponentials: float  # the special function unit: other functions of it included
    other: float  # issue slots (or fp32 lanes, where those are fewer) of all that is neither of these
    issue: float  # issue slots of everything
    shared: float  # the port of shared memory; 0, unknown, where the products are IEEE fp32
    limit: str  # the unit that is busy longest
    apart: float  # share of the chip's matmul rate if matmul, exponentials and the rest take turns
    together: float  # the same if all units work all the time


def bound(loop: MainLoop, chip: Chip, element_bytes: int) -> Bound:
    """The limits of a loop on a chip, for inputs of `element_bytes`, all teams being in loops like it."""
    rate = chip.matmul_flops_of(element_bytes, loop.matmuls > 0 and chip.warp == 32)
    matmul = loop.teams * loop.matmul_flops / rate
    lanes = loop.teams * loop.warps * chip.warp
    special = loop.exponentials + loop.special
    # On NVIDIA four schedulers issue a warp's instruction each clock; on AMD four units of 16 lanes take four
    # clocks for the 64 of theirs.
    slots = chip.warp * 4 if chip.warp == 32 else 64
    useful_flops = loop.teams * loop.tile_flops
    multiplied = loop.matmuls or useful_flops // (2 * lanes)  # in IEEE fp32 the products are FFMAs
    rest = loop.issued - special - multiplied
    # Threads that multiply fp32 read the same numbers, which cross the port once: how often, no opcode says.
    shared_bytes = loop.teams * loop.shared_bytes if loop.matmuls else 0
    fp32 = loop.float32 - (0 if loop.matmuls else multiplied)
    fp32_lanes = min(slots, chip.float32_flops // 2)
    clocks = {
        "matmul": matmul,
        "exponentials": special * lanes / chip.exponentials,
        "issue": max(loop.issued * lanes / slots, loop.float32 * lanes / fp32_lanes),
        "shared memory": shared_bytes / chip.shared_bytes_a_clock,
    }
    other = max(rest * lanes / slots, fp32 * lanes / fp32_lanes)
    useful = useful_flops / rate
    in_turn = max(matmul, clocks["shared memory"]) + clocks["exponentials"] + other
    limit = max(clocks, key=lambda name: clocks[name])
    return Bound(
        matmul=matmul,
        exponentials=clocks["exponentials"],
        other=other,
        issue=clocks["issue"],
        shared=clocks["shared memory"],
        limit=limit,
        apart=useful / in_turn,
        together=useful / clocks[limit],
    )
