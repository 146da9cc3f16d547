"""The loop of Hopper's backward: what a consumer, the producer and the warp that adds dQ do in a step.

Who waits for whom is as in hopper/. All consumers have 64 keys each, and walk the same rows.

    S  = K Qᵀ    dP = V dOᵀ     [64, tile_q]     both operands in shared memory
    dV += Pᵀ dO  dK += dSᵀ Q    [64, dim]        the left one in registers
    dQ = dS K                   [64, columns]    over all keys of the program, a part a consumer

What the machine leaves out, the port of shared memory, is counted apart, for here it is as busy as the tensor
cores: `port_clocks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..chips import Chip
from .machine import COPIED_BYTES, Cost, Counts, Machine, Work

KEYS = 64  # of a consumer


@dataclass(frozen=True)
class BackwardLoop:
    """The full loop: its tile, its instructions, and how it is run."""

    dim: int  # of queries, keys and values
    tile_q: int  # rows a step
    counts: Counts
    stores: int  # instructions of a thread that put dS and dQ into shared memory
    warpgroups: int = 2
    stages: int = 2
    latency: int = 30

    needs = {"S": "Q", "dP": "dO", "dV": "dO", "dK": "Q"}  # noqa: RUF012

    @property
    def columns(self) -> int:
        """Of the 64 rows of dQ that a consumer computes."""
        return self.tile_q * self.dim // (64 * self.warpgroups)

    @property
    def matmuls(self) -> dict[str, int]:
        along_dim, along_rows = self.dim // 16, self.tile_q // 16
        along_keys = self.warpgroups * KEYS // 16
        return {"S": along_dim, "dP": along_dim, "dV": along_rows, "dK": along_rows, "dQ": along_keys}

    def operand_bytes(self) -> dict[str, int]:
        """What an instruction of each product reads of shared memory."""
        both = 32 * (KEYS + self.tile_q)
        right = 32 * self.dim
        return {"S": both, "dP": both, "dV": right, "dK": right, "dQ": 32 * (64 + self.columns)}

    def costs(self, chip: Chip) -> dict[str, Cost]:
        n_clocks = 2 * 64 * 16 / chip.matmul_flops
        columns = {
            "S": self.tile_q, "dP": self.tile_q, "dV": self.dim, "dK": self.dim, "dQ": self.columns
        }  # fmt: skip
        operands = self.operand_bytes()
        products = {
            name: Cost("tensor", max(n_clocks * columns[name], operands[name] / chip.shared_bytes_a_clock))
            for name in columns
        }
        return products | {"copy": Cost("copy", 2 * self.tile_q * self.dim // COPIED_BYTES)}

    def roles(self, machine: Machine) -> list[Iterator[Work]]:
        consumers = [consumer(self, machine, me) for me in range(self.warpgroups)]
        return [*consumers, producer(self, machine), reducer(self, machine)]


def port_clocks(loop: BackwardLoop, chip: Chip) -> float:
    """Clocks of a step of all consumers in which something passes the port of shared memory: operands, dS on
    its way in, dQ on its way in and out, Q and dO as they land."""
    operands = sum(loop.matmuls[name] * moved for name, moved in loop.operand_bytes().items())
    scores = 2 * KEYS * loop.tile_q
    gradient = 2 * 4 * loop.tile_q * loop.dim
    landed = 2 * 2 * loop.tile_q * loop.dim
    return (loop.warpgroups * (operands + scores) + gradient + landed) / chip.shared_bytes_a_clock


def producer(loop: BackwardLoop, m: Machine) -> Iterator[Work]:
    """Q 0, dO 0, Q 1, dO 1, ..., each as soon as its buffer is free."""
    for step in range(m.tiles * m.steps):
        for name in ("Q", "dO"):
            before = (name, step - loop.stages)
            yield m.copy(name, step, m.all_came(before) if before[1] >= 0 else lambda: True)


def reducer(loop: BackwardLoop, m: Machine) -> Iterator[Work]:
    """The warp that has dQ added to memory, a step at a time; fp32 takes as long as two copies of Q."""
    for step in range(m.tiles * m.steps):
        yield m.wait(m.all_came(("dQ", step)))
        leaving = Work("copies", "dQ", step, {"copy": 2}, lambda: True)
        m.copies["dQ", step] = leaving
        yield leaving
        yield m.ended(leaving)


def part(m: Machine, me: int, name: str, step: int, **left: int) -> Work:
    return Work(f"warpgroup {me + 1}", name, step, left, lambda: True)


def consumer(loop: BackwardLoop, m: Machine, me: int) -> Iterator[Work]:
    """A warpgroup of hopper/backward/: dQ leaves under dK."""
    counts = loop.counts
    for step in range(m.tiles * m.steps):
        s, dp = m.product(me, "S", step, m.others // 2), m.product(me, "dP", step)
        yield s
        yield dp
        yield m.ended(s)
        half = counts._replace(FADD=counts.FADD // 2, F2FP=counts.F2FP // 2)
        p = part(m, me, "P", step, EX2=counts.EX2, FFMA=counts.FFMA, FADD=half.FADD, F2FP=half.F2FP)
        yield p
        yield m.ended(p)
        dv = m.product(me, "dV", step)
        yield dv
        yield m.ended(dp)
        ds = part(m, me, "dS", step, FADD=half.FADD, FMUL=counts.FMUL, F2FP=half.F2FP)
        yield ds
        yield m.ended(ds)
        stored = part(m, me, "store", step, other=m.others - m.others // 2)
        yield stored
        yield m.ended(stored)
        m.came["dS", step] += 1
        yield m.wait(m.all_came(("dS", step)))
        dq, dk = m.product(me, "dQ", step), m.product(me, "dK", step)
        yield dq
        yield dk
        yield m.ended(dv)
        yield m.ended(dq)
        if step:  # its place is free once the step before has left
            yield m.wait(m.landed("dQ", step - 1))
        stored = part(m, me, "store", step, other=loop.stores)
        yield stored
        yield m.ended(stored)
        m.came["dQ", step] += 1
        yield m.ended(dk)
        m.came["Q", step] += 1
        m.came["dO", step] += 1
        if step % m.steps == m.steps - 1:
            m.ends.append(m.now)
