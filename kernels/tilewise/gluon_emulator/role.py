"""Some warps that run the same code, a copy in flight, a program: what a schedule picks from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .order import Clock


class Copy(Protocol):
    """A copy in flight."""

    @property
    def signals(self) -> object:
        """What a role waits for that waits for this copy."""

    @property
    def outlives(self) -> bool:
        """Whether it may happen after the program's end."""

    def happen(self) -> None: ...


class ProgramLike(Protocol):
    """One of several programs that live at once: programs.py."""

    index: tuple[int, ...]
    roles: Any
    thread: threading.Thread | None  # None: it has not started


@dataclass(eq=False)
class Role:
    """Some warps that run one function."""

    number: int
    name: str
    warps: int
    products: list[Any] = field(default_factory=list)  # asynchronous matmuls not yet waited for: matmul.py
    stores: list[Any] = field(default_factory=list)  # TMA stores not yet waited for: copies.py
    writes: list[Any] = field(default_factory=list)  # of these and those before, what memory may not have yet
    polled: Any = None  # the address that it has read last by an atomic, and the value there
    ready: Callable[[], bool] | None = None  # while it waits: whether it can go on
    waits_for: str = ""
    awaits: object = None  # the `signals` of the copies that it waits for
    is_done: bool = False
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    clock: Clock = field(default_factory=Clock)  # what it knows to have happened

    def __post_init__(self) -> None:
        self.clock[self] = 1

    def tell(self, to: Clock) -> None:
        self.clock.tell(self, to)

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def can_go_on(self) -> bool:
        return not self.is_done and (self.ready is None or self.ready())

    def __str__(self) -> str:
        return f"role {self.number} ({self.name})"
