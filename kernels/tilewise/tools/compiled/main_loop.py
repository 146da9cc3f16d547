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

from .machine_code import Flow, Instruction


@dataclass(frozen=True)
class MainLoop:
    """One of the loops over tiles. A kernel of tilewise has two: "full", over the tiles in which every pair
    counts, and "cut", over those that need masking. Where warps have roles, each team has two: "full 1"."""

    name: str
    warps: int  # that run it together: a team's
    teams: int  # that have such loops
    instructions: int
    issued: int  # of these, those that wait for a slot of the vector units: on NVIDIA all
    matmuls: int
    register_matmuls: int  # of these on Hopper, those that have their left operand in registers
    matmul_flops: int  # what the matmul instructions compute, padding and repetition included
    tile_flops: int  # what the products of one tile step need
    exponentials: int
    overlapped: int  # of these on Hopper, those that run while matmuls of the same warps are under way
    special: int  # other instructions of the special function unit: reciprocals, logarithms, tanh
    float32: int  # additions, multiplications, comparisons and selections of fp32
    shared_loads: int
    shared_stores: int
    shared_bytes: int  # to and from shared memory: threads', operands of Hopper's matmuls, a copy engine's
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
    rows = n if a_in_registers(instruction) else m + n
    return 32 * rows  # K times the element is 32 bytes in every dtype


def a_in_registers(instruction: Instruction) -> bool:
    """Whether a warpgroup's matmul has its left operand in registers."""
    is_hopper = re.match(r"[A-Z]GMMA\.", instruction.opcode) is not None
    return is_hopper and re.match(r"\w+, R\w+, ", instruction.operands) is not None


def overlapped(loop: Sequence[Instruction]) -> int:
    """Exponentials that stand where matmuls of the same warps are under way: after the last of a group, which
    names gsb0, and before the wait for it, a WARPGROUP.DEPBAR, which says how many groups it leaves. What one
    step leaves, the next begins with: hence twice round the loop."""
    under_way = found = 0
    for each in (*loop, None, *loop):
        if each is None:
            found = 0
        elif each.opcode.startswith("WARPGROUP.DEPBAR"):
            under_way = min(under_way, int(each.operands.split()[-1], 16))
        elif kind_of(each.opcode) == "matmul":
            under_way += each.operands.endswith("gsb0")
        elif kind_of(each.opcode) == "exponential":
            found += under_way > 0
    return found


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
    instructions: Sequence[Instruction],
    warps: int,
    warp: int,
    tile_flops: int | None = None,
    order: tuple[str, ...] = ("full", "cut"),
    copied_bytes: int = 0,
) -> list[MainLoop]:
    """The main loops of a kernel whose teams have `warps` warps of `warp` threads, in the program's order,
    team by team.

    tile_flops: what the products of a team's step need; without it, what the matmul instructions compute.
    order: of a team's loops. copied_bytes: what a copy engine brings for a step, a team's share.
    """
    teams = loops_by_team(instructions)
    found = []
    for team, loops in enumerate(teams, 1):
        names = order if len(loops) == len(order) else [str(n) for n in range(1, len(loops) + 1)]
        for name, code in zip(names, loops, strict=True):
            name = name if len(teams) == 1 else f"{name} {team}"
            found.append(_count(name, code, warps, warp, len(teams), tile_flops, copied_bytes))
    return found


def loops_by_team(instructions: Sequence[Instruction]) -> list[list[list[Instruction]]]:
    """The instructions of each team's main loops, in the program's order."""
    flow = Flow(instructions)
    teams: dict[int, list[list[Instruction]]] = {}
    for places in _innermost(instructions, flow.loops()):
        teams.setdefault(flow.role(places[0]), []).append([instructions[i] for i in places])
    return [teams[role] for role in sorted(teams)]


def _innermost(instructions: Sequence[Instruction], loops: list[list[int]]) -> list[list[int]]:
    """The loops that multiply, or else take exponentials, and hold no other loop that does."""
    for kind in ("matmul", "exponential"):
        holding = [loop for loop in loops if any(kind_of(instructions[i].opcode) == kind for i in loop)]
        if holding:
            return [a for a in holding if not any(set(b) < set(a) for b in holding)]
    return []


def _count(
    name: str,
    loop: Sequence[Instruction],
    warps: int,
    warp: int,
    teams: int,
    tile_flops: int | None,
    copied_bytes: int,
) -> MainLoop:
    done = [instruction for instruction in loop if not instruction.skipped]
    kinds = Counter(kind_of(instruction.opcode) for instruction in done)
    shapes = [matmul_flops(each.opcode) for each in done if kind_of(each.opcode) == "matmul"]
    flops = sum(shape[0] * warps // shape[1] for shape in shapes if shape is not None)
    if tile_flops is not None and (not shapes or None in shapes):
        flops = tile_flops
    moved = warp * warps * sum(shared_bytes(each.opcode) for each in done)
    return MainLoop(
        name=name,
        warps=warps,
        teams=teams,
        instructions=len(loop),
        issued=sum(each.opcode[0].isupper() or each.opcode.startswith("v_") for each in loop),
        matmuls=kinds["matmul"],
        register_matmuls=sum(map(a_in_registers, done)),
        matmul_flops=flops,
        tile_flops=flops if tile_flops is None else tile_flops,
        exponentials=kinds["exponential"],
        overlapped=overlapped(done),
        special=kinds["special"],
        float32=kinds["float32"],
        shared_loads=kinds["shared load"],
        shared_stores=kinds["shared store"],
        shared_bytes=moved + warps // 4 * sum(map(operand_bytes, done)) + copied_bytes,
        spills=kinds["spill"],
        waits=kinds["wait"],
    )
