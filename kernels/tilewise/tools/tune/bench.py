"""How good is a tile for a pass? Whether it compiles, answers right and spills, and the time it takes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import triton

from tilewise_reference import Case

from ...kernels.tile import Pass, Tile
from ...parts.numerics import INTERPRETED
from ..words import in_a_line
from .case import FORWARDS, Workload, small, with_every_feature
from .kernels import KERNELS, WORKERS, compiling_ahead, watched

Timer = Callable[[Callable[[], None], int], list[float]]


class Rejected(Exception):
    """A tile that must not be chosen; the message says why."""


class DeviceLost(Exception):
    """A tile after which the GPU answers nothing more in this process."""


@dataclass(frozen=True)
class Verdict:
    """What a check found out: the largest error as a share of what is allowed, and what the kernel takes."""

    error: float
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None


def gpu_times(launch: Callable[[], None], milliseconds: int) -> list[float]:
    """Milliseconds of each launch, by CUDA events, with the L2 cache flushed in between."""
    warmup = max(1, milliseconds // 4)
    times: list[float] = triton.testing.do_bench(launch, warmup=warmup, rep=milliseconds, return_mode="all")
    return times


def interpreter_times(launch: Callable[[], None], milliseconds: int) -> list[float]:
    """One launch by the clock. It says nothing about speed."""
    began = time.perf_counter()
    launch()
    return [(time.perf_counter() - began) * 1e3]


class Bench:
    """A pass over the cases that share a row of the table, on one device."""

    def __init__(
        self,
        work: Pass,
        cases: Sequence[Case],
        device: torch.device,
        check_length: int,
        timer: Timer = interpreter_times if INTERPRETED else gpu_times,
    ) -> None:
        self.work, self.device, self._timer = work, device, timer
        self._timed = {label(case): Workload(case, device) for case in cases}
        self._checked = [Workload(small(case, check_length), device) for case in cases]
        self._every_feature = functools.cache(
            lambda: Workload(with_every_feature(cases[0], check_length, work), device)
        )

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(self._timed)

    @property
    def batch(self) -> int:
        """How many tiles to compile at a time."""
        return 1 if INTERPRETED else WORKERS

    def compile_ahead(self, tiles: Sequence[Tile]) -> None:
        """Compile what checking and timing these tiles will launch, side by side. What fails here fails again
        where it is asked for."""
        if INTERPRETED:
            return
        with suppress(Rejected), self._rejecting():
            self._run_forwards([*self._checked, *self._timed.values()])
        with suppress(Rejected), self._rejecting(), compiling_ahead():
            for tile in tiles:
                for workload in self._checked:
                    workload.answer(self.work, tile)
                for workload in self._timed.values():
                    workload.launcher(self.work, tile)()

    def check(self, tile: Tile) -> Verdict:
        """Hold the answers with this tile against float64, on small problems. Raises Rejected."""
        return self._check(tile, self._checked)

    def check_every_feature(self, tile: Tile) -> Verdict:
        """The same on one call with every feature that makes a kernel larger."""
        return self._check(tile, [self._every_feature()])

    def _check(self, tile: Tile, workloads: Sequence[Workload]) -> Verdict:
        with self._rejecting():
            self._run_forwards(workloads)
        with self._rejecting(), watched() as seen:
            shares = [workload.worst(self.work, tile) for workload in workloads]
        error, name = max(shares)
        if not error <= 1:
            raise Rejected(f"wrong: {name} is {error:.3g} times as far from float64 as is allowed")
        used = [usage for usage in seen if usage.kernel == KERNELS[self.work]]
        if not used:
            return Verdict(error)
        return Verdict(
            error,
            max(usage.registers for usage in used),
            max(usage.spills for usage in used),
            max(usage.shared_bytes for usage in used),
        )

    def _run_forwards(self, workloads: Sequence[Workload]) -> None:
        """What a backward starts from."""
        if self.work not in FORWARDS:
            for workload in workloads:
                workload.forward()

    def time(self, case: str, tile: Tile, milliseconds: int) -> list[float]:
        """Milliseconds of each launch within about so many of timing. Raises Rejected."""
        with self._rejecting():
            return self._timer(self._timed[case].launcher(self.work, tile), milliseconds)

    def time_portable(self, case: str, milliseconds: int) -> list[float]:
        """The same of the portable kernels in Hopper's place, with the tiles that they get here."""
        with self._rejecting():
            return self._timer(self._timed[case].portable_launcher(self.work), milliseconds)

    @contextmanager
    def _rejecting(self) -> Iterator[None]:
        """Whatever a candidate raises is a reason not to choose it."""
        try:
            yield
        except Exception as error:
            reason = in_a_line(error)
            if self.device.type == "cuda" and not still_answers(self.device):
                raise DeviceLost(reason) from error
            raise Rejected(reason) from error


def still_answers(device: torch.device) -> bool:
    """Whether the GPU still works in this process: after an illegal access it does not."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def label(case: Case) -> str:
    """What a case is called in tables and journals."""
    return f"{case.name} {case.dtype}"


def median(times: Sequence[float]) -> float:
    return statistics.median(times)
