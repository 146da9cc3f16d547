"""What does a compiled kernel consist of? SASS, PTX and AMD's assembly as instructions, and their loops.

A loop is what compilers call a natural loop: a jump back to a header that every way into the loop passes, and
all that lies between. So code that the assembler has moved out of line, such as the rare second round of a
wait, belongs to the loop that it returns to, and does not look like a loop because it jumps back.

Where warps have roles, workers get to their code by a jump through a table, and the other warps run what that
jump does not lead to. So the table says whose an instruction is. Two workers are told apart by branches
instead; then each one's code begins where, after what all workers have done, it changes its registers.
"""

from __future__ import annotations

import bisect
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
    targets: tuple[int, ...] = ()  # the places, in the list of instructions, that it may jump to
    continues: bool = True  # the next instruction may follow
    skipped: bool = False  # its predicate is never true: it fills a slot, and does nothing
    predicate: str = ""  # of PTX: "%p4"


@dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions, and what a thread needs to run them."""

    registers: int
    spill_bytes: int  # a thread's stack; Triton's kernels put nothing else there
    instructions: list[Instruction]
    text: str  # the assembly


# .L_x_3:                                           a label, or
#         /*1e60*/              @!P0 BRA `(.L_x_3) ;   the address, a predicate, the opcode, its operands
_SASS = re.compile(
    r"^(?:([.$][\w$.]+):|\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;)", re.M
)
_SASS_JUMPS = ("BRA", "JMP", "CALL")
_SASS_TABLES = ("BRX", "JMX")  # jumps through a table: BRX R4 -0x1a0 (*"BRANCH_TARGETS .L_x_2,.L_x_66"*);
_SASS_ENDS = ("EXIT", "RET", "KILL", *_SASS_TABLES)
_TABLES, _NEW_REGISTERS = (*_SASS_TABLES, "brx"), ("USETMAXREG", "setmaxnreg")
_PTX_LABEL = re.compile(r"([\w$]+):\s*")
_PTX = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_AMD = re.compile(r"^(?:(\.L\w+):|\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)[ \t]*([^;\n]*))", re.M)


def read_sass(text: str) -> list[Instruction]:
    """The instructions that `nvdisasm -c` prints for one kernel."""
    lines: list[tuple[str, str, str]] = []
    place: dict[str, int] = {}
    for label, *line in _SASS.findall(text):
        if label:
            place[label] = len(lines)
        else:
            lines.append((line[0], line[1], line[2]))
    found = []
    for predicate, opcode, operands in lines:
        name = opcode.split(".")[0]
        labels = re.findall(r"[.$][\w$]+", operands) if name in (*_SASS_JUMPS, *_SASS_TABLES) else []
        if opcode == "BRA.DIV":  # taken only where the threads of a warp have parted, which ours never do
            labels = []
        # Conditions stand before the opcode or among the operands: BRA.U !UP0, `(.L_x_3).
        always = not predicate and opcode != "BRA.DIV" and (name not in _SASS_JUMPS or operands[:1] == "`")
        ends = name in _SASS_ENDS or (name in _SASS_JUMPS and name != "CALL")
        found.append(
            Instruction(
                opcode=opcode,
                operands=operands,
                targets=tuple(place[label] for label in labels if label in place),
                continues=not (ends and always),
                skipped=predicate in ("!PT", "!UPT"),
            )
        )
    return found


def read_ptx(text: str) -> list[Instruction]:
    """The instructions of the one kernel in a PTX file. Labels in braces are local to them."""
    lines: list[tuple[str, str, str, int]] = []  # predicate, opcode, operands, the braces around it
    place: dict[tuple[int, str], int] = {}
    tables: dict[str, list[str]] = {}
    scopes, opened, table = [0], 0, ""
    body = re.sub(r"//[^\n]*", "", text[text.index("\n{\n") :])
    for line in map(str.strip, body.splitlines()):
        if line == "{":
            opened += 1
            scopes.append(opened)
        elif line == "}":
            scopes.pop()
        else:
            while label := _PTX_LABEL.match(line):
                table, line = label[1], line[label.end() :]
                place[scopes[-1], label[1]] = len(lines)
            if line.startswith(".branchtargets") or (table in tables and line and line[0] not in ".@"):
                names = re.findall(r"[\w$]+", line.removeprefix(".branchtargets"))
                tables.setdefault(table, []).extend(names)
                table = "" if line.endswith(";") else table
                continue
            for statement in map(str.strip, line.split(";")):
                if statement and statement[0] != "." and (found := _PTX.fullmatch(statement)):
                    lines.append((found[1] or "", found[2], found[3], scopes[-1]))
    instructions = []
    for predicate, opcode, operands, scope in lines:
        name = opcode.split(".")[0]
        labels = [operands] if name == "bra" else []
        labels = tables[operands.split()[-1]] if name == "brx" else labels
        ends = name in ("bra", "brx", "ret", "exit", "trap")
        instructions.append(
            Instruction(
                opcode=opcode,
                operands=operands,
                targets=tuple(place.get((scope, label), place.get((1, label), 0)) for label in labels),
                continues=not (ends and not predicate),
                predicate=predicate,
            )
        )
    return instructions


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
            targets=(place[operands],)
            if opcode.startswith(("s_branch", "s_cbranch")) and operands in place
            else (),
            continues=not opcode.startswith(("s_branch", "s_endpgm", "s_setpc")),
        )
        for opcode, operands in lines
    ]


def read_cubin(cubin: bytes) -> MachineCode:
    """What the disassemblers say that Triton's wheel carries."""
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((tools.cuobjdump.path, "-res-usage"), (tools.nvdisasm.path, "-c"))
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


class Flow:
    """Where a kernel may go from where."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._instructions = instructions
        self._starts, self._follows = _blocks(instructions)
        self._ends = [*self._starts[1:], len(instructions)]
        self._dominators = _dominators(self._follows)
        self._entries = [
            bisect.bisect(self._starts, target) - 1
            for each in instructions
            if each.opcode.startswith(_TABLES)
            for target in each.targets
        ] or self._entries_without_table()

    def _entries_without_table(self) -> list[int]:
        """The blocks that change registers after just one other has, the same for two or more of them."""
        changing = [
            block
            for block, (start, end) in enumerate(zip(self._starts, self._ends, strict=True))
            if any(each.opcode.startswith(_NEW_REGISTERS) for each in self._instructions[start:end])
        ]
        after: dict[int, list[int]] = {}
        for block in changing:
            before = [other for other in changing if other != block and self._dominators[block] >> other & 1]
            if len(before) == 1:
                after.setdefault(before[0], []).append(block)
        return next((blocks for blocks in after.values() if len(blocks) > 1), [])

    def loops(self) -> list[list[int]]:
        """The natural loops, each as the places of its instructions, in the order of their headers."""
        before: list[list[int]] = [[] for _ in self._starts]
        for block, after in enumerate(self._follows):
            for next_block in after:
                before[next_block].append(block)
        bodies: dict[int, set[int]] = {}
        for block, after in enumerate(self._follows):
            for header in after:
                if not self._dominators[block] >> header & 1:
                    continue
                body, reached = bodies.setdefault(header, {header}), [block]
                while reached:
                    inside = reached.pop()
                    if inside not in body:
                        body.add(inside)
                        reached += [b for b in before[inside] if self._dominators[b]]
        return [
            [i for block in sorted(bodies[header]) for i in range(self._starts[block], self._ends[block])]
            for header in sorted(bodies)
        ]

    def role(self, place: int) -> int:
        """Whose an instruction is: 0, or n for the worker whose entry is the n-th of the table, or in the
        code."""
        passed = self._passed(place)
        return next((n for n, entry in enumerate(self._entries, 1) if passed >> entry & 1), 0)

    def comes_first(self, first: int, place: int) -> bool:
        """Whether every way to an instruction passes the one at `first`."""
        block = bisect.bisect(self._starts, first) - 1
        inside = self._starts[block] <= place < self._ends[block]
        return first < place if inside else bool(self._passed(place) >> block & 1)

    def registers(self, place: int) -> int | None:
        """What a thread has there, by the last USETMAXREG on every way; None where there is none."""
        passed = self._passed(place)
        told = {}
        for block, start in enumerate(self._starts):
            if passed >> block & 1:
                for each in self._instructions[start : min(self._ends[block], place)]:
                    if each.opcode.startswith("USETMAXREG"):
                        told[self._dominators[block].bit_count()] = int(each.operands.split()[-1], 16)
        return told[max(told)] if told else None

    def _passed(self, place: int) -> int:
        """The blocks, as bits, that every way to an instruction passes, its own included."""
        return self._dominators[bisect.bisect(self._starts, place) - 1]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Where straight runs of instructions start, and for each the runs that may follow it."""
    cuts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.targets or not instruction.continues:
            cuts.add(i + 1)
        cuts.update(instruction.targets)
    starts = sorted(cuts - {len(instructions)})
    number = {start: block for block, start in enumerate(starts)}
    follows = []
    for end in [*starts[1:], len(instructions)]:
        last = instructions[end - 1]
        after = [number[target] for target in last.targets]
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
