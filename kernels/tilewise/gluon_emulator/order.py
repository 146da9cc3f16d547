"""What must have happened before what? Vector clocks, and accesses to shared memory that nobody has ordered.

Two accesses of which one writes are a race unless the program makes one wait for the other, whoever comes
first in the order that is emulated, and whatever is written. So a race shows in nearly every order:

    unit     whoever acts: a role, or the copies that signal one mbarrier
    time     a unit's own count of what it has told others so far
    clock    of each unit, up to which time another knows what it has done

Who arrives at a barrier tells it his clock; who waits there learns the clocks of all that arrived.
Method: Flanagan & Freund, "FastTrack: efficient and precise dynamic race detection" (PLDI 2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class Clock(dict[object, int]):
    def join(self, other: Clock) -> None:
        for unit, time in other.items():
            self[unit] = max(self.get(unit, 0), time)

    def tell(self, unit: object, to: Clock) -> None:
        """This clock is the unit's: `to` learns it, and of what the unit does from now on nothing."""
        to.join(self)
        self[unit] += 1


@dataclass(frozen=True)
class Event:
    unit: object
    time: float  # infinite: it is going on
    what: str

    def is_known_to(self, clock: Clock) -> bool:
        return clock.get(self.unit, 0) >= self.time


@dataclass
class View:
    """A part of shared memory that was accessed as one, and by whom last."""

    data: np.ndarray[Any, Any]
    write: Event | None = None
    reads: dict[object, Event] = field(default_factory=dict)  # by unit, or by what is going on


class Accesses:
    """All that a program has done to its shared memory, as far as it can still be part of a race."""

    def __init__(self, fault: Callable[[str], Exception]) -> None:
        self._fault = fault
        self._views: dict[object, View] = {}

    def write(self, data: np.ndarray[Any, Any], event: Event, clock: Clock) -> None:
        """clock: of the unit that writes, or has it written."""
        for view in self._overlapping(data):
            for other in (view.write, *view.reads.values()):
                self._check(event, other, clock)
        view = self._view(data)
        view.write = event
        view.reads.clear()

    def read(
        self, data: np.ndarray[Any, Any], event: Event, clock: Clock, going_on: object | None = None
    ) -> None:
        """going_on: what reads from now on, until `end`."""
        for view in self._overlapping(data):
            self._check(event, view.write, clock)
        self._view(data).reads[event.unit if going_on is None else going_on] = event

    def end(self, going_on: object, time: int) -> None:
        """What was going on is over, at this time of its unit."""
        for view in self._views.values():
            if event := view.reads.pop(going_on, None):
                view.reads[event.unit] = Event(event.unit, time, event.what)

    def _check(self, event: Event, other: Event | None, clock: Clock) -> None:
        if other is not None and not other.is_known_to(clock):
            raise self._fault(
                f"{event.what}, unordered with {other.what}: nothing makes one wait for the other"
            )

    def _view(self, data: np.ndarray[Any, Any]) -> View:
        return self._views.setdefault(self._key(data), View(data))

    def _overlapping(self, data: np.ndarray[Any, Any]) -> Iterator[View]:
        return (view for view in self._views.values() if np.shares_memory(view.data, data))

    @staticmethod
    def _key(data: np.ndarray[Any, Any]) -> object:
        return data.__array_interface__["data"][0], data.shape, data.strides


GOING_ON = math.inf
