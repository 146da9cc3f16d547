"""What does a compiled kernel consist of? NVIDIA's SASS and AMD's assembly as instructions, and their loops.

A loop is what compilers call a natural loop: a jump back to a header that every way into the loop passes, and
all that lies between. So code that the assembler has moved out of line, such as the rare second round of a
wait, belongs to the loop that it returns to, and does not look like a loop because it jumps back.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Instruction:
    """One instruction, and where the program may go after it."""

    opcode: str  # with its modifiers: "HGMMA.64x128x16.F32.BF16", "v_exp_f32_e32"
    operands: str = ""
    target: int | None = None  # the place, in the list of instructions, that it may jump to
    continues: bool = True  # the next instruction may follow
    skipped: bool = False  # its predicate is never true: it fills a slot, and does nothing


@dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions, and what a thread needs to run them."""

    registers: int
    spill_bytes: int  # a thread's stack; Triton's kernels put nothing else there
    instructions: list[Instruction]
    text: str  # the assembly


# /*1e60*/  @!P0 BRA 0x5040 ;   the address, a predicate, the opcode, its operands
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_SASS_JUMPS = ("BRA", "JMP", "CALL")
_SASS_ENDS = ("EXIT", "RET", "KILL", "BRX", "JMX")
_AMD = re.compile(r"^(?:(\.L\w+):|\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)[ \t]*([^;\n]*))", re.M)


def read_sass(text: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` prints for one kernel."""
    lines = _SASS.findall(text)
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    found = []
    for _, predicate, opcode, operands in lines:
        name = opcode.split(".")[0]
        to = re.search(r"0x([0-9a-f]+)$", operands) if name in _SASS_JUMPS else None
        if opcode == "BRA.DIV":  # taken only where the threads of a warp have parted, which ours never do
            to = None
        # Conditions stand before the opcode or among the operands: BRA.U !UP0, 0x170.
        always = not predicate and opcode != "BRA.DIV" and (to is None or to.start() == 0)
        ends = name in _SASS_ENDS or (name in _SASS_JUMPS and name != "CALL")
        found.append(
            Instruction(
                opcode=opcode,
                operands=operands,
                target=None if to is None else place.get(int(to[1], 16)),
                continues=not (ends and always),
                skipped=predicate in ("!PT", "!UPT"),
            )
        )
    return found


def read_amd(text: str) -> list[Instruction]:
    """The instructions of AMD's assembly of one kernel, where jumps go to labels."""
    lines: list[tuple[str, str]] = []
    place: dict[str, int] = {}
    for label, opcode, operands in _AMD.findall(text):
        if label:
            place[label] = len(lines)
        else:
            lines.append((opcode, operands.strip()))
    return [
        Instruction(
            opcode=opcode,
            operands=operands,
            target=place.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None,
            continues=not opcode.startswith(("s_branch", "s_endpgm", "s_setpc")),
        )
        for opcode, operands in lines
    ]


def read_cubin(cubin: bytes) -> MachineCode:
    """What the disassembler says that Triton's wheel carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found, instructions = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage), read_sass(sass)
    if found is None or not instructions:
        raise RuntimeError(f"cuobjdump says nothing about the kernel: {usage}")
    registers, stack, local = map(int, found.groups())
    return MachineCode(registers, stack + local, instructions, sass)


def read_amdgcn(text: str) -> MachineCode:
    """What the assembly says that Triton's compiler for AMD leaves."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)  # those of matrix accumulators included
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    instructions = read_amd(text)
    if registers is None or scratch is None or not instructions:
        raise RuntimeError("the assembly of the kernel has no metadata")
    return MachineCode(int(registers[1]), int(scratch[1]), instructions, text)


def natural_loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The loops, each as the places of its instructions, in the order of their headers."""
    starts, follows = _blocks(instructions)
    dominators = _dominators(follows)
    before: list[list[int]] = [[] for _ in starts]
    for block, after in enumerate(follows):
        for next_block in after:
            before[next_block].append(block)
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(follows):
        for header in after:
            if not dominators[block] >> header & 1:
                continue
            body, reached = bodies.setdefault(header, {header}), [block]
            while reached:
                inside = reached.pop()
                if inside not in body:
                    body.add(inside)
                    reached += [b for b in before[inside] if dominators[b]]
    ends = [*starts[1:], len(instructions)]
    return [[i for b in sorted(bodies[h]) for i in range(starts[b], ends[b])] for h in sorted(bodies)]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Where straight runs of instructions start, and for each the runs that may follow it."""
    cuts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.target is not None or not instruction.continues:
            cuts.add(i + 1)
        if instruction.target is not None:
            cuts.add(instruction.target)
    starts = sorted(cuts - {len(instructions)})
    number = {start: block for block, start in enumerate(starts)}
    follows = []
    for end in [*starts[1:], len(instructions)]:
        last = instructions[end - 1]
        after = [number[last.target]] if last.target is not None else []
        if last.continues and end in number:
            after.append(number[end])
        follows.append(after)
    return starts, follows


def _dominators(follows: list[list[int]]) -> list[int]:
    """For each block the set, as bits, of blocks that every way to it passes; 0 where none leads to it."""
    everything = (1 << len(follows)) - 1
    dominators = [1] + [everything] * (len(follows) - 1)
    reachable, reached = {0}, [0]
    while reached:
        for after in follows[reached.pop()]:
            if after not in reachable:
                reachable.add(after)
                reached.append(after)
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable):
            for after in follows[block]:
                known = dominators[after] & (dominators[block] | 1 << after)
                changed |= known != dominators[after]
                dominators[after] = known
    return [bits if block in reachable else 0 for block, bits in enumerate(dominators)]
