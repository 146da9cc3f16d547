"""How does a command carry out a run? Processes, the clock, signals, the screen at the end, the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType

from .jobs import Setting
from .progress import Progress
from .report.ranking import is_tilewise
from .results import Results, Row, load, mend
from .run import CannotBegin, Deadline, Run
from .stages import Plan
from .workers import Inside, Workers

INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C
WIDTH = 140  # of what is not shown on a terminal
PRELOADED = "bench.jobs"  # what every process imports before it is asked for anything
Screen = Callable[[Results, list[str]], RenderableType]


@dataclass(frozen=True)
class Orders:
    """What a command asks for. screen: what is shown at the end, and kept in the file `kept` beside the
    results after each stage. grace: seconds that work in progress gets when a stage's time is up. afterwards:
    what is done with the folder in the end. inside, is_forked: its processes, as `Workers` says."""

    plans: Sequence[Plan]
    folder: Path
    seconds: float
    grace: float
    screen: Screen
    seed: int = 0
    resume: bool = False
    kept: str = "summary.txt"
    began: float | None = None
    afterwards: Callable[[Path], None] = lambda folder: None
    inside: Inside = contextlib.nullcontext
    is_forked: bool = False


def conduct(orders: Orders) -> int:
    """Carry it out; the exit code: 0 where all is right, 1 where something of tilewise's is not, 130 after a
    signal, 2 where it could not begin. Raises ValueError where the folder holds results and nobody asked to
    go on with them."""
    began = time.monotonic() if orders.began is None else orders.began
    path = orders.folder / "results.jsonl"
    earlier = results_there(path, orders.resume)
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", orders.seed, orders.folder)
    console = console_here()
    orders.folder.mkdir(parents=True, exist_ok=True)
    log = (orders.folder / "workers.log").absolute()
    workers = Workers(log, orders.grace, PRELOADED, orders.inside, orders.is_forked)
    workers.hire(orders.plans[0].processes(setting))
    interrupted = False
    with Progress(console, began, orders.seconds, setting.on_gpu) as progress:
        run = Run(path, setting, workers, progress, Deadline(orders.seconds, began))
        run.after_stage = lambda: progress.guarded("the screen", keep_screen, orders, path, run.shortfall)
        try:
            with interrupted_by(signal.SIGTERM):
                run.begin(earlier)
                run.stages([*orders.plans])
        except KeyboardInterrupt:
            interrupted = True
        except CannotBegin as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        finally:
            workers.close()
    code = conclude(orders, path, console, run.shortfall, interrupted)
    orders.afterwards(orders.folder)
    if workers.stuck:  # Python would wait for them at its own end
        sys.stdout.flush()
        os._exit(code)
    return code


def console_here() -> Console:
    """As wide as the terminal; a log is wide enough for tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


@contextlib.contextmanager
def interrupted_by(number: int) -> Iterator[None]:
    """Inside, this signal does what Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def keep_screen(orders: Orders, path: Path, shortfall: list[str]) -> Path:
    """How things stand, in a file: what a run that is cut leaves behind."""
    text = path.with_name(orders.kept)
    with text.open("w", encoding="utf-8") as file:
        Console(file=file, width=WIDTH, highlight=False).print(orders.screen(load(path), shortfall))
    return text


def conclude(orders: Orders, path: Path, console: Console, shortfall: list[str], interrupted: bool) -> int:
    """Show how things stand, on the console and in a file; the exit code."""
    if not path.exists() or not path.stat().st_size:
        console.print("nothing was measured", markup=False)
        return INTERRUPTED if interrupted else 1
    mend(path)
    results = load(path)
    text = keep_screen(orders, path, shortfall)
    console.print(orders.screen(results, shortfall))
    console.print(f"results: {path}; this screen: {text}", markup=False, soft_wrap=True)
    if any(check.is_bad for check in results.checks) or any(map(is_our_fault, results.rows)):
        return 1
    return INTERRUPTED if interrupted else 0


def is_our_fault(row: Row) -> bool:
    return is_tilewise(row.implementation) and row.status in ("wrong", "failed")


def results_there(path: Path, resume: bool) -> Results | None:
    """What an earlier run left, its last line mended where that was cut off. Raises ValueError where there is
    something and nobody asked to go on with it."""
    if not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path} is there already: choose another folder, or go on with it by --resume")
    mend(path)
    return load(path) if path.stat().st_size else None
