"""What a GPU run tunes: a row of the table of tiles, by the five that the static model ranks best.

`candidates.json` holds them, made without a GPU by `tilewise.tools.rank`. Here each is checked and timed
beside the shipped tile, as `tilewise tune` does it, only shorter. The winners and the journal stand in the
run's folder; `tilewise tune --from FOLDER/tiles.json --export FILE` puts them into a table, with no GPU.

    tuned_rows()                                      the rows, in the order of use
    compile_row(work, dim, device)                    only compile; rows may do so side by side
    tune_row(work, dim, folder, device, seconds)      check and time; one row at a time
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from tilewise.kernels.tile import Pass, Tile, tile_from
from tilewise.plan import tiles
from tilewise.plan.tile_table import Key, load
from tilewise.tools.compiled.variants import MASKS
from tilewise.tools.rank.rank import RANKED, case_of, read_rows
from tilewise.tools.tune.bench import Bench, DeviceLost, Rejected
from tilewise.tools.tune.case import CHECK_LENGTH, small, with_every_feature
from tilewise.tools.tune.command import SMOKE_ROUNDS, short, title
from tilewise.tools.tune.journal import Journal
from tilewise.tools.tune.plan import SMOKE_LENGTH, Job, smoke_jobs
from tilewise.tools.tune.search import Outcome, Round, Search
from tilewise.tools.tune.store import SMOKE_GPU, here, journal_of, store
from tilewise.tools.words import in_a_line

from .results import Check, CheckStatus, Entry

CANDIDATES = Path(__file__).with_name("candidates.json")
TABLE = "tiles.json"
# Shorter than tilewise tune's: five candidates, a few seconds of timing in all.
ROUNDS = (Round(1, 30, 3), Round(4, 60, 1))
SMOKE_TILES = 2


def tuned_rows() -> list[tuple[Pass, int]]:
    """The rows, those that most calls use first. Hopper's forward is timed beside the portable one, which is
    tuned by then."""
    return [*RANKED]


def ranked_tiles(work: Pass, dim: int) -> list[Tile]:
    """The tiles to try, the one that the model finds best first."""
    return [tile_from(work, row) for row in read_rows(CANDIDATES) if (row["pass"], row["dim"]) == (work, dim)]


def job_of(work: Pass, dim: int, device: torch.device) -> Job:
    """The search of one row: the papers' grid at 4096, full and causal, and the tiles to try. On a CPU a tiny
    problem and two tiles, for Triton's interpreter.

    Raises ValueError for a GPU that the tiles were not ranked for.
    """
    cases = [case_of(dim, mask) for mask in reversed(MASKS)]
    if device.type == "cpu":
        (job,) = smoke_jobs(cases, [work])
        tiny = tuple(small(case, SMOKE_LENGTH) for case in job.cases)
        return job._replace(cases=tiny, pool=job.pool[:SMOKE_TILES])
    ranked_for = {row["arch"] for row in read_rows(CANDIDATES)}
    arch = tiles.architecture(device)
    if arch not in ranked_for:
        raise ValueError(f"the tiles to try were ranked for {', '.join(ranked_for)}, and this GPU is {arch}")
    key: Key = (work, arch, cases[0].torch_dtype.itemsize, dim)
    shipped = tiles.table_tile(*key[1:], work)
    pool = tuple(dict.fromkeys([shipped, *ranked_tiles(work, dim)]))
    return Job(key, tuple(cases), (shipped,), pool)


def bench_of(job: Job, device: torch.device) -> Bench:
    return Bench(job.key[0], job.cases, device, SMOKE_LENGTH if device.type == "cpu" else CHECK_LENGTH)


def compile_row(work: Pass, dim: int, device: str) -> tuple[list[Entry], str]:
    """Fill the compiler's cache on the disk with what `tune_row` will launch. The interpreter compiles
    nothing."""
    where = torch.device(device)
    if where.type == "cpu":
        return [], ""
    job = job_of(work, dim, where)
    bench_of(job, where).compile_ahead(job.pool)
    # The winner's last check, on a call with every feature; any of them may win.
    every_feature = with_every_feature(job.cases[0], CHECK_LENGTH, work)
    Bench(work, [every_feature], where, CHECK_LENGTH).compile_ahead(job.pool[1:])
    return [], ""


def tune_row(
    work: Pass, dim: int, folder: str | Path, device: str, seconds: float
) -> tuple[list[Entry], str]:
    """Find the fastest tile of a row in about so many seconds, and write it down in `folder`. Where it was
    begun before, it goes on from there.

    The check has failed where the shipped tile is wrong or does not run here. It has crashed where a
    candidate took the GPU with it: that one is noted and left out next time, in a new process.
    """
    began, where = time.monotonic(), torch.device(device)
    job = job_of(work, dim, where)
    table = Path(folder) / TABLE
    stamped = here(where)
    journal = Journal(journal_of(table), stamped.stamp)
    rounds = SMOKE_ROUNDS if where.type == "cpu" else ROUNDS
    status: CheckStatus = "right"
    with tuned_forward(job.key, table):
        search = Search(job.key, job.starts, job.pool, bench_of(job, where), journal, rounds=rounds)
        try:
            outcome = search.run(max(0.0, seconds))
        except (Rejected, DeviceLost) as reason:
            if job.starts[0] in search.rejected:
                status = "failed"
            detail = f"not done: {in_a_line(reason)}; {refused(search.rejected)}"
            if isinstance(reason, DeviceLost):
                status = "crashed"
                detail += f"; to be tuned again in a new process, without {last(search)}"
        else:
            store(table, journal, search.subject, outcome, stamped)
            status, detail = "failed" if outcome.problem else "right", in_words(outcome, search.rejected)
    return [Check(f"tuning: {title(job.key)}", status, time.monotonic() - began, detail)], ""


def tuned_forward(key: Key, table: Path) -> contextlib.AbstractContextManager[None]:
    """While Hopper's forward is tuned, the portable one that it is timed beside has the tile that it won with
    in this folder."""
    row = load(table).get(("forward", *key[1:])) if key[0] == "hopper" and table.exists() else None
    return contextlib.nullcontext() if row is None else tiles.use(row.tile, ("forward",))


def last(search: Search) -> str:
    return short([*search.rejected][-1])


def in_words(outcome: Outcome, rejected: dict[Tile, str]) -> str:
    """What became of the row: the shipped tile, the winner, its gain, times, and who was refused why."""
    parts = [f"shipped {short(outcome.shipped)}"]
    if outcome.problem:
        parts.append(f"which cannot be used here: {outcome.problem}")
    if outcome.winner is None:
        parts.append("it stays")
    else:
        gain = "" if outcome.gain is None else f", gain {outcome.gain:.3f}"
        parts.append(f"winner {short(outcome.winner)}{gain}")
    if times := [words_of(case, outcome) for case in outcome.cases if case in outcome.milliseconds]:
        parts.append(f"ms: {', '.join(times)}")
    if outcome.over_portable is not None and outcome.key[1] != SMOKE_GPU:
        parts.append(f"{outcome.over_portable:.3f} times as fast as the portable forward at least")
    left = f", {outcome.left} left for want of time" if outcome.left else ""
    parts.append(f"{outcome.tried} tried{left}")
    parts.append(refused(rejected))
    return "; ".join(parts)


def words_of(case: str, outcome: Outcome) -> str:
    """A case's median, of the shipped tile first where another won."""
    after = f"{outcome.milliseconds[case]:.4g}"
    before = outcome.before.get(case)
    return (
        f"{case} {after}" if outcome.winner is None or before is None else f"{case} {before:.4g} -> {after}"
    )


def refused(rejected: dict[Tile, str]) -> str:
    reasons = [f"{short(tile)} ({reason})" for tile, reason in rejected.items()]
    return f"refused: {', '.join(reasons)}" if reasons else "none refused"
