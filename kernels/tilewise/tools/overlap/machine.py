"""Hopper's units and the roles of a kernel, clock by clock: the machine behind `overlap`.

A multiprocessor has four schedulers, each with a quarter of every unit and one warp of every warpgroup. All
four do the same, so one is simulated. Each clock it issues one instruction, of a warp whose unit is free:

    unit       what it serves          clocks that a warp's instruction keeps it busy, on an H200
    tensor     HGMMA 64 x n x 16       n / 2, or what its operands take in shared memory
    special    EX2                     8
    half       FMNMX, F2FP             2
    full       FFMA, FADD, FMUL        1
    shuffle    SHFL                    4
    copy       a tile of K or V        bytes / 64
    issue      everything else         1

The tensor cores and the copy engine have queues: a warp hands over its work and goes on. The other units are
shared by the warps that have work for them at the same time, in turns. Who waits for whom is as in
hopper/consumer.py and hopper/producer.py, and for the portable kernel as Triton compiles it.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class Loop:
    """A kernel's full loop: its tile, its instructions, and how it is run."""

    kernel: str  # "hopper" or "portable"
    dim: int  # of queries, keys and values
    tile_kv: int
    counts: Counts
    warpgroups: int = 2  # of 64 rows each
    has_turns: bool = True
    stages: int = 2
    latency: int = 30  # clocks until a warp that waits for a result goes on: an assumption

    @property
    def matmuls(self) -> dict[str, int]:
        return {"S": self.dim // 16, "PV": self.tile_kv // 16}


@dataclass(eq=False)
class Work:
    """Instructions that a warp issues once `when` holds, in whatever order their units are free."""

    role: str  # "warpgroup 1", ..., "copies"
    name: str  # "S", "PV", "softmax", "rescale", "K", "V"; "" for a wait
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
        n_clocks = 2 * 64 * 16 / chip.matmul_flops
        self.costs: dict[str, tuple[str, float]] = {
            # Q comes from shared memory too, which is the slower part where there are few keys.
            "S": (
                "tensor",
                max(n_clocks * loop.tile_kv, 32 * (64 + loop.tile_kv) / chip.shared_bytes_a_clock),
            ),
            "PV": ("tensor", n_clocks * loop.dim),
            "EX2": ("special", 128 / chip.exponentials),
            **dict.fromkeys(("FMNMX", "F2FP"), ("half", 128 / HALF_LANES)),
            **dict.fromkeys(("FFMA", "FADD", "FMUL"), ("full", 256 / chip.float32_flops)),
            "SHFL": ("shuffle", 128 / SHUFFLE_LANES),
            "copy": ("copy", 2 * loop.tile_kv * loop.dim // COPIED_BYTES),
            "other": ("issue", 1),
        }
        known = sum(loop.counts[1:]) + sum(loop.matmuls.values())
        self.others = loop.counts.issued - known
        if self.others < 0:
            raise ValueError(f"issued={loop.counts.issued} must be at least {known}, which {loop} counts")

    def run(self) -> Machine:
        order = {"hopper": hopper, "portable": portable}[self.loop.kernel]
        warps = [order(self, me) for me in range(self.loop.warpgroups)] + [producer(self)]
        doing: dict[Iterator[Work], Work] = {warp: next(warp) for warp in warps}
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
        ready = [kind for kind, n in work.left.items() if n and self.is_open(self.costs[kind][0])]
        if not ready or not (work.end or work.when()):
            return False
        kind = max(ready, key=lambda kind: work.left[kind] * self.costs[kind][1])
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
        return Work(f"warpgroup {me + 1}", name, step, left, self.landed({"S": "K", "PV": "V"}[name], step))

    def vector(self, me: int, name: str, step: int, *kinds: str) -> Work:
        counts = self.loop.counts._asdict()
        left = {kind: counts[kind] for kind in kinds}
        return Work(f"warpgroup {me + 1}", name, step, left, lambda: True)

    def softmax(self, me: int, step: int) -> Iterator[Work]:
        for kinds in (("FMNMX",), ("EX2", "FFMA", "FADD")):
            work = self.vector(me, "softmax", step, *kinds)
            yield work
            for _ in range(2):  # rounds in which four threads make one number of theirs, for two rows
                yield self.ended(work)
                work = Work(work.role, "softmax", step, {"SHFL": self.loop.counts.SHFL // 4}, lambda: True)
                yield work
            yield self.ended(work)

    def rescale(self, me: int, step: int) -> Iterator[Work]:
        work = self.vector(me, "rescale", step, "F2FP", "FMUL")
        yield work
        yield self.ended(work)


def producer(m: Machine) -> Iterator[Work]:
    """K 0, K 1, V 0, K 2, V 1, ..., each as soon as its buffer is free."""
    for first in range(0, m.tiles * m.steps, m.steps):
        tiles = [("K", first)]
        for step in range(first + 1, first + m.steps):
            tiles += [("K", step), ("V", step - 1)]
        for name, step in [*tiles, ("V", first + m.steps - 1)]:
            before = (name, step - m.loop.stages)
            free = m.all_came(before) if before[1] >= 0 else lambda: True
            m.copies[name, step] = Work("copies", name, step, {"copy": 1}, free)
            yield m.copies[name, step]


def hopper(m: Machine, me: int) -> Iterator[Work]:
    """A warpgroup of hopper/consumer.py."""
    for first in range(0, m.tiles * m.steps, m.steps):
        s = m.product(me, "S", first)
        yield s
        yield m.ended(s)
        m.came["K", first] += 1
        yield from m.softmax(me, first)
        for step in range(first + 1, first + m.steps):
            if m.loop.has_turns:
                yield m.wait(lambda: m.turn == me)
            s, pv = m.product(me, "S", step, m.others), m.product(me, "PV", step - 1)
            yield s
            yield pv
            m.turn = (me + 1) % m.loop.warpgroups
            yield m.ended(s)
            m.came["K", step] += 1
            yield from m.softmax(me, step)
            yield m.ended(pv)
            m.came["V", step - 1] += 1
            yield from m.rescale(me, step - 1)
        last = first + m.steps - 1
        pv = m.product(me, "PV", last)
        yield pv
        yield m.ended(pv)
        m.came["V", last] += 1
        yield from m.rescale(me, last)
        m.ends.append(m.now)


def portable(m: Machine, me: int) -> Iterator[Work]:
    """A warpgroup of forward.py as Triton compiles it: a barrier of all warps before each product, a wait for
    S at once, one for O before the next softmax."""
    for step in range(m.tiles * m.steps):
        for name in ("S", "PV"):
            m.came["meet", name, step] += 1
            yield m.wait(m.all_came(("meet", name, step)))
            product = m.product(me, name, step, m.others // 2)
            yield product
            if name == "S":
                yield m.ended(product)  # and so has the PV before it
                m.came["K", step] += 1
                m.came["V", step - 1] += 1
                yield from m.softmax(me, step)
                yield from m.rescale(me, step)
        if step % m.steps == m.steps - 1:
            yield m.ended(product)
            m.ends.append(m.now)
    m.came["V", step] += 1
