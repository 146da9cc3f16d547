"""Does anything touch the registers of a matmul that is still in flight? Asked of machine code.

Hopper's matmuls read and write registers on their own, after the instruction that starts them and until a
wait. The assembler must keep everybody else away from these registers meanwhile. It does so where its
analysis holds; a kernel that arranges its waits by hand, as kernels/hopper does, is better looked at.

    HGMMA… R88, R152, gdesc[UR20], R88, gsb0      R88.. are written, R152.. read; gsb0 ends a group
    WARPGROUP.DEPBAR.LE gsb0, 0x1                 waits until at most one group is in flight
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .machine_code import Instruction

_PRODUCT = re.compile(r"R(\d+), (?:R(\d+)|gdesc)")
_SHAPE = re.compile(r"[A-Z]GMMA\.64x(\d+)x")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_A_REGISTERS = 4  # a thread's, of 64 x 16 numbers of 16 bits
# How many registers an instruction writes, by its opcode; one, where nothing matches.
_WIDTHS = ((re.compile(r"LD.*\.128"), 4), (re.compile(r"LD.*\.64|I\w+\.WIDE"), 2))


@dataclass
class _Group:
    written: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)


def touched_in_flight(loop: Sequence[Instruction]) -> list[str]:
    """What a loop's instructions, in order, do to registers of matmuls in flight: a sentence each. Nothing is
    in flight where the loop begins."""
    return list(_faults(loop))


def _faults(loop: Sequence[Instruction]) -> Iterator[str]:
    waiting: list[_Group] = []  # ended, and not yet waited for
    group = _Group()  # being issued
    for instruction in loop:
        text = f"{instruction.opcode} {instruction.operands}"
        if shape := _SHAPE.match(instruction.opcode):
            product = _PRODUCT.match(instruction.operands)
            if product is None:
                raise ValueError(f"a matmul without registers: {text}")
            first = int(product[1])
            group.written |= set(range(first, first + int(shape[1]) // 2))
            if product[2] is not None:
                group.read |= set(range(int(product[2]), int(product[2]) + _A_REGISTERS))
            if "gsb0" in instruction.operands:
                waiting.append(group)
                group = _Group()
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            wait = _WAIT.search(instruction.operands)
            if wait is None:
                raise ValueError(f"a wait for nothing: {text}")
            waiting = waiting[max(0, len(waiting) - int(wait[1], 16)) :] if int(wait[1], 16) else []
        else:
            written, read = _registers(instruction)
            for each in [*waiting, group]:
                if clash := written & (each.written | each.read):
                    yield f"{text}: writes R{min(clash)} of a matmul in flight"
                if clash := read & each.written:
                    yield f"{text}: reads R{min(clash)} of a matmul in flight"
    if waiting or group.written:
        yield "the loop ends, and a matmul is still in flight"


def _registers(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Those that an instruction writes, and those that it reads."""
    first, _, rest = instruction.operands.partition(",")
    written: set[int] = set()
    if target := re.fullmatch(r"R(\d+)", first.strip()):
        width = next((count for pattern, count in _WIDTHS if pattern.match(instruction.opcode)), 1)
        written = set(range(int(target[1]), int(target[1]) + width))
    else:
        rest = instruction.operands
    return written, {int(number) for number in re.findall(r"(?<![A-Z])R(\d+)", rest)}
