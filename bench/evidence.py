"""What can be learned on this machine in a few minutes? The command `python -m bench evidence`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from tilewise.__main__ import interpret_without_gpu

from .progress import Progress
from .report.ranking import is_tilewise
from .report.sections import gather
from .report.summary import print_summary
from .results import Results, Row, load, mend
from .run import CannotBegin, Deadline, Run
from .stages import STAGES, Plan, Setting
from .workers import Workers

INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C


def evidence(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, summary.txt and workers.log.")],
    minutes: Annotated[float, typer.Option(help="How long it may take.", min=0.01)] = 9.0,
    only: Annotated[
        list[str] | None, typer.Option(help="A stage to run; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the random inputs.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the results that are in the folder.")
    ] = False,
) -> None:
    """Check and time tilewise on this machine, the most telling first, within the minutes given.

    Every result is in the file as soon as it is known. Ends with one screen: what passed, what failed, and
    the ratios to rivals against the goals. Exit code 1 if a check failed or an answer of tilewise is wrong.
    """
    began = time.monotonic()
    interpret_without_gpu()
    plans = chosen(only or [])
    path = out / "results.jsonl"
    try:
        earlier = results_there(path, resume)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", seed)
    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    workers = Workers((out / "workers.log").absolute(), grace=min(20.0, max(5.0, 15 * minutes)))
    interrupted = False
    with Progress(console, began, 60 * minutes, setting.on_gpu) as progress:
        run = Run(path, setting, workers, progress, Deadline(60 * minutes, began))
        try:
            with interrupted_by(signal.SIGTERM):
                run.begin(earlier)
                run.stages(plans)
        except KeyboardInterrupt:
            interrupted = True
        except CannotBegin as error:
            typer.echo(f"bench evidence: {error}", err=True)
            raise typer.Exit(2) from None
        finally:
            workers.close()
    raise typer.Exit(conclude(path, console, run.shortfall, interrupted))


def chosen(only: list[str]) -> list[Plan]:
    """The stages of these names, in their own order, or all."""
    names = [plan.name for plan in STAGES]
    for name in only:
        if name not in names:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}", param_hint="--only")
    return [plan for plan in STAGES if not only or plan.name in only]


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


def conclude(path: Path, console: Console, shortfall: list[str], interrupted: bool) -> int:
    """Show how things stand, on the console and in summary.txt; the exit code."""
    if not path.exists() or not path.stat().st_size:
        console.print("nothing was measured", markup=False)
        return INTERRUPTED if interrupted else 1
    mend(path)
    results = load(path)
    text = path.with_name("summary.txt")
    with text.open("w", encoding="utf-8") as file:
        for screen in (console, Console(file=file, width=140)):
            print_summary(gather([results]), screen)
            for line in shortfall:
                screen.print(line, markup=False, highlight=False)
    console.print(f"results: {path}; this screen: {text}", markup=False, soft_wrap=True)
    if any(not check.passed for check in results.checks) or any(map(is_our_fault, results.rows)):
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
