"""Do the roles of a compiled kernel hand over as PTX demands? Read from the PTX, for every way through it.

What the emulator cannot see: what Triton adds to the source, and where it moves things. Each check yields
its complaints, a sentence each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tilewise.tools.compiled.machine_code import Flow, Instruction, read_ptx

REGISTER_FILE = 65_536  # of a multiprocessor, in registers of 32 bits
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Kernel:
    """A warp-specialised kernel, as `tilewise.tools.compiled` writes its PTX. It has consumers of four warps
    each, the first of which is the default role, a producer, and perhaps a reducer, a warp in the producer's
    warpgroup."""

    text: str
    consumers: int
    producer_warps: int
    products: int = 1  # under way at most where a buffer is given back: of the pieces that V has

    @cached_property
    def code(self) -> list[Instruction]:
        return read_ptx(self.text)

    @cached_property
    def flow(self) -> Flow:
        return Flow(self.code)

    @cached_property
    def owner(self) -> list[int]:
        """Whose each instruction is, by `Flow.role`."""
        return [self.flow.role(place) for place in range(len(self.code))]

    def places(self, start: str, role: int | None = None) -> list[int]:
        """Instructions whose opcode starts so."""
        return [
            i
            for i, each in enumerate(self.code)
            if each.opcode.startswith(start) and role in (None, self.owner[i])
        ]

    @cached_property
    def threads(self) -> dict[int, int]:
        """Of every role that works."""
        found = {self.owner[place]: 128 for place in self.places("wgmma.mma_async")}
        found |= {self.owner[place]: 32 for place in self.places("cp.reduce")}
        return found | {self.owner[place]: 32 * self.producer_warps for place in self.loads}

    @cached_property
    def loads(self) -> list[int]:
        return [i for i in self.places("cp.async.bulk.tensor") if "complete_tx" in self.code[i].opcode]

    def number(self, directive: str) -> int:
        """`.reqntid 384`: 384."""
        return int(re.findall(rf"^\.{directive} (\d+)", self.text, re.M)[0])

    @cached_property
    def definitions(self) -> dict[str, list[Instruction]]:
        """By register, what writes it; where its first operand is one."""
        found: dict[str, list[Instruction]] = {}
        for each in self.code:
            target = re.match(r"%\w+", each.operands)
            if target and each.opcode.split(".")[0] in ("mov", "cvt", "cvta"):
                found.setdefault(target[0], []).append(each)
        return found

    @cached_property
    def conditions(self) -> dict[str, Instruction]:
        """By predicate, what sets it."""
        wanted = ("elect", "and", "setp")
        code = [each for each in self.code if each.opcode.split(".")[0] in wanted]
        return {name: each for each in code for name in re.findall(r"%p\d+", each.operands.split(",")[0])}

    def warps_at(self, place: int) -> int:
        """How many warps of a role do what one elected thread of a warp does: those of threads below some."""
        condition = self.conditions[self.code[place].predicate]
        if condition.opcode.startswith("elect"):
            return self.threads[self.owner[place]] // 32
        parts = [self.conditions[name] for name in re.findall(r"%p\d+", condition.operands)[1:]]
        (limit,) = (each for each in parts if not each.opcode.startswith("elect"))
        if not limit.opcode.startswith("setp.lt"):
            raise ValueError(f"an unknown condition: {limit.opcode} {limit.operands}")
        return int(limit.operands.split()[-1]) // 32

    def origin(self, value: str) -> str:
        """What a register was copied from, where it was copied once."""
        while len(found := self.definitions.get(value, [])) == 1:
            value = found[0].operands.split(",")[1].strip()
        return value


def complaints(kernel: Kernel) -> list[str]:
    """Of all checks."""
    return [f"{check.__name__}: {what}" for check in CHECKS for what in check(kernel)]


# ---- What stands once in the program


def registers_add_up(kernel: Kernel) -> Iterator[str]:
    """No role waits for registers that nobody gives back, and the warps of a warpgroup ask for the same."""
    launched = kernel.number("reqntid") * kernel.number("maxnreg")
    if launched > REGISTER_FILE:
        yield f"the launch takes {launched} registers"
    asked = {i: int(kernel.code[i].operands) for i in kernel.places("setmaxnreg")}
    first = kernel.flow.comes_first
    outermost = [asked[i] for i in asked if not any(first(j, i) for j in asked if j != i)]
    high, low = (
        max(outermost),
        min(outermost),
    )  # of the first warpgroup, while it is alone; then of the others
    if 128 * high + (kernel.number("reqntid") - 128) * low > launched:
        yield f"{high} registers for the first warpgroup, while all others have {low}"
    given = {}
    for role in kernel.threads:
        works = (*kernel.places("wgmma.mma_async"), *kernel.loads, *kernel.places("cp.reduce"))
        work = min(i for i in works if kernel.owner[i] == role)
        before = [i for i in asked if first(i, work)]
        given[role] = asked[next(i for i in before if all(first(j, i) for j in before if j != i))]
    producer = given[kernel.owner[kernel.loads[0]]]
    warpgroups = [given[role] for role, threads in kernel.threads.items() if threads == 128]
    if kernel.producer_warps < 4:  # it has a warpgroup with others that do little
        warpgroups.append(producer)
    if len(warpgroups) != kernel.consumers + 1:
        yield f"{len(warpgroups)} warpgroups"
    if 128 * sum(warpgroups) > launched:
        yield f"{128 * sum(warpgroups)} registers are asked for, of {launched}"
    for place, registers in asked.items():
        role = kernel.owner[place]
        if registers not in (high, low, given.get(role, producer)):
            yield f"{kernel.code[place].opcode} {registers} of role {role}: {given}, {low} while nobody works"


def warps_have_their_roles(kernel: Kernel) -> Iterator[str]:
    """A byte of shared memory a warp says which worker it is. Consumers fill whole warpgroups; the producer
    has the last one for itself, or shares it with warps that do nothing."""
    first_barrier = kernel.places("barrier.sync")[0]
    stored = []
    for place in kernel.places("st.shared"):
        if place < first_barrier or kernel.owner[place]:
            found = re.match(r"\[global_smem\+(\d+)\], \{?([\d, ]+)\}?$", kernel.code[place].operands)
            if found and place < first_barrier:
                stored.append((int(found[1]), [int(word) for word in found[2].split(",")]))
    words = [word for _, words in sorted(stored) for word in words]
    workers = b"".join(word.to_bytes(4, "little") for word in words)
    if len(workers) != kernel.number("reqntid") // 32 - 4:
        yield f"{len(workers)} warps have a worker's number"
    for warpgroup in range(kernel.consumers - 1):
        if {*workers[4 * warpgroup :][:4]} != {warpgroup}:
            yield f"warpgroup {warpgroup + 1} is of workers {[*workers[4 * warpgroup :][:4]]}"
    if [*workers[-4:]].count(kernel.consumers - 1) != kernel.producer_warps:
        yield f"the last warpgroup is of workers {[*workers[-4:]]}"


def mbarriers_are_ready(kernel: Kernel) -> Iterator[str]:
    """init, then a fence, then a barrier of all warps, before anybody uses an mbarrier or has it used."""
    first, code = kernel.flow.comes_first, kernel.code
    inits = kernel.places("mbarrier.init")
    gates = kernel.places("barrier.sync")
    fences = [i for i in kernel.places("fence.proxy.async", role=0) if all(first(init, i) for init in inits)]
    fences = [i for i in fences if not any(first(gate, i) for gate in gates)]
    if not inits or {kernel.owner[i] for i in inits} != {0} or not fences:
        yield "no fence of the first role follows every init and comes before the first barrier of all warps"
    for place in (*kernel.places("mbarrier.try_wait"), *kernel.places("mbarrier.arrive"), *kernel.loads):
        before = [gate for gate in gates if first(gate, place)]
        if not any(kernel.owner[place] or first(fence, gate) for gate in before for fence in fences):
            yield f"{code[place].opcode} {code[place].operands} may come before the mbarrier is ready"


def bytes_are_expected(kernel: Kernel) -> Iterator[str]:
    """Before copies are started, all of their bytes are expected at the mbarrier that they signal."""
    boxes = json.loads(kernel.text.splitlines()[0].partition(": ")[2])
    names = sorted({*re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", kernel.text)}, key=_number)
    due: dict[int, int] = {}
    for place in kernel.loads:
        descriptor = re.findall(r"\[(%rd\d+), \{", kernel.code[place].operands)[0]
        signal = re.findall(r"\[(%r\d+)\]$", kernel.code[place].operands)[0]
        source = kernel.origin(descriptor)
        expects = [i for i in kernel.places("mbarrier.arrive.expect_tx") if i < place]
        if source not in names or not expects or not kernel.flow.comes_first(expects[-1], place):
            yield f"a copy of {source} expects nothing"
            continue
        if f"[{signal}]" not in kernel.code[expects[-1]].operands:
            yield f"a copy of {source} signals another mbarrier than the one that expects it"
        nbytes = kernel.warps_at(place) * ELEMENT_BYTES * math.prod(boxes[names.index(source)])
        due[expects[-1]] = due.get(expects[-1], 0) + nbytes
    for place in kernel.places("mbarrier.arrive.expect_tx"):
        expected = int(kernel.code[place].operands.split()[-1])
        if due.get(place, 0) != expected:
            yield f"{expected} bytes are expected, and {due.get(place, 0)} come"


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def barriers_count_who_comes(kernel: Kernel) -> Iterator[str]:
    """The threads that a named barrier counts are those of the roles that name it. Numbers that are known at
    run time only, of K's and V's buffers, are all named by everybody."""
    named: dict[tuple[str, int], set[int]] = {}
    for place in kernel.places("bar."):
        number, _, threads = (part.strip() for part in kernel.code[place].operands.partition(","))
        if threads:
            known = kernel.origin(number)
            key = known if known.isdigit() else "at run time", int(threads)
            named.setdefault(key, set()).add(kernel.owner[place])
    for (number, threads), roles in named.items():
        coming = sum(kernel.threads.get(role, 0) for role in roles)
        if number == "1" or coming != threads:
            yield f"barrier {number} counts {threads} threads, and {coming} come, of roles {sorted(roles)}"
    numbers = {number: {threads for n, threads in named if n == number} for number, _ in named}
    for number, counts in numbers.items():
        if len(counts) > 1 and number != "at run time":
            yield f"barrier {number} counts {sorted(counts)} threads"


# ---- What must hold on every way


def on_every_way(
    kernel: Kernel, worst: Callable[[int, int], int], step: Callable[[Instruction, int], int]
) -> list[int]:
    """The state before each instruction, at its worst over all ways there, from 0 at the start."""
    code = kernel.code
    states: dict[int, int] = {0: 0}
    reached = [0]
    while reached:
        place = reached.pop()
        after = step(code[place], states[place])
        follows = [*code[place].targets, *([place + 1] if code[place].continues else [])]
        for follow in follows:
            if follow < len(code):
                state = after if follow not in states else worst(states[follow], after)
                if states.get(follow) != state:
                    states[follow] = state
                    reached.append(follow)
    return [states.get(place, 0) for place in range(len(code))]


SEEN, FENCED, WRITTEN = range(3)


def writes_are_seen(kernel: Kernel) -> Iterator[str]:
    """Between what threads write to shared memory and the copy or matmul that reads it stand a fence and then
    a barrier; who is told of it by `arrive` needs the fence alone. Single numbers are written for threads."""

    def step(each: Instruction, state: int) -> int:
        if each.opcode.startswith(("st.shared", "stmatrix")) and not is_for_threads(each):
            return WRITTEN
        if each.opcode.startswith("fence.proxy.async"):
            return min(state, FENCED)
        if each.opcode.startswith(("bar.", "barrier.sync")) and state == FENCED:
            return SEEN
        return state

    asynchronous = ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.arrive.shared")
    for each, state in zip(kernel.code, on_every_way(kernel, max, step), strict=True):
        is_told = each.opcode.startswith("bar.arrive") and state == WRITTEN
        if is_told or (each.opcode.startswith(asynchronous) and state != SEEN):
            missing = "a fence" if state == WRITTEN else "a barrier"
            yield f"{missing} is missing before {each.opcode} {each.operands[-40:]}"


def is_for_threads(store: Instruction) -> bool:
    """Whether what it writes is a number a thread, or one of all: no part of a tile is."""
    is_single = re.fullmatch(r"st\.shared(::cta)?\.b32|stmatrix\S*\.x1\S*", store.opcode) is not None
    return is_single or "[global_smem" in store.operands


def reads_are_over(kernel: Kernel) -> Iterator[str]:
    """Who has read shared memory fences before he gives it back for the copy engine to fill."""

    def step(each: Instruction, state: int) -> int:
        if each.opcode.startswith(("ld.shared", "ldmatrix")):
            return 1
        return 0 if each.opcode.startswith(("fence.proxy.async", "barrier.sync")) else state

    for each, state in zip(kernel.code, on_every_way(kernel, max, step), strict=True):
        if each.opcode.startswith(("bar.arrive", "mbarrier.arrive.shared")) and state:
            yield f"no fence between a load and {each.opcode} {each.operands}"


# The bits of a state: groups that are not waited for, up to 3; a group has begun; the next one is not fenced.
GROUPS, BEGUN, UNFENCED = 3, 4, 8


def matmuls_are_fenced_and_waited_for(kernel: Kernel) -> Iterator[str]:
    """fence, products, commit; K's buffer is given back with at most V's products under way, and nothing is
    under way where a role ends."""

    def step(each: Instruction, state: int) -> int:
        name = each.opcode
        if name.startswith("setmaxnreg"):
            return state | UNFENCED
        if name.startswith("wgmma.fence"):
            return state & ~UNFENCED
        if name.startswith("wgmma.mma_async"):
            return state | BEGUN
        if name.startswith("wgmma.commit_group"):
            return min(state % 4 + 1, GROUPS) | UNFENCED
        if name.startswith("wgmma.wait_group"):
            return min(state % 4, int(each.operands)) | state & ~GROUPS
        return state

    def worst(a: int, b: int) -> int:
        return max(a % 4, b % 4) | (a | b) & ~GROUPS

    states = on_every_way(kernel, worst, step)
    for each, state in zip(kernel.code, states, strict=True):
        text = f"{each.opcode} {each.operands[-40:]}"
        if each.opcode.startswith("wgmma.mma_async") and state & UNFENCED:
            yield f"no wgmma.fence before {text}"
        elif each.opcode.startswith(("wgmma.wait_group", "bar.arrive", "barrier.sync")) and state & BEGUN:
            yield f"no wgmma.commit_group before {text}"
        elif each.opcode.startswith("bar.arrive") and state % 4 > kernel.products:
            if int(each.operands.split(",")[1].split(";")[0]) != 256:
                yield f"{state % 4} groups under way at {text}"
        elif each.opcode.startswith(("barrier.sync", "ret")) and state % 4:
            yield f"{state % 4} groups under way at {text}"


CHECKS = (
    registers_add_up,
    warps_have_their_roles,
    mbarriers_are_ready,
    bytes_are_expected,
    barriers_count_who_comes,
    writes_are_seen,
    reads_are_over,
    matmuls_are_fenced_and_waited_for,
)
