"""How does a run go on when a kernel hangs or takes its process down? Its work is done in replaceable ones.

A kernel that reads a wrong address leaves its process without a GPU for good; a compiler may crash; a barrier
may wait for ever. Here each piece of work is handed to a worker process, whose end costs that piece alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

STARTING = 60.0  # seconds that a process may spend on the imports of a task, on a slow disk
ENDING = 10.0  # seconds to wait for a process that was killed: a GPU at work may hold it
READY = "ready"
Inside = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Task:
    """One piece of work: `function`, found by its name in its module, called in another process."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float  # after which its process is ended, from when that was ready: imports are over by then
    lane: str = ""  # tasks of different lanes share no process: what one breaks is not the other's


@dataclass(frozen=True)
class Outcome:
    """What became of a task, and how many seconds it took from when its process was ready."""

    task: Task
    seconds: float
    value: Any = None
    error: str = ""  # empty where `value` holds
    broken: bool = False  # its process could not go on
    cut: bool = False  # ended because the time was up, which says nothing about the task
    hung: bool = False  # ended because it had run for as long as it may


class Worker:
    """One process, and the task that it is at."""

    def __init__(self, log: Path, lane: str, preloaded: str, inside: Inside, is_forked: bool) -> None:
        context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
        if is_forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([preloaded, inside.__module__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(log), preloaded, inside))
        self.process.start()
        theirs.close()  # so that its end of the pipe closes with it
        self.lane, self.is_new = lane, True
        self.task: Task | None = None
        self.ready: float | None = None  # when it was, with this task
        self.end = self.last = 0.0

    def give(self, task: Task, last: float) -> None:
        """Start the task; at `last` it is ended in any case."""
        self.task, self.ready, self.last, self.is_new = task, None, last, False
        self.end = min(time.monotonic() + STARTING, last)
        with contextlib.suppress(OSError):  # a process that is gone: `outcome` says so
            self.pipe.send((task.function, task.arguments))

    def outcome(self) -> Outcome | None:
        """What became of the task, once the pipe has something to say or the time is up; None where it was
        only that the process is ready."""
        assert self.task is not None
        task, now = self.task, time.monotonic()
        seconds = 0.0 if self.ready is None else now - self.ready
        try:
            if self.pipe.poll():
                said = self.pipe.recv()
                if said == READY:
                    self.ready, self.end = now, min(now + task.seconds, self.last)
                    return None
                self.task = None
                return Outcome(task, seconds, *said)
        except (EOFError, OSError):
            self.process.join(5)
            return Outcome(task, seconds, error=ending(self.process.exitcode), broken=True)
        if self.end >= self.last:
            return Outcome(task, seconds, error="the time was up", broken=True, cut=True)
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)  # it writes to its log where it is
            time.sleep(0.5)
        if self.ready is None:
            error = f"its process was not ready after {STARTING:.0f} s; workers.log shows where it was"
            return Outcome(task, seconds, error=error, broken=True)
        error = f"not done after {task.seconds:.0f} s; workers.log shows where it was"
        return Outcome(task, seconds, error=error, broken=True, hung=True)

    def close(self) -> bool:
        """End the process, whatever it is at. False where it has not ended even so."""
        self.pipe.close()
        self.process.join(0.1)
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
        self.process.kill()
        self.process.join(ENDING)
        return self.process.exitcode is not None


def ending(code: int | None) -> str:
    """In words, how a process ended that should have gone on."""
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; workers.log has its last words"
    return f"its process ended with exit code {code}; workers.log has its last words"


class Workers:
    """Processes, started when there is work and replaced when they break.

    log: the file that takes what they print. grace: seconds that work in progress gets when the time is up.
    preloaded: a module that each imports as soon as it starts. inside: entered before its tasks, and left
    after them. is_forked: from one that has imported that and done nothing else, which takes no time. CUDA
    does not survive a fork. stuck: how many have not ended although they were killed.
    """

    def __init__(
        self,
        log: Path,
        grace: float,
        preloaded: str = "",
        inside: Inside = contextlib.nullcontext,
        is_forked: bool = False,
    ) -> None:
        self.log, self.grace = log, grace
        self.preloaded, self.inside, self.is_forked = preloaded, inside, is_forked
        self.workers: list[Worker] = []
        self.stuck = 0

    def run(self, tasks: Iterable[Task], until: float, count: int = 1) -> Iterator[Outcome]:
        """Hand out the tasks in order, `count` at a time, until `until` on the monotonic clock; yield what
        became of them as it comes. `tasks` is asked for a task no sooner than one can be given. Processes
        that are there and have nothing to do stay for later."""
        last = until + self.grace
        waiting, more = iter(tasks), True
        while True:
            while more and time.monotonic() < until and len(self.busy) < count:
                task = next(waiting, None)
                more = task is not None
                if task is not None:
                    self.idle(task.lane, count).give(task, last)
            if not self.busy:
                return
            yield from self.wait()

    def hire(self, count: int) -> None:
        """Start so many before there is work: they import side by side meanwhile."""
        while len(self.workers) < count:
            self.start("")

    def start(self, lane: str) -> Worker:
        self.workers.append(Worker(self.log, lane, self.preloaded, self.inside, self.is_forked))
        return self.workers[-1]

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.task is not None]

    def idle(self, lane: str, count: int) -> Worker:
        """A process of this lane without a task; a new one if need be, in the place of one of another lane
        where there are `count`."""
        spare = [worker for worker in self.workers if worker.task is None]
        for worker in spare:
            if worker.lane == lane or worker.is_new:
                worker.lane = lane
                return worker
        if spare and len(self.workers) >= count:
            self.dismiss(spare[0])
        return self.start(lane)

    def wait(self) -> Iterator[Outcome]:
        """What has come to its end, after waiting until something has, or is ready."""
        busy = self.busy
        left = min(worker.end for worker in busy) - time.monotonic()
        ready = wait([worker.pipe for worker in busy], timeout=max(0.0, left))
        for worker in busy:
            if worker.pipe not in ready and time.monotonic() < worker.end:
                continue
            outcome = worker.outcome()
            if outcome is None:
                continue
            if outcome.broken and not self.dismiss(worker):
                note = "its process has not ended: what is timed from now on may share the GPU with it"
                outcome = replace(outcome, error=f"{outcome.error}; {note}")
            yield outcome

    def dismiss(self, worker: Worker) -> bool:
        """End its process; whether it has ended."""
        self.workers.remove(worker)
        ended = worker.close()
        self.stuck += not ended
        return ended

    def close(self) -> None:
        while self.workers:
            self.dismiss(self.workers[-1])


def serve(pipe: Connection, log: str, preloaded: str, inside: Inside) -> None:
    """In the worker process: get ready, then do what is asked for."""
    os.setsid()  # Ctrl-C reaches the parent alone, which ends this process and what it started
    threading.Thread(target=end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    if preloaded:
        importlib.import_module(preloaded)
        start_gpu()
    with inside():
        perform(pipe)


def perform(pipe: Connection) -> None:
    """One task after the other, until the pipe closes."""
    while True:
        try:
            function, arguments = pipe.recv()  # which imports what they need
        except EOFError:
            return
        start_gpu()
        pipe.send(READY)
        value, error = None, ""
        try:
            value = function(*arguments)
        except Exception as raised:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            error = last_lines(raised)
        broken = not gpu_answers()
        pipe.send((value, error, broken))
        if broken:
            return


def end_with_parent() -> None:
    """End this process, and what it started, when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def start_gpu() -> None:
    """Make the GPU ready for this process, where torch was imported and there is one: it takes seconds."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.zeros(1, device="cuda")


def last_lines(raised: Exception, count: int = 6) -> str:
    """The exception and the lines that led to it, as the end of a traceback shows them."""
    lines = [line for line in "".join(traceback.format_exception(raised)).splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def gpu_answers() -> bool:
    """Whether the GPU still works for this process; after an illegal address it never does again."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
