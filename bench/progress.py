"""How far has the run come? A bar on a terminal; elsewhere a line for each result, as a log wants it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.text import Text

from .report.ranking import Contest, is_tilewise
from .report.units import digits, duration, times
from .results import Ceilings, Check, CheckStatus, Entry, Row

MARKS: dict[CheckStatus, tuple[str, str]] = {
    "right": ("right", "green"),
    "wrong": ("WRONG", "bold red"),
    "failed": ("FAILED", "bold red"),
    "hung": ("HUNG", "bold red"),
    "crashed": ("CRASHED", "bold red"),
    "left out": ("left out", "yellow"),
    "not applicable": ("not applicable", ""),
}


class Progress:
    """Prints results as they come; on a terminal, above a bar that shows the stage and the time."""

    def __init__(self, console: Console, began: float, seconds: float, on_gpu: bool) -> None:
        self.console, self.began, self.on_gpu = console, began, on_gpu
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[count]}"),
            rich.progress.TextColumn("{task.fields[clock]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.seconds = seconds
        self.task = self.bar.add_task("", total=seconds, count="", clock="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def guarded(self, what: str, function: Callable[..., object], *arguments: object) -> None:
        """function(*arguments), which is not worth the run: where it raises, a note says so."""
        try:
            function(*arguments)
        except Exception as error:
            self.note(f"{what} could not be made: {type(error).__name__}: {error}", "bold red")

    def stage(self, name: str, planned: int, seconds: float) -> None:
        self.note(f"{name}: {planned} to do in {seconds:.0f} s", style="bold")
        self.show(name, 0, planned)

    def show(self, name: str, done: int, planned: int) -> None:
        """Bring the bar up to date."""
        clock = f"{self.elapsed:.0f} of {self.seconds:.0f} s"
        self.bar.update(
            self.task, description=name, count=f"{done}/{planned}", clock=clock, completed=self.elapsed
        )

    def note(self, text: str, style: str = "") -> None:
        self.bar.print(Text(f"{self.elapsed:5.0f} s  {text}", style), soft_wrap=True)

    def results(self, entries: Iterable[Entry]) -> None:
        """One line for each check, and one for all rows of a case."""
        entries = list(entries)
        for entry in entries:
            if isinstance(entry, Check):
                word, style = MARKS[entry.status]
                detail = "" if entry.passed else f": {entry.detail}"
                self.note(f"{word} {entry.name} ({entry.seconds:.1f} s){detail}", style)
            elif isinstance(entry, Ceilings):
                rates = entry.matmul_flops_per_second.items()
                found = [f"{dtype} {digits(rate / 1e12)} TFLOP/s" for dtype, rate in rates]
                copy = entry.copy_bytes_per_second
                self.note(", ".join(found + ([f"copy {digits(copy / 1e9)} GB/s"] if copy else [])))
        rows = [entry for entry in entries if isinstance(entry, Row)]
        if rows:
            bad = any(is_tilewise(row.implementation) and row.status in ("wrong", "failed") for row in rows)
            self.note(in_one_line(rows, self.on_gpu), "bold red" if bad else "")


def in_one_line(rows: list[Row], on_gpu: bool) -> str:
    """The case, each implementation of tilewise with its ratio to the fastest rival (none without a GPU), and
    that rival; what was wrong or failed."""
    contest = Contest(tuple(rows))
    parts = []
    for row in rows:
        if row.status in ("wrong", "failed", "left out"):
            parts.append(f"{row.implementation} {row.status.upper()}: {row.reason}")
        elif is_tilewise(row.implementation) and row.median is not None:
            ratio = contest.ratio(row) if on_gpu else None
            beside = "" if ratio is None else f" ({times(ratio)})"
            parts.append(f"{row.implementation} {duration(row.median)}{beside}")
    rival = contest.rival
    if rival is not None and rival.median is not None:
        parts.append(f"fastest rival {rival.implementation} {duration(rival.median)}")
    return f"{contest.case}, {contest.work}: {'; '.join(parts) or 'nobody could'}"
