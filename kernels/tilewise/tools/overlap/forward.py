"""The forward's loops: what Hopper's kernel does in a step, and the portable one as Triton compiles it.

Who waits for whom is as in hopper/consumer.py and hopper/producer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..chips import Chip
from .machine import COPIED_BYTES, Cost, Counts, Machine, Work


@dataclass(frozen=True)
class ForwardLoop:
    """A kernel's full loop: its tile, its instructions, and how it is run."""

    kernel: str  # "hopper" or "portable"
    dim: int  # of queries, keys and values
    tile_kv: int
    counts: Counts
    warpgroups: int = 2  # of 64 rows each
    has_turns: bool = True
    stages: int = 2
    latency: int = 30

    needs = {"S": "K", "PV": "V"}  # noqa: RUF012

    @property
    def matmuls(self) -> dict[str, int]:
        return {"S": self.dim // 16, "PV": self.tile_kv // 16}

    def costs(self, chip: Chip) -> dict[str, Cost]:
        n_clocks = 2 * 64 * 16 / chip.matmul_flops
        # Q comes from shared memory too, which is the slower part where there are few keys.
        operands = 32 * (64 + self.tile_kv) / chip.shared_bytes_a_clock
        return {
            "S": Cost("tensor", max(n_clocks * self.tile_kv, operands)),
            "PV": Cost("tensor", n_clocks * self.dim),
            "copy": Cost("copy", 2 * self.tile_kv * self.dim // COPIED_BYTES),
        }

    def roles(self, machine: Machine) -> list[Iterator[Work]]:
        order = {"hopper": hopper, "portable": portable}[self.kernel]
        return [*(order(self, machine, me) for me in range(self.warpgroups)), producer(self, machine)]


def softmax(m: Machine, me: int, step: int) -> Iterator[Work]:
    for kinds in (("FMNMX",), ("EX2", "FFMA", "FADD")):
        work = m.vector(me, "softmax", step, *kinds)
        yield work
        for _ in range(2):  # rounds in which four threads make one number of theirs, for two rows
            yield m.ended(work)
            work = Work(work.role, "softmax", step, {"SHFL": m.loop.counts.SHFL // 4}, lambda: True)
            yield work
        yield m.ended(work)


def rescale(m: Machine, me: int, step: int) -> Iterator[Work]:
    work = m.vector(me, "rescale", step, "F2FP", "FMUL")
    yield work
    yield m.ended(work)


def producer(loop: ForwardLoop, m: Machine) -> Iterator[Work]:
    """K 0, K 1, V 0, K 2, V 1, ..., each as soon as its buffer is free."""
    for first in range(0, m.tiles * m.steps, m.steps):
        tiles = [("K", first)]
        for step in range(first + 1, first + m.steps):
            tiles += [("K", step), ("V", step - 1)]
        for name, step in [*tiles, ("V", first + m.steps - 1)]:
            before = (name, step - loop.stages)
            free = m.all_came(before) if before[1] >= 0 else lambda: True
            yield m.copy(name, step, free)


def hopper(loop: ForwardLoop, m: Machine, me: int) -> Iterator[Work]:
    """A warpgroup of hopper/consumer.py."""
    for first in range(0, m.tiles * m.steps, m.steps):
        s = m.product(me, "S", first)
        yield s
        yield m.ended(s)
        m.came["K", first] += 1
        yield from softmax(m, me, first)
        for step in range(first + 1, first + m.steps):
            if loop.has_turns:
                yield m.wait(lambda: m.turn == me)
            s, pv = m.product(me, "S", step, m.others), m.product(me, "PV", step - 1)
            yield s
            yield pv
            m.turn = (me + 1) % loop.warpgroups
            yield m.ended(s)
            m.came["K", step] += 1
            yield from softmax(m, me, step)
            yield m.ended(pv)
            m.came["V", step - 1] += 1
            yield from rescale(m, me, step - 1)
        last = first + m.steps - 1
        pv = m.product(me, "PV", last)
        yield pv
        yield m.ended(pv)
        m.came["V", last] += 1
        yield from rescale(m, me, last)
        m.ends.append(m.now)


def portable(loop: ForwardLoop, m: Machine, me: int) -> Iterator[Work]:
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
                yield from softmax(m, me, step)
                yield from rescale(m, me, step)
        if step % m.steps == m.steps - 1:
            yield m.ended(product)
            m.ends.append(m.now)
    m.came["V", step] += 1
