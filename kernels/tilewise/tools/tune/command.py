"""`tilewise tune`: find the fastest tiles for this GPU, and keep them for later calls."""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ...kernels.tile import CopiedTile, HopperTile, Pass, Tile
from ...parts.numerics import INTERPRETED
from ...plan.tile_table import Key
from ...plan.tiles import reload_user_tables
from ...plan.user_tiles import table_path
from ..words import in_a_line
from .bench import Bench, DeviceLost, Rejected
from .case import CHECK_LENGTH, small
from .journal import Journal
from .plan import SMOKE_LENGTH, Job, choose_cases, gpu_jobs, smoke_jobs
from .search import ROUNDS, Outcome, Round, Search, Status
from .store import SMOKE_GPU, here, journal_of, measured_rows, merge, store, stored_table

SMOKE_ROUNDS = (Round(1, 1, 2), Round(1, 1, 1))


class PassName(str, Enum):
    """The passes that have tiles of their own."""

    forward = "forward"
    dkv = "dkv"
    dq = "dq"
    dqkv = "dqkv"
    hopper = "hopper"
    hopper_backward = "hopper_backward"


def tune(
    case: Annotated[
        list[str] | None,
        typer.Option(help="A named case to tune by; may be repeated. Default: the papers' grid at 4096."),
    ] = None,
    pass_: Annotated[
        list[PassName] | None,
        typer.Option(
            "--pass",
            help="A pass to tune; may be repeated; hopper and hopper_backward: the kernels for Hopper GPUs. "
            "Default: those that the cases run.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, or a case's own.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="About how long to search.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Write the winners here, not into the cache.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs tried.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write all rows timed on this GPU into this table, and end.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="With --export: the rows timed beside this table, as --out and evidence runs leave it, not "
            "those in the cache.",
        ),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Delete what is stored for this GPU, and end.")
    ] = False,
) -> None:
    """Search tiles, warps and stages on this GPU, and keep the fastest that answer right.

    Winners go into a table in the cache folder, which later calls on this GPU read. A run that was
    interrupted keeps what it has finished, and the next one goes on from there.
    """
    console = Console(highlight=False)
    passes: list[Pass] = [each.value for each in pass_ or []]
    try:
        if from_ is not None:
            if export is None:
                raise ValueError("--from TABLE goes with --export FILE")
            share(console, from_, export)
            return
        if forget or export:
            gpu = None if INTERPRETED or not torch.cuda.is_available() else torch.cuda.get_device_name()
            table = stored_table(gpu)
            if forget:
                forget_table(console, table)
            elif export:
                share(console, table, export)
            return
        code = run(console, case or [], passes, dtype, minutes * 60, out, fresh)
    except (ValueError, NotImplementedError) as error:
        typer.echo(f"tilewise tune: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def run(
    console: Console,
    names: list[str],
    passes: list[Pass],
    dtype: str | None,
    seconds: float,
    out: Path | None,
    fresh: bool,
) -> int:
    """The search of all rows; the exit code."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise ValueError("there is no GPU, and Triton's interpreter is off: set TRITON_INTERPRET=1")
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    where, cases = here(device), choose_cases(names, dtype)
    jobs = smoke_jobs(cases, passes) if INTERPRETED else gpu_jobs(cases, passes, where.arch, device)
    if INTERPRETED:
        say(
            console,
            "A smoke test: kernels run in Triton's interpreter, on tiny problems. Its times mean nothing.",
        )
    else:
        say(console, f"{len(jobs)} rows of the table on {where.gpu}, in about {seconds / 60:.3g} minutes")
    folder: AbstractContextManager[str] = (
        tempfile.TemporaryDirectory() if INTERPRETED and out is None else nullcontext("")
    )
    with folder as temporary:
        table = out or (Path(temporary) / "tiles.json" if INTERPRETED else table_path(where.gpu))
        journal = Journal(journal_of(table), where.stamp, fresh)
        outcomes: list[Outcome] = []
        code, until = 0, time.monotonic() + seconds
        with progress_on(console) as progress:
            try:
                for number, job in enumerate(jobs):
                    share_of_time = max(0.0, until - time.monotonic()) / (len(jobs) - number)
                    watch = Watch(progress, job, until)
                    try:
                        search = prepared(job, device, journal, watch)
                        outcome = search.run(share_of_time)
                    # No memory for the case, or the shipped tile failed while it was timed.
                    except (torch.OutOfMemoryError, Rejected) as reason:
                        watch.end(f"not done: {in_a_line(reason)}")
                        code = 1
                        continue
                    store(table, journal, search.subject, outcome, where)
                    outcomes.append(outcome)
                    watch.end("the shipped tile stays" if outcome.winner is None else short(outcome.winner))
            except KeyboardInterrupt:
                code = 130
            except DeviceLost as reason:
                progress.print(
                    f"The GPU answers nothing more in this process: {reason}. The tile that did it is noted, "
                    "and left out next time.",
                    markup=False,
                )
                code = 1
        show(console, outcomes)
        if len(outcomes) < len(jobs):
            say(console, f"{len(outcomes)} of {len(jobs)} rows are done; the same command goes on from here.")
        if out is None and INTERPRETED:
            say(console, "Nothing was stored; --out FILE keeps the table.")
        else:
            say(console, f"Winners are in {table}, all that was tried in {journal.path}.")
            if out is None:
                say(console, "Calls on this GPU use them from now on; `tilewise tune --forget` drops them.")
    return code


def prepared(job: Job, device: torch.device, journal: Journal, report: Watch) -> Search:
    """The search of one row, its data on the device."""
    length = SMOKE_LENGTH if INTERPRETED else CHECK_LENGTH
    timed = [small(case, SMOKE_LENGTH) for case in job.cases] if INTERPRETED else job.cases
    bench = Bench(job.key[0], timed, device, length)
    rounds = SMOKE_ROUNDS if INTERPRETED else ROUNDS
    return Search(job.key, job.starts, job.pool, bench, journal, report, rounds)


def progress_on(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


class Watch:
    """Shows one row's search: how far it is, the best tile so far, how long all of it may still take."""

    def __init__(self, progress: Progress, job: Job, until: float) -> None:
        self.progress, self.until = progress, until
        self.task = progress.add_task(title(job.key), total=len(job.pool), note="compiling")

    def __call__(self, status: Status) -> None:
        left = max(0, round(self.until - time.monotonic()))
        note = (
            f"{status.phase}; best {short(status.best)}: {status.gain:.2f}x; "
            f"at most {left // 60}:{left % 60:02} left"
        )
        self.progress.update(self.task, completed=status.done, total=status.total, note=note)

    def end(self, note: str) -> None:
        self.progress.update(self.task, note=note)


def show(console: Console, outcomes: list[Outcome]) -> None:
    """What became of each row."""
    if not outcomes:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("row", "shipped", "winner", "gain", "ms", "error"):
        words = column in ("row", "shipped", "winner")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for outcome in outcomes:
        verdict = outcome.verdict
        table.add_row(
            title(outcome.key),
            short(outcome.shipped),
            "stays" if outcome.winner is None else short(outcome.winner),
            "-" if outcome.gain is None else f"{outcome.gain:.3f}",
            times(outcome),
            "-" if verdict is None else f"{verdict.error:.2f}",
        )
    console.print(table)
    say(
        console,
        "128x64 w8 s2: 128 queries against 64 keys a step, 8 warps, 2 stages. ms: the median of each case, "
        "before and after. gain: their geometric mean. error: the largest, as a share of what is allowed.",
    )
    if any(outcome.key[0] == "hopper" for outcome in outcomes):
        say(console, "turns: warpgroups issue their matmuls one after another. Qreg: Q stays in registers.")
    tried, rejected, left = (
        sum(getattr(outcome, name) for outcome in outcomes) for name in ("tried", "rejected", "left")
    )
    say(console, f"{tried} candidates were tried, {rejected} of them refused; for {left} there was no time.")
    for outcome in outcomes:
        if outcome.over_portable is not None and not INTERPRETED:
            portable = "forward" if outcome.key[0] == "hopper" else "backward"
            times_as_fast = f"{outcome.over_portable:.3f} times as fast as the portable {portable}"
            say(console, f"{title(outcome.key)}: {times_as_fast}, in the case where it gains least")
        if outcome.problem:
            say(console, f"{title(outcome.key)}: the shipped tile cannot be used here: {outcome.problem}")


def times(outcome: Outcome) -> str:
    """The medians, a case a line."""
    before, after = outcome.before, outcome.milliseconds if outcome.winner else {}
    lines = [
        " → ".join(f"{times[case]:.3g}" for times in (before, after) if case in times)
        for case in outcome.cases
    ]
    return "\n".join(lines)


def title(key: Key) -> str:
    """A row in words: "forward 16-bit 128"."""
    work, _, element_bytes, dim = key
    return f"{work} {8 * element_bytes}-bit {dim}"


def short(tile: Tile) -> str:
    """A tile in a table: "128x64 w8 s2", and "copied", "turns", "Qreg" and "p4" where these are on."""
    text = f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}"
    if isinstance(tile, CopiedTile):
        text += " copied"
    if isinstance(tile, HopperTile):
        text += " turns" * tile.has_turns + " Qreg" * tile.is_q_in_registers
        text += f" p{tile.producer_warps}" * (tile.producer_warps > 1)
    return text


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def forget_table(console: Console, table: Path) -> None:
    """Delete a GPU's table and journal."""
    found = [path for path in (table, journal_of(table)) if path.exists()]
    for path in found:
        path.unlink()
        reload_user_tables()
        say(console, f"deleted {path}")
    if not found:
        say(console, f"nothing is stored: there is no {table}")


def share(console: Console, table: Path, file: Path) -> None:
    """Write what was timed on a GPU into a table that can be shared: the shipped one, for example."""
    rows, old = measured_rows(journal_of(table))
    if not rows:
        raise ValueError(
            f"nothing was timed with these kernels yet: {journal_of(table)} holds no row of theirs"
        )
    if any(row.arch == SMOKE_GPU for row in rows.values()):
        raise ValueError(f"{table} is of a smoke test in Triton's interpreter, whose times mean nothing")
    merge(file, rows.values())
    say(console, f"wrote {len(rows)} rows timed on {next(iter(rows.values())).evidence.gpu} into {file}")
    if old:
        say(console, f"left out {old} rows that were timed with another version of the kernels")
