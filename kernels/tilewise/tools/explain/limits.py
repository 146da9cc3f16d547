"""How long must a kernel take at least? Three pipes of the chip, each with so much to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..chips import Chip

Pipe = Literal["matmul", "exponentials", "memory"]
Limit = Literal["matmul", "exponentials", "memory", "programs"]
PIPES: tuple[Pipe, ...] = get_args(Pipe)


@dataclass(frozen=True)
class Limits:
    """Seconds that each pipe needs for its part of the work at the chip's stated rate: floors, not times.

    few_programs: some multiprocessors have no program, and with one on each of them the largest pipe would
    have less to do.
    """

    matmul: float
    exponentials: float
    memory: float
    few_programs: bool = False

    def seconds(self) -> dict[Pipe, float]:
        return {"matmul": self.matmul, "exponentials": self.exponentials, "memory": self.memory}

    @property
    def largest(self) -> Pipe:
        """The pipe that has the most to do."""
        return max(self.seconds().items(), key=lambda item: item[1])[0]

    @property
    def limit(self) -> Limit:
        """What keeps the kernel from being faster: a pipe, or that there are too few programs."""
        return "programs" if self.few_programs else self.largest

    @property
    def overlapped(self) -> float:
        """Seconds if all three work at once all the time: no kernel is faster."""
        return max(self.seconds().values())

    @property
    def in_turns(self) -> float:
        """Seconds if matmuls and exponentials wait for one another, as in a loop that overlaps nothing."""
        return max(self.matmul + self.exponentials, self.memory)


def limits_of(
    chip: Chip, programs: int, flops: int, exponentials: int, moved: int, element_bytes: int, precision: str
) -> Limits:
    """The limits of `programs` that share this work. Multiprocessors without a program do nothing: they
    compute nothing, and take nothing from the memory, of which each gets in at most what the port of its
    shared memory lets through."""
    working = min(programs, chip.multiprocessors)
    if working == 0:
        return Limits(0.0, 0.0, 0.0)
    busy = working / chip.multiprocessors
    ports = working * chip.shared_bytes_a_clock * chip.clock
    found = Limits(
        matmul=flops / (chip.matmul_rate(element_bytes, precision == "tf32") * busy),
        exponentials=exponentials / (chip.exponentials_per_second * busy),
        memory=moved / min(chip.memory_bytes, ports),
    )
    at_the_chips_rate = found.largest == "memory" and ports >= chip.memory_bytes
    return replace(found, few_programs=busy < 1 and not at_the_chips_rate)
