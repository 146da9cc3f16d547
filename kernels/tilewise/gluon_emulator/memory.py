"""What is in shared memory, and who may touch it now?

Ordinary reads and writes happen at once. Those of the asynchronous units, copies and matmuls, last from the
instruction that starts them to the wait that ends them, and meanwhile:

    a copy into shared memory    nobody may read or write what it writes
    a matmul or a copy out of it nobody may write what it reads

What ordinary threads have written, the asynchronous units see only after `fence_async_shared()` by the role
that wrote it, and then a barrier that makes all of its warps wait for one another.

    written ── fence ──► fenced ── arrive at a named barrier ─────────► seen by other roles
                            └───── gl.barrier, sync, mbarrier.arrive ─► seen by all

And whoever accesses what another writes must be made to wait, one way or the other: order.py.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl

from .numbers import array, integer, poison, register
from .order import GOING_ON, Accesses, Clock, Event
from .role import Role
from .roles import Roles, place


@dataclass(eq=False)
class Access:
    """What an asynchronous unit reads, or writes."""

    data: np.ndarray[Any, Any]
    by: object  # says in an error message what it is


class Seen(enum.IntEnum):
    WRITTEN = 0
    FENCED = 1
    ARRIVED = 2


@dataclass(eq=False)
class Written:
    """What ordinary threads have written and the asynchronous units do not see yet."""

    data: np.ndarray[Any, Any]
    role: Role
    at: str
    seen: Seen = Seen.WRITTEN

    def is_missed_by(self, role: Role) -> bool:
        """Whether the asynchronous units, set to work by this role, may not see it yet."""
        return role is self.role or self.seen < Seen.ARRIVED


@dataclass(eq=False)
class MBarrier:
    """Completes a phase when `count` arrivals and all bytes expected have come, and begins the next.

    `wait` names the parity of a phase: it goes on if the latest completed phase has it.
    """

    name: str
    count: int
    arrivals: int  # still to come
    bytes: int = 0  # still to come
    in_flight: int = 0  # bytes
    phase: int = 0  # that which is under way
    copies: int = 0  # so far
    clocks: list[Clock] = field(default_factory=lambda: [Clock()])  # by phase, what is known to who waits

    def arrive(self, count: int, role: Role) -> None:
        role.tell(self.clocks[-1])
        self.arrivals -= count
        self.advance()

    def land(self, nbytes: int, clock: Clock) -> None:
        self.clocks[-1].join(clock)
        self.in_flight -= nbytes
        self.bytes -= nbytes
        self.advance()

    def learn(self, role: Role) -> None:
        """A role has waited for the latest phase."""
        if self.phase:
            role.clock.join(self.clocks[self.phase - 1])

    def advance(self) -> None:
        if self.arrivals == self.bytes == 0:
            self.phase += 1
            self.arrivals = self.count
            self.clocks.append(Clock())

    def has_completed(self, parity: int) -> bool:
        return self.phase % 2 != parity

    @property
    def is_idle(self) -> bool:
        return self.arrivals == self.count and self.bytes == 0

    def __str__(self) -> str:
        return (
            f"mbarrier {self.name}: phase {self.phase}, waits for {self.arrivals} of {self.count} arrivals "
            f"and {self.bytes} bytes"
        )


class Memory:
    """All shared memory of one program."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.filling: list[Access] = []  # written by copies in flight
        self.read: list[Access] = []  # read by matmuls, or by copies in flight
        self.written: list[Written] = []
        self.mbarriers: dict[int, MBarrier] = {}  # by address
        self.accesses = Accesses(roles.fault)
        self._buffers: list[np.ndarray[Any, Any]] = []  # kept, so that addresses stay theirs

    def allocate(self, dtype: tl.dtype, shape: Sequence[int], layout: Any) -> SharedMemory:
        self._buffers.append(poison(list(shape), dtype))
        name = f"buffer {len(self._buffers)} ({dtype} {list(shape)}, {place().split(' > ')[-1]})"
        return SharedMemory(self, self._buffers[-1], dtype, layout, name)

    # ---- Rules

    def check_landed(self, memory: SharedMemory, reader: str) -> None:
        for access in self.filling:
            if np.shares_memory(access.data, memory.data):
                raise self.roles.fault(
                    f"{reader} reads or writes {memory.name}, where {access.by} has not landed"
                )

    def check_free(self, memory: SharedMemory, writer: str) -> None:
        self.check_landed(memory, writer)
        for access in self.read:
            if np.shares_memory(access.data, memory.data):
                raise self.roles.fault(f"{writer} overwrites {memory.name}, which {access.by} still reads")

    def check_seen(self, memory: SharedMemory, unit: str) -> None:
        role = self.roles.running
        for written in self.written:
            if written.is_missed_by(role) and np.shares_memory(written.data, memory.data):
                missing = "a barrier" if written.seen else "fence_async_shared() and then a barrier"
                raise self.roles.fault(
                    f"{unit} touches {memory.name}, which {written.role} has written: {missing} of that role "
                    f"must come between; written at {written.at}"
                )

    # ---- What ordinary threads do

    def store(self, memory: SharedMemory, values: np.ndarray[Any, Any]) -> None:
        role = self.roles.running
        self.check_free(memory, "store")
        self.accesses.write(memory.data, self._event(f"{role}: store to {memory.name}"), role.clock)
        self.written.append(Written(memory.data, role, place()))
        memory.data[...] = values

    def load(self, memory: SharedMemory) -> np.ndarray[Any, Any]:
        role = self.roles.running
        self.check_landed(memory, "load")
        self.accesses.read(memory.data, self._event(f"{role}: load of {memory.name}"), role.clock)
        return memory.data.copy()

    # ---- What the asynchronous units do for the role that runs

    def begin(self, by: object) -> None:
        """What `by` reads, it reads from now on."""
        role = self.roles.running
        event = Event(role, GOING_ON, str(by))
        for access in self.read:
            if access.by is by:
                self.accesses.read(access.data, event, role.clock, going_on=by)

    def end(self, by: object) -> None:
        """The role that runs has waited for `by`."""
        self.accesses.end(by, self.roles.running.clock[self.roles.running])

    def overwrite(self, memory: SharedMemory, by: object, barrier: MBarrier) -> Clock:
        """A copy will; returns what is known to whoever waits for it."""
        role, clock = self.roles.running, Clock()
        barrier.copies += 1
        event = Event(barrier, barrier.copies, str(by))
        self.accesses.write(memory.data, event, role.clock)
        role.tell(clock)
        clock[barrier] = barrier.copies
        return clock

    def _event(self, what: str) -> Event:
        role = self.roles.running
        return Event(role, role.clock[role], f"{what} at {place()}")

    # ---- How it becomes visible to them

    def fence(self) -> None:
        self._advance(Seen.WRITTEN, Seen.FENCED)

    def arrive(self) -> None:
        self._advance(Seen.FENCED, Seen.ARRIVED)

    def barrier(self, of_all: bool = False) -> None:
        """All warps of the role that runs, or of each role, have waited for one another."""
        role = self.roles.running
        self.written = [w for w in self.written if not w.seen or not (of_all or w.role is role)]

    def _advance(self, old: Seen, new: Seen) -> None:
        for written in self.written:
            if written.role is self.roles.running and written.seen == old:
                written.seen = new

    # ---- mbarriers

    def mbarrier(self, memory: SharedMemory) -> MBarrier:
        """The mbarrier that lies there."""
        found = self.mbarriers.get(memory.address)
        if found is None:
            raise self.roles.fault(f"uses the mbarrier in {memory.name} before mbarrier.init")
        return found

    def check_ended(self) -> None:
        for mbarrier in self.mbarriers.values():
            if not mbarrier.is_idle:
                raise self.roles.fault(f"the kernel ends and leaves {mbarrier}")


class SharedMemory:
    """A view of a buffer, with the methods of Gluon's `shared_memory_descriptor`."""

    def __init__(
        self, memory: Memory, data: np.ndarray[Any, Any], dtype: tl.dtype, layout: Any, name: str
    ) -> None:
        self.memory = memory
        self.data = data
        self.dtype = dtype
        self.layout = layout
        self.name = name

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def rank(self) -> int:
        return self.data.ndim

    @property
    def numel(self) -> int:
        return self.data.size

    @property
    def nbytes_per_cta(self) -> int:
        return self.data.nbytes

    @property
    def address(self) -> int:
        return self.data.__array_interface__["data"][0]

    def index(self, index: Any) -> SharedMemory:
        at = integer(index)
        if not 0 <= at < self.shape[0]:
            raise self.memory.roles.fault(f"index {at} is not in {self.name}, which has {self.shape[0]}")
        return self._view(self.data[at], f"[{at}]")

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise self.memory.roles.fault(
                f"slice {start}..{start + length} of dimension {dim} is not in {self.name} {self.shape}"
            )
        at = (slice(None),) * dim + (slice(start, start + length),)
        return self._view(self.data[at], f"[{':, ' * dim}{start}:{start + length}]")

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        if math.prod(shape) != self.numel:
            raise self.memory.roles.fault(f"{self.name} {self.shape} cannot be reshaped to {list(shape)}")
        data = self.data.reshape(tuple(shape))
        if not np.may_share_memory(data, self.data):
            raise NotImplementedError(f"reshape of a view that is not contiguous: {self.name} {self.shape}")
        return self._view(data, "")

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(self.data.transpose(tuple(order)), "")

    def load(self, layout: Any = None) -> tl.tensor:
        self.memory.roles.switch()
        return register(self.memory.load(self), self.dtype)

    def store(self, value: tl.tensor) -> None:
        if [int(n) for n in value.shape] != self.shape or value.dtype != self.dtype:
            raise self.memory.roles.fault(
                f"store of {value.dtype} {list(value.shape)} into {self.name} {self.dtype} {self.shape}"
            )
        self.memory.roles.switch()
        self.memory.store(self, array(value))

    def _view(self, data: np.ndarray[Any, Any], suffix: str) -> SharedMemory:
        return SharedMemory(self.memory, data, self.dtype, self.layout, self.name + suffix)
