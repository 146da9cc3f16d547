"""Processes: what they outlive, how long they may take, what they share."""

import contextlib
import ctypes
import operator
import os
import subprocess
import sys
import time

import pytest

from bench import workers
from bench.workers import Task, Workers


@pytest.fixture
def hired(tmp_path):
    hired = Workers(tmp_path / "workers.log", grace=0.2)
    yield hired
    hired.close()


def test_workers_outlive_what_their_processes_do(hired):
    ends = {
        "adds": (operator.add, (1, 2)),
        "raises": (operator.add, (1, "2")),
        "exits": (os._exit, (3,)),
        "crashes": (ctypes.string_at, (0,)),
        "hangs": (time.sleep, (60,)),
        "goes on": (operator.mul, (2, 3)),
    }
    tasks = [Task(name, *work, seconds=3.0) for name, work in ends.items()]
    found = {done.task.name: done for done in hired.run(tasks, time.monotonic() + 300.0)}
    assert list(found) == list(ends)
    assert (found["adds"].value, found["goes on"].value) == (3, 6)
    assert "TypeError" in found["raises"].error and not found["raises"].broken
    assert "exit code 3" in found["exits"].error and "SIGSEGV" in found["crashes"].error
    assert "not done after 3 s" in found["hangs"].error
    assert [name for name, done in found.items() if done.broken] == ["exits", "crashes", "hangs"]
    assert [name for name, done in found.items() if done.hung] == ["hangs"] and hired.stuck == 0
    log = hired.log.read_text()
    assert "Segmentation fault" in log and "serve" in log


def test_workers_stop_when_the_time_is_up(hired):
    tasks = [Task(f"sleeps {i}", time.sleep, (60,), 60.0) for i in range(3)]
    began = time.monotonic()
    found = list(hired.run(tasks, began + 0.5, count=2))
    assert time.monotonic() - began < 10
    assert [(done.task.name, done.cut, done.broken) for done in found] == [
        ("sleeps 0", True, True), ("sleeps 1", True, True)
    ]  # fmt: skip


def slow_import(seconds: float) -> None:
    """What takes long before a process is ready: it happens where the task is unpickled."""
    time.sleep(seconds)


class TakesLongToImport:
    def __reduce__(self):
        return slow_import, (1.5,)


def test_the_limit_counts_from_when_a_process_is_ready(hired):
    """Imports are no part of it: they took more than the limit here, and the task less."""
    task = Task("works", print, (TakesLongToImport(),), seconds=1.2)
    (found,) = hired.run([task], time.monotonic() + 60.0)
    assert not found.error and found.seconds < 1.2


def test_a_process_that_never_gets_ready_is_ended(hired, monkeypatch):
    monkeypatch.setattr(workers, "STARTING", 0.5)
    task = Task("works", print, (TakesLongToImport(),), seconds=60.0)
    (found,) = hired.run([task], time.monotonic() + 60.0)
    assert found.broken and not found.hung and "was not ready after" in found.error


def test_lanes_share_no_process(hired):
    tasks = [Task(f"{lane} {i}", os.getpid, (), 60.0, lane) for i in range(2) for lane in ("", "hopper")]
    found = {done.task.name: done.value for done in hired.run(tasks, time.monotonic() + 60.0, count=2)}
    ordinary, hopper = ({pid for name, pid in found.items() if name.startswith(lane)} for lane in (" ", "h"))
    assert len(found) == 4 and not ordinary & hopper
    # One at a time, a process of the other lane makes room.
    (done,) = hired.run([Task("third", os.getpid, (), 60.0, "third")], time.monotonic() + 60.0)
    assert done.value not in ordinary | hopper


def test_processes_without_work_stay_for_later(hired):
    pairs = [Task(f"{i}", time.sleep, (0.5,), 60.0) for i in range(2)]
    list(hired.run(pairs, time.monotonic() + 60.0, count=2))
    before = {worker.process.pid for worker in hired.workers}
    assert len(before) == 2
    list(hired.run([Task("alone", time.sleep, (0,), 60.0)], time.monotonic() + 60.0, count=1))
    assert {worker.process.pid for worker in hired.workers} == before


def test_hired_processes_import_before_there_is_work(tmp_path):
    hired = Workers(tmp_path / "workers.log", grace=1.0, preloaded="wave")
    try:
        hired.hire(1)
        (pid,) = (worker.process.pid for worker in hired.workers)
        (done,) = hired.run([Task("asks", imported, ("wave",), 60.0, "hopper")], time.monotonic() + 60.0)
        assert done.value == (pid, True)
    finally:
        hired.close()


def imported(module: str) -> tuple[int, bool]:
    return os.getpid(), module in sys.modules


@contextlib.contextmanager
def marked():
    os.environ["MARKED"] = "yes"
    yield
    del os.environ["MARKED"]


def test_tasks_are_done_inside_what_is_asked_for(tmp_path, hired):
    task, until = Task("asks", os.getenv, ("MARKED",), 60.0), time.monotonic() + 60.0
    (plain,) = hired.run([task], until)
    around = Workers(tmp_path / "workers.log", grace=1.0, inside=marked)
    try:
        first, second = around.run([task, task], until)
    finally:
        around.close()
    assert (plain.value, first.value, second.value) == (None, "yes", "yes")


# In a process of its own: all of one's forked processes come from the same, with the same imports.
FORKED = """
import ctypes, os, sys, time
from pathlib import Path

from bench.workers import Task, Workers

work = {
    "imported": (eval, ("'wave' in __import__('sys').modules",)),
    "parent": (os.getppid, ()),
    "crashes": (ctypes.string_at, (0,)),
    "hangs": (time.sleep, (60,)),
    "goes on": (os.getppid, ()),
}
hired = Workers(Path(sys.argv[1]), 0.2, "wave", is_forked=True)
hired.hire(1)
tasks = [Task(name, *each, 1.0) for name, each in work.items()]
found = {done.task.name: done for done in hired.run(tasks, time.monotonic() + 60.0)}
hired.close()
assert list(found) == list(work) and hired.stuck == 0
assert found["imported"].value is True
assert found["parent"].value == found["goes on"].value != os.getpid()
assert "SIGSEGV" in found["crashes"].error and found["hangs"].hung
assert [name for name, done in found.items() if done.broken] == ["crashes", "hangs"]
"""


def test_forked_processes_are_replaced_too(tmp_path):
    log = tmp_path / "workers.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORKED, str(log)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Segmentation fault" in log.read_text()
