"""Who goes on next? On a GPU roles run side by side and copies take their time; a schedule picks one order.

Only one role runs at a time. At every switch point of the one that runs (a barrier, a copy, a matmul, or when
it touches shared memory) the schedule is asked which role goes on, or which copy in flight happens first.
What it picks from can all happen on a GPU: an order in which the kernel fails shows a mistake, and one in
which it does not proves nothing about the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from .role import Copy, ProgramLike, Role

Program = TypeVar("Program", bound=ProgramLike)


class Schedule:
    """A program, and in it a role, goes on until it has to wait, then the next one does. A copy happens when
    no role can go on: one that somebody waits for, if there is any. Always the same order, and the fastest to
    emulate."""

    def choose(self, running: Role, roles: Sequence[Role], copies: Sequence[Copy]) -> Role | Copy:
        """One of the roles that can go on, or of the copies in flight; those that somebody waits for come
        first. There is at least one of either."""
        if running in roles:
            return running
        if roles:
            return next((role for role in roles if role.number > running.number), roles[0])
        return copies[0]

    def choose_program(self, running: Program | None, programs: Sequence[Program]) -> Program:
        """One of the programs that can go on, or that one that runs; None: it cannot. Where only one lives at
        a time, nobody asks."""
        return programs[0] if running is None else running


class SlowMemory(Schedule):
    """What is to be added to global memory arrives there as late as it can, and that of a program which has
    waited longer later than that of others: programs with less under way go first."""

    def choose(self, running: Role, roles: Sequence[Role], copies: Sequence[Copy]) -> Role | Copy:
        return super().choose(running, roles, [copy for copy in copies if not copy.outlives] or copies)

    def choose_program(self, running: Program | None, programs: Sequence[Program]) -> Program:
        def under_way(program: Program) -> tuple[bool, int, bool]:
            late = sum(copy.outlives for copy in program.roles.copies)
            is_stuck = late == len(program.roles.copies) and not program.roles.some_can_go_on()
            return is_stuck and program.thread is not None, late, program is not running

        return min(programs, key=under_way)


class RandomSchedule(Schedule):
    """Every role that can go on is as likely as any other, and as the copies together. The seed fixes the
    order; use one schedule for one `emulate`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, running: Role, roles: Sequence[Role], copies: Sequence[Copy]) -> Role | Copy:
        at = self._random.randrange(len(roles) + bool(copies))
        return roles[at] if at < len(roles) else self._random.choice(copies)

    def choose_program(self, running: Program | None, programs: Sequence[Program]) -> Program:
        return self._random.choice(programs) if running is None or self._random.random() < 0.1 else running


class PriorityChange(Schedule):
    """Of those that can go on, the one of the highest priority does. Roles and the copy engine draw their
    priorities at random, and at `changes` random points among the first `steps` whoever would go on falls
    behind all others. This starves somebody for a long time, which a random order hardly ever does.

    Method: Burckhardt, Kothari, Musuvathi & Nagarakatte, "A randomized scheduler with probabilistic
    guarantees of finding bugs" (ASPLOS 2010): a bug that needs `changes` + 1 events in a certain order is
    found with a probability of at least 1 / (roles · steps ** changes), and in practice far more often.
    """

    def __init__(self, seed: int, changes: int, steps: int = 500) -> None:
        self._random = random.Random(seed)
        self._points = sorted(self._random.sample(range(steps), changes), reverse=True)
        self._program_priorities: dict[tuple[int, ...], float] = {}
        self._priorities: dict[int, float] = {}  # by the role's number; the copy engine's is -1
        self._steps = 0
        self._lowest = 0.0

    def choose(self, running: Role, roles: Sequence[Role], copies: Sequence[Copy]) -> Role | Copy:
        numbers = [role.number for role in roles] + [-1] * bool(copies)
        best = max(numbers, key=self._priority)
        if self._points and self._points[-1] <= self._steps:
            self._points.pop()
            self._lowest -= 1
            self._priorities[best] = self._lowest
            best = max(numbers, key=self._priority)
        self._steps += 1
        return self._random.choice(copies) if best == -1 else roles[numbers.index(best)]

    def _priority(self, number: int) -> float:
        return self._priorities.setdefault(number, self._random.random())

    def choose_program(self, running: Program | None, programs: Sequence[Program]) -> Program:
        if running is not None and self._random.random() > 0.02:
            return running
        return max(programs, key=lambda program: self._program_priority(program.index))

    def _program_priority(self, index: tuple[int, ...]) -> float:
        return self._program_priorities.setdefault(index, self._random.random())
