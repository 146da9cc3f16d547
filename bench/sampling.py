"""How long does a call take? Samples of several calls, taken in turns, so that what drifts hits all alike.

On a GPU a sample is the time between two CUDA events. Before each of them the L2 cache is flushed, and the
GPU then sleeps for longer than the host needs to enqueue the call: host work is not in the sample, and one
where the GPU was faster all the same is thrown away. On a CPU, and for the host's own cost, it is the time
that passed for the host.

    warm-up      each call alone, until the medians of two successive batches agree
    rounds       each call once, in another order each round, until the seconds are spent
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Calls = dict[str, Call]

STEADY = 0.02  # medians of successive warm-up batches that differ by less count as equal
BATCH, BATCHES = 5, 12  # calls in a warm-up batch; batches at most
WARM_UP_SHARE = 0.3  # of the seconds, at most
RESOLUTION = 0.5e-6  # of a CUDA event, by NVIDIA's documentation, in seconds
MANY_RESOLUTIONS = 20  # a sample covers so many of them, or is the mean of several calls
MOST_LEAD = 5e-3  # the longest sleep before a call, in seconds
FASTEST_CLOCK = 2.5e9  # Hz; torch.cuda._sleep counts cycles, and a slower clock only sleeps longer
L2_TIMES = 5  # the buffer that flushes L2 is so many times its size


@dataclass(frozen=True)
class Within:
    """A call that is timed while something else holds; entering and leaving that is not timed on the host."""

    call: Call
    during: Callable[[], AbstractContextManager[Any]]

    def __call__(self) -> Any:
        with self.during():
            return self.call()


class Recorder(Protocol):
    """Takes time. `typical` is what the call took so far, None the first time."""

    def start(self, call: Call, typical: float | None) -> Any:
        """Run the call, perhaps several times; what `seconds` needs to know."""

    def seconds(self, mark: Any) -> float:
        """The time of one call, once it has ended."""


class EventRecorder:
    """Times on a GPU."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, buffer: Any = None) -> None:
        self.cuda, self.device = cuda, device
        if buffer is None:
            size = L2_TIMES * cuda.get_device_properties(device).L2_cache_size
            buffer = torch.empty(max(1, size), dtype=torch.int8, device=device)
        self.buffer = buffer
        self.leads: dict[Hashable, float] = {}

    def start(self, call: Call, typical: float | None) -> list[tuple[Any, Any]]:
        return [self._timed(call) for _ in range(self.calls_a_sample(typical))]

    def seconds(self, mark: list[tuple[Any, Any]]) -> float:
        self.cuda.synchronize(self.device)
        return statistics.fmean(first.elapsed_time(last) for first, last in mark) / 1e3

    @staticmethod
    def calls_a_sample(typical: float | None) -> int:
        """A sample of a short call is the mean of several, each flushed and timed on its own."""
        if not typical:
            return 1
        return min(MANY_RESOLUTIONS, math.ceil(MANY_RESOLUTIONS * RESOLUTION / typical))

    def _timed(self, call: Call) -> tuple[Any, Any]:
        lead = self.leads.get(call, 0.0)
        while True:
            first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.zero_()
            self.cuda._sleep(round(lead * FASTEST_CLOCK))
            first.record()
            began = time.perf_counter()
            call()
            host = time.perf_counter() - began
            late = first.query()  # the GPU was there before all was enqueued
            last.record()
            enough = min(MOST_LEAD, 2 * host + 20e-6)
            if not late or lead >= MOST_LEAD:
                self.leads[call] = enough
                return first, last
            lead = min(MOST_LEAD, max(2 * lead, enough))


class HostRecorder:
    """Times on the host: all of a CPU's work, or what it costs to enqueue a GPU's."""

    def __init__(self, wait: Callable[[], Any] = lambda: None, least: float = 1e-3, most_calls: int = 64):
        # A GPU's queue holds about 1000 launches, beyond which enqueueing waits for the GPU.
        self.wait, self.least, self.most_calls = wait, least, most_calls

    def start(self, call: Call, typical: float | None) -> float:
        repeats = 1 if not typical else min(self.most_calls, math.ceil(self.least / typical))
        during: Callable[[], AbstractContextManager[Any]] = nullcontext
        if isinstance(call, Within):
            during = call.during
            call = call.call
        with during():
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = (time.perf_counter() - began) / repeats
        self.wait()
        return seconds

    def seconds(self, mark: float) -> float:
        return mark


def recorder_for(device: torch.device | str, host: bool = False) -> Recorder:
    """The recorder of a device; with `host`, of the host's cost of using it."""
    device = torch.device(device)
    if device.type == "cuda":
        return HostRecorder(lambda: torch.cuda.synchronize(device)) if host else EventRecorder(device)
    return HostRecorder()


def sample(
    calls: Calls,
    seconds: float,
    device: torch.device | str,
    rounds: int = 200,
    *,
    least: int = 3,
    seed: int = 0,
    recorder: Recorder | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, a number a round: at most `rounds`, and as many as fit into `seconds`, warm-up
    included, but never fewer than `least`. With no seconds at all there is no warm-up.

    A call that raises is handed to `on_failure`, its samples are dropped and the others go on; without
    `on_failure` the exception goes to the caller.
    """
    recorder = recorder or recorder_for(device)
    began, order = clock(), random.Random(seed)
    running = dict(calls)
    typical: dict[str, float | None] = dict.fromkeys(calls)
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:
            if on_failure is None:
                raise
            del running[name], taken[name]
            on_failure(name, error)
            return None

    share = WARM_UP_SHARE * seconds / max(1, len(calls))
    for name, call in calls.items() if seconds else ():
        typical[name] = attempt(name, warm_up, call, share, recorder, clock)
    for done in range(rounds):
        if done >= least and clock() - began >= seconds:
            break
        names = list(running)
        order.shuffle(names)
        marks = {name: attempt(name, recorder.start, running[name], typical[name]) for name in names}
        for name in [name for name in names if name in running]:
            value = attempt(name, recorder.seconds, marks[name])
            if value is not None:
                taken[name].append(value)
    return taken


def warm_up(call: Call, seconds: float, recorder: Recorder, clock: Callable[[], float]) -> float:
    """Run the call until its time is steady or the seconds are spent; its median at the end."""
    began = clock()
    median: float | None = None
    for _ in range(BATCHES):
        batch: list[float] = []
        while len(batch) < BATCH and not (batch and clock() - began >= seconds):
            batch.append(recorder.seconds(recorder.start(call, median)))
        before, median = median, statistics.median(batch)
        steady = before is not None and abs(median - before) <= STEADY * before
        if steady or clock() - began >= seconds:
            break
    assert median is not None
    return median
