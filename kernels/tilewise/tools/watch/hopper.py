"""Hopper's forward in the emulator, told role by role, and who works when by the machine model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from ...kernels.hopper.limits import WARPGROUP_ROWS
from ...kernels.tile import HopperTile
from ...parts.shape import ceil_div
from ...plan import tiles
from ...plan.checks import check
from ...plan.passes import run_forward
from ...plan.request import Request
from ..overlap.machine import Machine, Work
from ..overlap.simulation import H200, HOPPER
from .recording import CUT, FULL, SKIPPED, Arrays, Lane, Pass, Program, Span, Stage, Timeline
from .shown import Shown
from .story import Teller, integer, loop_lines
from .telling import CONSUMER as CONSUMER_TELLINGS
from .telling import is_always_told, tellings_in
from .tracer import Run, Statement, Tracer, watching

CONSUMER = ("kernels/hopper/consumer.py", "consume")
PRODUCER = ("kernels/hopper/producer.py", "produce")
FIRST_STEP = CONSUMER_TELLINGS["q_ring.wait_full"]
TILE_KV = 16
TILE = HopperTile(2 * WARPGROUP_ROWS, TILE_KV, 8, 2)
ABOUT = (
    "A producer brings tiles, two warpgroups own 64 rows each; run in the emulator, in one of the orders "
    "that are possible on a GPU."
)
MODEL = (
    "Clocks by a model of an H200's multiprocessor with the tile that ships, 128 keys a step: a prediction. "
    "No GPU has been timed."
)


def as_hopper(request: Request) -> Request:
    """The request for Hopper's kernel, which takes 16-bit numbers."""
    if request.q.dtype == torch.float32:
        q, k, v = (x.to(torch.bfloat16).contiguous() for x in (request.q, request.k, request.v))
        request = replace(request, q=q, k=k, v=v)
    return replace(request, impl="hopper")


def why_not_hopper(request: Request) -> str | None:
    """Why Hopper's kernel does not take a call; None if it does."""
    try:
        check(as_hopper(request))
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Told:
    """A statement with its role, the part of the role's work that it is in, and where that is."""

    run: Run
    statement: Statement
    role: str
    part: tuple[int, str, int]  # tile of rows, kind, number
    tile: tuple[int, int] | None
    state: Literal["cut", "full"] | None
    rows: int  # the first that the program owns


def watch_hopper(request: Request, shown: Shown, arrays: Arrays) -> tuple[Pass, set[str]]:
    """The pass, and the files of the sources that ran."""
    tracer = Tracer({CONSUMER, PRODUCER}, is_always_told)
    asked = as_hopper(request)
    with tiles.use(TILE, ("hopper",)), watching(tracer):
        run_forward(asked, True)
    teller = Teller(arrays, shown)
    programs = []
    grid = np.full([ceil_div(shown.q_len, WARPGROUP_ROWS), ceil_div(shown.kv_len, TILE_KV)], SKIPPED)
    steps = 0
    for index, runs in itertools.groupby(
        sorted(tracer.runs, key=lambda run: run.program), lambda run: run.program
    ):
        told = sorted(
            itertools.chain.from_iterable(told_of(run, shown) for run in runs),
            key=lambda each: each.statement.number,
        )
        for rows in sorted({each.rows for each in told}):
            mine = [each for each in told if each.rows == rows]
            program = Program(index, "keys", (rows, min(rows + TILE.tile_q, shown.q_len)))
            program.stages = list(stages(mine, teller))
            programs.append(program)
            for each in mine:
                if each.tile is not None and each.tile[0] < len(grid):
                    grid[each.tile] = CUT if each.state == "cut" else FULL
                steps = max(steps, 1 + (each.part[2] if each.part[1] == "step" else 0))
    found = Pass(
        "hopper", "Hopper: warp roles", ABOUT, CONSUMER[0], CONSUMER[1], (WARPGROUP_ROWS, TILE_KV),
        shown.lengths, ["".join(row) for row in grid], programs, timeline=timeline(shown, steps),
    )  # fmt: skip
    return found, teller.files


def told_of(run: Run, shown: Shown) -> Iterator[Told]:
    """The statements of one role that worked on what is shown."""
    _, end = loop_lines(run.file, run.function)
    is_producer = (run.file, run.function) == PRODUCER
    role = "producer" if is_producer else f"warpgroup {integer(run.known['WARPGROUP']) + 1}"
    for number, own in enumerate(by_rows(run.statements)):
        sets = own[0].sets["rows"]
        batch, head, q_start = (int(sets[name].reshape(())) for name in ("batch", "head", "q_start"))
        if (batch, head) != (shown.batch, shown.head):
            continue
        row = q_start // WARPGROUP_ROWS + (0 if is_producer else integer(run.known["WARPGROUP"]))
        state: Literal["cut", "full"] = "cut"  # step 0 asks the mask, whatever its tile
        for kind, count, part in parts_of(own, end):
            states = [int(each.sets["IS_FULL"]) for each in part if "IS_FULL" in each.sets]
            if states:
                state = "full" if states[-1] else "cut"
            keys = [int(each.sets["kv_start"]) for each in part if "kv_start" in each.sets]
            tile = (row, keys[0] // TILE_KV) if keys and not is_producer else None
            for each in part:
                yield Told(run, each, role, (number, kind, count), tile, state if tile else None, q_start)


def by_rows(statements: Iterable[Statement]) -> Iterator[list[Statement]]:
    """The statements of each tile of rows, the first of which finds out which one it is."""
    found: list[Statement] = []
    for statement in statements:
        if "rows" in statement.sets and isinstance(statement.sets["rows"], dict):
            if found:
                yield found
            found = [statement]
        elif found:
            found.append(statement)
    if found:
        yield found


def parts_of(statements: Sequence[Statement], end: int) -> Iterator[tuple[str, int, list[Statement]]]:
    """What is before the first step, each step, and what follows the last: kind, number, statements. end: the
    last line of the loop. A consumer's step 0 is before its loop, from its wait for Q on."""
    kind, number, part = "start", 0, list[Statement]()
    for statement in statements:
        line, is_own = statement.lines[0], statement.depth == 0
        if is_own and tellings_in(statement.file).get(line) is FIRST_STEP:
            yield kind, number, part
            kind, number, part = "step", 0, []
        elif is_own and "step" in statement.sets:
            yield kind, number, part
            kind, number, part = "step", int(statement.sets["step"]), []
        elif is_own and kind == "step" and line > end and "IS_FULL" not in statement.sets:
            yield kind, number, part
            kind, number, part = "end", 0, []
        part.append(statement)
    yield kind, number, part


def stages(told: Sequence[Told], teller: Teller) -> Iterator[Stage]:
    """The moments in the order in which they came to pass; a stage is what one role did without another."""
    for (_, (_, kind, _)), group in itertools.groupby(told, lambda each: (each.role, each.part)):
        found = list(group)
        stage = Stage(kind, found[0].tile, found[0].state)
        for each in found:
            moment = teller.moment(each.run, each.statement, each.role)
            if moment is not None:
                stage.moments.append(moment)
        if stage.moments:
            yield stage


# ---- Who works when


def timeline(shown: Shown, steps: int) -> Timeline:
    """The model's lanes for as many steps."""
    widest = max(shown.head_dim, shown.value_dim)
    loop = HOPPER[min(dim for dim in HOPPER if dim >= widest)]
    works = Machine(loop, steps, 1, H200).run().timeline
    lanes = [
        Lane("producer", False, spans(works, lambda work: work.role == "copies")),
        *(
            Lane(
                f"warpgroup {n + 1}", False, spans(works, lambda work, n=n: work.role == f"warpgroup {n + 1}")
            )
            for n in range(loop.warpgroups)
        ),
        Lane("copy engine", True, spans(works, lambda work: work.role == "copies")),
        Lane("tensor cores", True, spans(works, lambda work: work.name in ("S", "PV"))),
        Lane("exponential unit", True, spans(works, lambda work: "EX2" in work.left)),
    ]
    return Timeline(MODEL, max(work.end for work in works), lanes)


def spans(works: Sequence[Work], is_of_lane: Any) -> list[Span]:
    """What a lane does, parts of one thing joined."""
    own = sorted(
        (work for work in works if is_of_lane(work)), key=lambda work: (work.role, work.name, work.step)
    )
    joined = []
    for (_, name, step), parts in itertools.groupby(own, lambda work: (work.role, work.name, work.step)):
        both = list(parts)
        joined.append(Span(name, step, min(work.begin for work in both), max(work.end for work in both)))
    return sorted(joined, key=lambda span: span.begin)
