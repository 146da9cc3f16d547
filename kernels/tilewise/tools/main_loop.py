"""What does a step of a kernel's main loop do? Instructions by kind, FLOPs and bytes, from machine code.

The main loops are the innermost loops that multiply matrices; where a kernel has no instruction for that
(IEEE fp32 on NVIDIA), the innermost loops that take exponentials. Counts are a thread's, each instruction
counted once though it may stand in a branch; FLOPs and bytes are a program's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .machine_code import Instruction, natural_loops


@dataclass(frozen=True)
class MainLoop:
    """One of the loops over tiles. A kernel of tilewise has two: "full", over the tiles in which every pair
    counts, and "cut", over those that need masking."""

    name: str
    instructions: int
    issued: int  # of these, those that wait for a slot of the vector units: on NVIDIA all
    matmuls: int
    matmul_flops: int  # what the matmul instructions compute, padding and repetition included
    tile_flops: int  # what the products of one tile step need
    exponentials: int
    special: int  # other instructions of the special function unit: reciprocals, logarithms, tanh
    float32: int  # additions, multiplications, comparisons and selections of fp32
    shared_loads: int
    shared_stores: int
    shared_bytes: int  # to and from shared memory, each thread's counted, and operands of Hopper's matmuls
    spills: int  # loads and stores of a thread's stack
    waits: int  # barriers, and waits for matmuls and copies


# The kind of an instruction is the first whose pattern its opcode starts with. HFMA2.MMA multiplies no
# matrices, in spite of its name.
KINDS = {
    "matmul": r"[A-Z]+MMA(\.|$)|v_s?mfma",
    "exponential": r"MUFU\.EX2|v_exp_f32",
    "special": r"MUFU|v_(rcp|rsq|log|sqrt|sin|cos|tanh)_",
    "float32": r"F(FMA2?|MUL2?|ADD2?|MNMX3?|SEL|SETP)(\.|$)"
    r"|v_(pk_)?((add|sub|mul|fma|fmac|max3?|min3?|cmp_\w+)_f32|cndmask_b32)",
    "shared load": r"LDSM?(\.|$)|ds_(read|load|bpermute)",
    "shared store": r"(STSM?|LDGSTS)(\.|$)|ds_(write|store)",
    "spill": r"(LDL|STL)(\.|$)|scratch_",
    "wait": r"(BAR|DEPBAR|SYNCS|WARPGROUP\.DEPBAR)(\.|$)|s_barrier|s_waitcnt",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def kind_of(opcode: str) -> str:
    """What an instruction counts as: a key of KINDS, or ""."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(opcode)), "")


def matmul_flops(opcode: str) -> tuple[int, int] | None:
    """FLOPs of one matmul instruction, and how many warps execute it together, from the shape in the opcode;
    None where it does not say: Blackwell's have their shape in a register."""
    if hopper := re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, hopper.groups())
        return 2 * m * n * k, 4
    if ampere := re.match(r"[A-Z]MMA\.(?:SP\.)?(16)(8)(\d+)(?:\.|$)", opcode):
        m, n, k = map(int, ampere.groups())
        return 2 * m * n * k, 1
    if amd := re.match(r"v_mfma_\w*?_?(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_", opcode):
        m, n, k = map(int, amd.groups()[:3])
        return 2 * m * n * k * int(amd[4] or 1), 1
    return None


def operand_bytes(instruction: Instruction) -> int:
    """What a warpgroup's matmul reads from shared memory: B, and A where a descriptor names it too. It is
    `HGMMA… R24, gdesc[UR20], R24` with A in shared memory, `HGMMA… R88, R176, gdesc[UR16], R88` without."""
    shape = re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x", instruction.opcode)
    if shape is None:
        return 0
    m, n = map(int, shape.groups())
    a_in_registers = re.match(r"\w+, R\w+, ", instruction.operands) is not None
    return 32 * (n if a_in_registers else m + n)  # K times the element is 32 bytes in every dtype


def shared_bytes(opcode: str) -> int:
    """What a thread moves between registers, or global memory, and shared memory with an instruction."""
    if matrices := re.match(r"(?:LDSM|STSM)\.16\.MT?88(?:\.([24]))?", opcode):
        return 4 * int(matrices[1] or 1)  # 8 x 8 numbers of 16 bits are 128 bytes a warp
    if re.match(r"(LDS|STS|LDGSTS)(\.|$)", opcode):
        width = re.search(r"\.[US]?(8|16|64|128)(\.|$)", opcode)
        return int(width[1]) // 8 if width else 4
    if amd := re.match(r"ds_[a-z]+(2?)(?:st64)?_[a-z]+(\d+)", opcode):
        return int(amd[2]) // 8 * (2 if amd[1] else 1)
    return 0


def main_loops(
    instructions: Sequence[Instruction], warps: int, warp: int, tile_flops: int | None = None
) -> list[MainLoop]:
    """The main loops of a kernel whose programs have `warps` warps of `warp` threads, in the program's order.

    tile_flops: what the products of a tile step need; without it, what the matmul instructions compute.
    """
    loops = [[instructions[place] for place in loop] for loop in _innermost(instructions)]
    names = ["full", "cut"] if len(loops) == 2 else [str(n) for n in range(1, len(loops) + 1)]
    return [_count(name, loop, warps, warp, tile_flops) for name, loop in zip(names, loops, strict=True)]


def _innermost(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The loops that multiply, or else take exponentials, and hold no other loop that does."""
    loops = natural_loops(instructions)
    for kind in ("matmul", "exponential"):
        holding = [loop for loop in loops if any(kind_of(instructions[i].opcode) == kind for i in loop)]
        if holding:
            return [a for a in holding if not any(set(b) < set(a) for b in holding)]
    return []


def _count(name: str, loop: Sequence[Instruction], warps: int, warp: int, tile_flops: int | None) -> MainLoop:
    done = [instruction for instruction in loop if not instruction.skipped]
    kinds = Counter(kind_of(instruction.opcode) for instruction in done)
    shapes = [matmul_flops(each.opcode) for each in done if kind_of(each.opcode) == "matmul"]
    flops = sum(shape[0] * warps // shape[1] for shape in shapes if shape is not None)
    if tile_flops is not None and (not shapes or None in shapes):
        flops = tile_flops
    moved = warp * warps * sum(shared_bytes(each.opcode) for each in done)
    return MainLoop(
        name=name,
        instructions=len(loop),
        issued=sum(each.opcode[0].isupper() or each.opcode.startswith("v_") for each in loop),
        matmuls=kinds["matmul"],
        matmul_flops=flops,
        tile_flops=flops if tile_flops is None else tile_flops,
        exponentials=kinds["exponential"],
        special=kinds["special"],
        float32=kinds["float32"],
        shared_loads=kinds["shared load"],
        shared_stores=kinds["shared store"],
        shared_bytes=moved + warps // 4 * sum(map(operand_bytes, done)),
        spills=kinds["spill"],
        waits=kinds["wait"],
    )
