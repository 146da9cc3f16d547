"""Who runs, and who waits for whom? Roles as threads that hand one baton on, named barriers, deadlock.

    kernel ──► warp_specialize ──┬── role 0, the default: the thread of the caller ──┬──► kernel
                                 ├── role 1 ─────────────────────────────────────────┤
                                 └── role 2 ─────────────────────────────────────────┘

A role is some warps that run the same code; here all of its warps are one. A thread runs while it holds the
baton, up to a switch point where the schedule gives it to somebody else, so roles take turns and never race.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from .numbers import quiet
from .order import Clock
from .role import Copy, Role
from .schedules import Schedule

EMULATED = "__emulated__"  # in the globals of every function of the kernel: translate.py


class EmulationError(RuntimeError):
    """The kernel breaks a rule of the machine. Says which role does, what it breaks, and where."""


class Stopped(BaseException):
    """Ends a role because another has failed."""


def place() -> str:
    """Where the kernel is, the innermost call last: "forward.py:160 consume > channels.py:80 wait_full"."""
    calls = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if EMULATED in frame.f_globals:
            calls.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(calls))


@dataclass(eq=False)
class NamedBarrier:
    """One of the sixteen: counts `threads` threads, then lets those go that wait, and begins anew."""

    number: int
    threads: int = 0  # what the first to come expects
    counted: list[Role] = field(default_factory=list)
    generation: int = 0
    clocks: list[Clock] = field(default_factory=lambda: [Clock()])  # by generation, what those counted knew

    def __str__(self) -> str:
        if not self.counted:
            return f"named barrier {self.number}: nobody"
        count = sum(role.threads for role in self.counted)
        names = ", ".join(map(str, self.counted))
        return f"named barrier {self.number}: {count} of {self.threads} threads, those of {names}"


class Roles:
    """The roles of one program, and the baton."""

    def __init__(self, schedule: Schedule, warps: int) -> None:
        self.schedule = schedule
        self.main = Role(0, "kernel", warps)
        self.all = [self.main]
        self.running = self.main
        self.copies: list[Copy] = []
        self.named = {number: NamedBarrier(number) for number in range(16)}
        self.other_barriers: Collection[object] = ()  # for the report of a deadlock
        self.others: Any = None  # the other programs, where several live at once: programs.py
        self._error: BaseException | None = None

    def fault(self, text: str) -> EmulationError:
        """What to raise when the role that runs breaks a rule."""
        where = place()
        return EmulationError(f"{self.running}: {text}" + (f"\n    at {where}" if where else ""))

    # ---- The baton

    def switch(self) -> None:
        """A switch point: others may go on first, and copies happen."""
        self._pass_on()

    def wait(self, ready: Callable[[], bool], waits_for: str, awaits: object = None) -> None:
        """Let others go on until `ready`."""
        role = self.running
        role.ready, role.awaits = ready, awaits
        role.waits_for = f"{waits_for}\n        at {place()}"
        self._pass_on()
        role.ready = role.awaits = None

    def _pass_on(self) -> None:
        role = self.running
        if self._error is not None:
            raise Stopped
        if self.others is not None:
            self.others.switch()
        while True:
            ready = [other for other in self.all if other.can_go_on()]
            if not ready and not self.copies:
                if self.others is not None and self.others.wait():
                    continue
                raise EmulationError(self.deadlock() if self.others is None else self.others.deadlock())
            awaited = {id(other.awaits) for other in self.all if other.awaits is not None}
            self.copies.sort(key=lambda copy: id(copy.signals) not in awaited)
            chosen = self.schedule.choose(role, ready, self.copies)
            if isinstance(chosen, Role):
                break
            self.copies.remove(chosen)
            chosen.happen()
        if chosen is not role:
            self.running = chosen
            chosen.baton.release()
            if not role.is_done:
                role.baton.acquire()
                if self._error is not None:
                    raise Stopped

    def can_go_on(self) -> bool:
        return bool(self.copies) or self.some_can_go_on()

    def some_can_go_on(self) -> bool:
        return any(role.can_go_on() for role in self.all)

    def deadlock(self) -> str:
        waiting = [f"    {role} waits for {role.waits_for}" for role in self.all if not role.is_done]
        busy = [barrier for barrier in self.named.values() if barrier.counted or barrier.generation]
        barriers = [f"    {barrier}" for barrier in [*busy, *self.other_barriers]]
        return "\n".join(["deadlock: no role can go on", *waiting, "Barriers:", *(barriers or ["    none"])])

    # ---- Threads

    def specialize(
        self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], worker_warps: Sequence[int]
    ) -> Any:
        """Run the first function in the caller's thread and role, each other one in its own."""
        if len(functions) != len(worker_warps) + 1:
            raise self.fault(f"{len(worker_warps)=} must be one less than {len(functions)=}")
        if len(self.all) > 1:
            raise self.fault("warp_specialize inside of warp_specialize")
        (first, arguments), *others = functions
        self.main.name = first.__name__
        for (function, _), warps in zip(others, worker_warps, strict=True):
            self.all.append(Role(len(self.all), function.__name__, warps))
            self.main.tell(self.all[-1].clock)
        threads = [
            threading.Thread(target=self._work, args=(role, *other), name=str(role), daemon=True)
            for role, other in zip(self.all[1:], others, strict=True)
        ]
        for thread in threads:
            thread.start()
        result = None
        try:
            result = first(*arguments)
            self.wait(lambda: all(role.is_done for role in self.all[1:]), "the other roles to end")
            for role in self.all[1:]:
                self.main.clock.join(role.clock)
        except BaseException as error:
            self._stop(error)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        self.all = [self.main]
        return result

    def _work(self, role: Role, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """The life of a worker's thread."""
        role.baton.acquire()
        try:
            if self._error is None:
                with quiet():
                    function(*arguments)
                self.check_ended(role)
                role.is_done = True
                self._pass_on()
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        """Keep the first error, and wake everybody so that they end."""
        if self._error is None:
            self._error = error
            for role in self.all:
                role.baton.release()

    # ---- Named barriers

    def arrive(self, number: int, threads: int) -> None:
        """The role is counted at a named barrier."""
        self._count(number, threads)

    def sync(self, number: int, threads: int) -> None:
        """The role is counted, and waits until all have been."""
        barrier = self._count(number, threads)
        generation = barrier.generation - (not barrier.counted)  # the one in which this role was counted
        self.wait(lambda: barrier.generation != generation, f"named barrier {number}")
        self.running.clock.join(barrier.clocks[generation])

    def _count(self, number: int, threads: int) -> NamedBarrier:
        role, workers = self.running, len(self.all) - 1
        if not 0 <= number < 16:
            raise self.fault(f"named barrier {number} must be one of 0..15")
        if number < 2 + workers:
            raise self.fault(
                f"named barrier {number} is Triton's own: it keeps 0..{1 + workers} for a kernel with "
                f"{workers} workers"
            )
        barrier = self.named[number]
        if role in barrier.counted:
            raise self.fault(f"comes a second time before the others have come to {barrier}")
        if not barrier.counted:
            barrier.threads = threads
        elif barrier.threads != threads:
            raise self.fault(f"expects {threads} threads, but there is {barrier}")
        count = role.threads + sum(other.threads for other in barrier.counted)
        if threads % 32:
            raise self.fault(f"expects {threads} threads at named barrier {number}, which are no whole warps")
        if count > threads:
            raise self.fault(f"its {role.threads} threads are too many for {threads}: {barrier}")
        barrier.counted.append(role)
        role.tell(barrier.clocks[-1])
        if count == threads:
            barrier.counted.clear()
            barrier.generation += 1
            barrier.clocks.append(Clock())
        return barrier

    # ---- The end

    def check_ended(self, role: Role) -> None:
        """Nothing of a role may go on after its end."""
        if role.products:
            raise self.fault(f"ends, but never waits for {role.products[0]}")
        if role.stores:
            raise self.fault(f"ends, but never waits for {role.stores[0]}")

    def check_all_ended(self) -> None:
        self.check_ended(self.main)
        for copy in [copy for copy in self.copies if copy.outlives]:
            self.copies.remove(copy)
            copy.happen()
        if self.copies:
            raise self.fault(f"the kernel ends, but nobody has waited for {self.copies[0]}")
        for barrier in self.named.values():
            if barrier.counted:
                raise self.fault(f"the kernel ends and leaves {barrier}")
