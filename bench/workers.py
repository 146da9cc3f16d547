"""How does a run go on when a kernel hangs or takes its process down? Its work is done in replaceable ones.

A kernel that reads a wrong address leaves its process without a GPU for good; a compiler may crash; a barrier
may wait for ever. Here each piece of work is handed to a worker process, whose end costs that piece alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

STARTING = 90.0  # seconds that a new process may spend on its imports, on a slow disk


@dataclass(frozen=True)
class Task:
    """One piece of work: `function`, found by its name in its module, called in another process."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float  # after which its process is ended


@dataclass(frozen=True)
class Outcome:
    """What became of a task. `broken`: its process could not go on."""

    task: Task
    seconds: float
    value: Any = None
    error: str = ""  # empty where `value` holds
    broken: bool = False
    cut: bool = False  # ended because the time was up, which says nothing about the task


class Worker:
    """One process, and the task that it is at."""

    def __init__(self, log: Path) -> None:
        # Spawned, not forked: CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(log)))
        self.process.start()
        theirs.close()  # so that its end of the pipe closes with it
        self.task: Task | None = None
        self.began = self.end = 0.0
        self.fresh = True

    def give(self, task: Task, last: float) -> None:
        """Start the task; at `last` it is ended in any case."""
        self.task, self.began = task, time.monotonic()
        self.end = min(self.began + task.seconds + self.fresh * STARTING, last)
        self.fresh = False
        with contextlib.suppress(OSError):  # a process that is gone: `outcome` says so
            self.pipe.send((task.function, task.arguments))

    def outcome(self, last: float) -> Outcome:
        """What became of the task, once the pipe has something to say or the time is up."""
        assert self.task is not None
        task, seconds = self.task, time.monotonic() - self.began
        self.task = None
        try:
            if self.pipe.poll():
                value, error, broken = self.pipe.recv()
                return Outcome(task, seconds, value, error, broken)
        except (EOFError, OSError):
            self.process.join(5)
            return Outcome(task, seconds, error=ending(self.process.exitcode), broken=True)
        if self.end >= last:
            return Outcome(task, seconds, error="the time was up", broken=True, cut=True)
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)  # it writes to its log where it is
            time.sleep(0.5)
        error = f"not done after {task.seconds:.0f} s; workers.log shows where it was"
        return Outcome(task, seconds, error=error, broken=True)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self.pipe.close()
        self.process.join(0.1)
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
        self.process.kill()
        self.process.join()


def ending(code: int | None) -> str:
    """In words, how a process ended that should have gone on."""
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; workers.log has its last words"
    return f"its process ended with exit code {code}; workers.log has its last words"


class Workers:
    """Processes, started when there is work and replaced when they break.

    log: the file that takes what they print. grace: seconds that work in progress gets when the time is up.
    """

    def __init__(self, log: Path, grace: float) -> None:
        self.log, self.grace = log, grace
        self.workers: list[Worker] = []

    def run(self, tasks: Iterable[Task], until: float, count: int = 1) -> Iterator[Outcome]:
        """Hand out the tasks in order, each when one of `count` processes is free, until `until` on the
        monotonic clock; yield what became of them as it comes. `tasks` is asked for a task no sooner than
        that."""
        last = until + self.grace
        for worker in self.workers[count:]:
            worker.close()
        del self.workers[count:]
        waiting, more = iter(tasks), True
        while True:
            while more and time.monotonic() < until and sum(w.task is not None for w in self.workers) < count:
                task = next(waiting, None)
                more = task is not None
                if task is not None:
                    self.idle().give(task, last)
            busy = [worker for worker in self.workers if worker.task is not None]
            if not busy:
                return
            yield from self.wait(busy, last)

    def idle(self) -> Worker:
        """A process without a task; a new one if need be."""
        for worker in self.workers:
            if worker.task is None:
                return worker
        self.workers.append(Worker(self.log))
        return self.workers[-1]

    def wait(self, busy: list[Worker], last: float) -> Iterator[Outcome]:
        """What has come to its end, after waiting until something has."""
        left = min(worker.end for worker in busy) - time.monotonic()
        ready = wait([worker.pipe for worker in busy], timeout=max(0.0, left))
        for worker in busy:
            if worker.pipe in ready or time.monotonic() >= worker.end:
                outcome = worker.outcome(last)
                if outcome.broken:
                    worker.close()
                    self.workers.remove(worker)
                yield outcome

    def close(self) -> None:
        while self.workers:
            self.workers.pop().close()


def serve(pipe: Connection, log: str) -> None:
    """In the worker process: do one task after the other until the pipe closes."""
    os.setsid()  # Ctrl-C reaches the parent alone, which ends this process and what it started
    threading.Thread(target=end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
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
