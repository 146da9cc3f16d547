"""Several programs at once: threads that hand on one baton, as roles do, and memory that one of them polls.

Programs that tell one another something through global memory, a ticket or a counter, must be right in
whatever order the hardware starts and runs them. So some of them live at once, and at every switch point of
the one that runs the schedule may let another one go on, or start one; and where nothing in a program can go
on, another program must. A program that polls a counter waits until its value changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .numbers import quiet
from .roles import EmulationError, Roles, Stopped
from .schedules import Schedule


class Program:
    """One program, and the thread of it that is asleep while another program runs."""

    def __init__(self, index: tuple[int, ...], roles: Roles) -> None:
        self.index = index
        self.roles: Any = roles
        self.memory: Any = None
        self.thread: threading.Thread | None = None  # None: not started
        self.is_done = False
        self.baton = threading.Semaphore(0)

    def can_go_on(self) -> bool:
        return not self.is_done and (self.thread is None or self.roles.can_go_on())

    def __str__(self) -> str:
        return f"program {self.index}"


class Programs:
    """All programs of a launch, of which at most `together` live at once."""

    def __init__(
        self,
        programs: list[Program],
        together: int,
        schedule: Schedule,
        enter: Callable[[Program], None],
        run: Callable[[Program], None],
    ) -> None:
        """enter: called when a program goes on after another. run: the whole of a program."""
        self._all, self._together, self._schedule = programs, together, schedule
        self._enter, self._run = enter, run
        self._error: BaseException | None = None
        self._ended = threading.Semaphore(0)
        for program in programs:
            program.roles.others = self
        self.running = programs[0]

    def run(self) -> None:
        """Until all have ended."""
        self._go_on(self._schedule.choose_program(None, self._candidates()))
        self._ended.acquire()
        for program in self._all:
            if program.thread is not None:
                program.thread.join()
        if self._error is not None:
            raise self._error

    def switch(self) -> None:
        """A switch point of the program that runs: another one may go on first."""
        if self._error is not None:
            raise Stopped
        if found := self._candidates():
            chosen = self._schedule.choose_program(self.running, found)
            if chosen is not self.running:
                self._hand_on(chosen)

    def wait(self) -> bool:
        """The program that runs cannot go on: another one does. False where none can."""
        if found := self._candidates():
            self._hand_on(self._schedule.choose_program(None, found))
            return True
        return False

    def _candidates(self) -> list[Program]:
        alive = sum(program.thread is not None and not program.is_done for program in self._all)
        room = alive < self._together
        return [each for each in self._all if each.can_go_on() and (each.thread is not None or room)]

    def _hand_on(self, program: Program) -> None:
        """Let it go on, and sleep until this one is chosen again."""
        mine = self.running
        self._go_on(program)
        mine.baton.acquire()
        if self._error is not None:
            raise Stopped

    def _go_on(self, program: Program) -> None:
        self.running = program
        self._enter(program)
        if program.thread is None:
            program.thread = threading.Thread(
                target=self._live, args=(program,), name=f"role 0 of {program}", daemon=True
            )
            program.thread.start()
        else:
            program.baton.release()

    def _live(self, program: Program) -> None:
        """The life of a program's thread."""
        try:
            with quiet():
                self._run(program)
            program.is_done = True
            if all(each.is_done for each in self._all):
                self._ended.release()
            elif found := self._candidates():
                self._go_on(self._schedule.choose_program(None, found))
            else:
                raise EmulationError(self.deadlock())
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        """Keep the first error, and wake everybody so that they end."""
        if self._error is None:
            self._error = error
            for program in self._all:
                program.baton.release()
            self._ended.release()

    def deadlock(self) -> str:
        alive = [each for each in self._all if each.thread is not None and not each.is_done]
        found = [f"{program}: {program.roles.deadlock()}" for program in alive]
        return "\n".join(["no program can go on", *found])
