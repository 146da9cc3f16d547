"""Hopper's units and the roles of a kernel, clock by clock: the machine behind `overlap`.

A multiprocessor has four schedulers, each with a quarter of every unit and one warp of every warpgroup. All
four do the same, so one is simulated. Each clock it issues one instruction, of a warp whose unit is free:

    unit       what it serves          clocks that a warp's instruction keeps it busy, on an H200
    tensor     HGMMA 64 x n x 16       n / 2, or what its operands take in shared memory
    special    EX2                     8
    half       FMNMX, F2FP             2
    full       FFMA, FADD, FMUL        1
    shuffle    SHFL                    4
    copy       a tile                  bytes / 64
    issue      everything else         1

The tensor cores and the copy engine have queues: a warp hands over its work and goes on. The other units are
shared by the warps that have work for them at the same time, in turns. What there is to do, and who waits for
whom, a loop says: `forward.py`, `backward.py`.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..chips import Chip

# Of a multiprocessor: lanes (CUDA programming guide, "arithmetic instructions", 9.0), and bytes that it takes
# from the L2 cache in a clock.
HALF_LANES, SHUFFLE_LANES, COPIED_BYTES = 64, 32, 64


class Counts(NamedTuple):
    """Instructions that a thread issues in a step of a kernel's full loop."""

    issued: int  # all of them
    EX2: int
    FFMA: int
    FMUL: int
    FADD: int
    FMNMX: int
    F2FP: int
    SHFL: int


class Cost(NamedTuple):
    """What an instruction keeps busy, and for how many clocks."""

    unit: str
    clocks: float


class Loop(Protocol):
    """A kernel's full loop: its instructions, and how it is run."""

    @property
    def warpgroups(self) -> int: ...
    @property
    def latency(self) -> int:
        """Clocks until a warp that waits for a result goes on: an assumption."""

    @property
    def counts(self) -> Counts: ...
    @property
    def matmuls(self) -> dict[str, int]:
        """The matmul instructions of a step, by the name of the product."""

    @property
    def needs(self) -> dict[str, str]:
        """The copy that a product waits for, by name."""

    def costs(self, chip: Chip) -> dict[str, Cost]:
        """Of products and copies, by name."""

    def roles(self, machine: Machine) -> list[Iterator[Work]]: ...


@dataclass(eq=False)
class Work:
    """Instructions that a warp issues once `when` holds, in whatever order their units are free."""

    role: str  # "warpgroup 1", ..., "copies"
    name: str  # of a product, a copy or other work; "" for a wait
    step: int
    left: dict[str, int]  # instructions by kind
    when: Callable[[], bool]
    begin: float = 0
    end: float = 0


class Machine:
    """One scheduler with the warps of all roles. `run` fills `timeline` with all that they do, and `ends`
    with the clocks at which warpgroups end a tile of rows."""

    def __init__(self, loop: Loop, steps: int, tiles: int, chip: Chip) -> None:
        self.loop, self.steps, self.tiles = loop, steps, tiles  # steps a tile of rows, tiles of rows
        self.now, self.turn = 0.0, 0
        self.free: defaultdict[str, float] = defaultdict(float)  # the clock at which a unit is free
        self.came: Counter[object] = Counter()  # warpgroups that have released a buffer, or reached a barrier
        self.copies: dict[tuple[str, int], Work] = {}
        self.timeline: list[Work] = []
        self.ends: list[float] = []
        self.events: list[float] = []  # clocks at which something ends
        self.costs: dict[str, Cost] = {
            "EX2": Cost("special", 128 / chip.exponentials),
            **dict.fromkeys(("FMNMX", "F2FP"), Cost("half", 128 / HALF_LANES)),
            **dict.fromkeys(("FFMA", "FADD", "FMUL"), Cost("full", 256 / chip.float32_flops)),
            "SHFL": Cost("shuffle", 128 / SHUFFLE_LANES),
            "other": Cost("issue", 1),
            **loop.costs(chip),
        }
        known = sum(loop.counts[1:]) + sum(loop.matmuls.values())
        self.others = loop.counts.issued - known
        if self.others < 0:
            raise ValueError(f"issued={loop.counts.issued} must be at least {known}, which {loop} counts")

    def run(self) -> Machine:
        doing: dict[Iterator[Work], Work] = {warp: next(warp) for warp in self.loop.roles(self)}
        while doing:
            over = [warp for warp, work in doing.items() if not any(work.left.values()) and work.when()]
            for warp in over:
                following = next(warp, None)
                if following is None:
                    del doing[warp]
                else:
                    doing[warp] = following
            if over:
                continue
            issuing = next((warp for warp, work in doing.items() if self.issue(work)), None)
            if issuing is None:
                while self.events[0] <= self.now:
                    heapq.heappop(self.events)
                self.now = self.events[0]
            else:
                doing[issuing] = doing.pop(issuing)  # the next clock is another warp's
                self.now += 1
        return self

    def issue(self, work: Work) -> bool:
        """Issue one instruction, of the kind that has most to do; False where none can be issued now."""
        ready = [kind for kind, n in work.left.items() if n and self.is_open(self.costs[kind].unit)]
        if not ready or not (work.end or work.when()):
            return False
        kind = max(ready, key=lambda kind: work.left[kind] * self.costs[kind].clocks)
        unit, clocks = self.costs[kind]
        begin = max(self.now, self.free[unit])
        if not work.end:
            work.begin = begin
            self.timeline.append(work)
        work.left[kind] -= 1
        self.free[unit] = begin + clocks
        work.end = max(work.end, self.free[unit])
        for event in (self.free[unit], self.free[unit] + self.loop.latency):
            heapq.heappush(self.events, event)
        return True

    def is_open(self, unit: str) -> bool:
        """Matmuls and copies are asynchronous: their units have a queue."""
        return unit in ("tensor", "copy") or self.free[unit] <= self.now

    # ---- What roles do, and wait for

    def wait(self, when: Callable[[], bool]) -> Work:
        return Work("", "", 0, {}, when)

    def ended(self, work: Work) -> Work:
        return self.wait(lambda: work.end + self.loop.latency <= self.now)

    def landed(self, name: str, step: int) -> Callable[[], bool]:
        def when() -> bool:
            copy = self.copies.get((name, step))
            return copy is not None and 0 < copy.end <= self.now

        return when

    def all_came(self, place: object) -> Callable[[], bool]:
        return lambda: self.came[place] == self.loop.warpgroups

    def product(self, me: int, name: str, step: int, others: int = 0) -> Work:
        left = {name: self.loop.matmuls[name], "other": others}
        copy = self.loop.needs.get(name)
        when = (lambda: True) if copy is None else self.landed(copy, step)
        return Work(f"warpgroup {me + 1}", name, step, left, when)

    def vector(self, me: int, name: str, step: int, *kinds: str) -> Work:
        counts = self.loop.counts._asdict()
        left = {kind: counts[kind] for kind in kinds}
        return Work(f"warpgroup {me + 1}", name, step, left, lambda: True)

    def copy(self, name: str, step: int, free: Callable[[], bool]) -> Work:
        self.copies[name, step] = Work("copies", name, step, {"copy": 1}, free)
        return self.copies[name, step]
