"""What is known of a call that several GPUs share, in plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..findings import Work
from ..workload import Allocation
from .memory import peak


@dataclass(frozen=True)
class Steps:
    """What there is to hide in a ring, and under what, in seconds: the longest message of a step, and the
    shortest and the longest time of the kernels of one whose keys came in a message."""

    message: float
    shortest: float
    longest: float


@dataclass(frozen=True)
class Pass:
    """The forward or the backward by one method; a number a rank, but for `on_link` and `seconds`.

    sent, received: bytes. compute: the least seconds of a rank's kernels. on_link: the seconds in which the
    busiest link carries its bytes. seconds: until the last rank is done. steps: of a ring that sends.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    compute: tuple[float, ...]
    on_link: float
    seconds: float
    steps: Steps | None = None

    @property
    def busiest(self) -> float:
        """The most seconds that the kernels of a rank take."""
        return max(self.compute)

    @property
    def exposed(self) -> float:
        """The seconds that communication, and waiting for others, add to those of the busiest rank."""
        return max(0.0, self.seconds - self.busiest)


@dataclass(frozen=True)
class Method:
    """One method: what each rank does, or why it cannot be."""

    name: str  # as `context_parallel_attention` takes it; of a mesh "ring, heads"
    mesh: tuple[int, ...]
    why_not: str = ""
    pairs: tuple[int, ...] = ()  # of query and key that count, of each rank
    forward: Pass | None = None
    backward: Pass | None = None
    memory: tuple[Allocation, ...] = ()  # of one rank

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(x for x in (self.forward, self.backward) if x is not None)

    @property
    def seconds(self) -> float:
        return sum(x.seconds for x in self.passes)

    @property
    def balance(self) -> float:
        """The pairs of the busiest rank over the mean; 1 where all have the same."""
        total = sum(self.pairs)
        return max(self.pairs) * len(self.pairs) / total if total else 1.0

    @property
    def bytes(self) -> int:
        """The memory that a rank needs, in the forward or the backward, whichever is more."""
        return peak(self.memory)

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for name, each in (("forward", self.forward), ("backward", self.backward)):
            if each is not None:
                found[name] |= dict(busiest=each.busiest, exposed=each.exposed)
        if not self.why_not:
            found |= dict(seconds=self.seconds, balance=self.balance, bytes=self.bytes)
        return found


@dataclass(frozen=True)
class RanksFindings:
    """Counts, bytes and seconds. Times are floors by the chip's datasheet and the link's rate, not forecasts:
    nothing is said of latency, and nothing of copies inside a GPU."""

    work: Work
    ranks: int
    order: str
    link: tuple[float, ...]  # bytes a second and direction; of a mesh across and within
    gpu: str
    gpu_because: str
    sizes: dict[str, int]  # of the whole call
    dtype: str
    pairs: int
    pairs_that_count: int
    exact: bool  # False: a mask could not be evaluated here, and pairs are those at most
    notes: tuple[str, ...]
    one_device: tuple[float, ...]  # the least seconds of the whole call on one: forward, and of its backward
    methods: tuple[Method, ...]
    best: str  # the name of a method
    because: str

    def __getitem__(self, name: str) -> Method:
        """The method of that name. Raises KeyError."""
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        found = {field: value for field, value in vars(self).items() if field != "methods"}
        return found | {"methods": [method.to_dict() for method in self.methods]}
