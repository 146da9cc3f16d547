"""From the statements that ran to the passes of a recording: programs, steps, tiles, moments."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import triton.language as tl

from ...parts.shape import ceil_div
from .glossary import GLOSSARY
from .recording import (
    CUT,
    FULL,
    SKIPPED,
    Array,
    Arrays,
    Load,
    Moment,
    Pass,
    PassName,
    Program,
    Stage,
    Store,
)
from .shown import Shown
from .telling import Telling, function_lines, tellings_in
from .tracer import Fetched, Run, Statement, tree_of

SILENT = Telling("")
# A kernel's variables whose columns are those of rows of Q and K, and of V and O: the rest is padding.
HEAD_COLUMNS = {"q", "k", "dq", "dk"}
VALUE_COLUMNS = {"v", "o", "do", "dv", "part_o"}
# The tensors that tiles come from and go to, by the kernel's variable for the tile, and for the tensor.
STORED = {"o": ("out", "out"), "dk": ("dk", "dkeys"), "dv": ("dv", "dvalues"), "dq": ("dq", "dqueries")}
FETCHED = {"q": ("q", "queries"), "k": ("k", "keys"), "v": ("v", "values"), "do": ("dout", "dout")}


@dataclass(frozen=True)
class Kernel:
    """How a kernel's walk is told. run: the variable that says in which of two runs of the walk a step is,
    and the number of the run in which tiles are cut; "" where there is but one."""

    name: PassName
    file: str
    function: str
    walks: Literal["keys", "rows", "splits"]
    title: str
    about: str
    run: tuple[str, int] = ("", 0)


FORWARD = Kernel(
    "forward", "kernels/forward.py", "forward_kernel", "keys", "Forward",
    "Each program owns a tile of rows and walks the tiles of keys that its rows may see.", ("IS_CUT", 1),
)  # fmt: skip
SPLITS = Kernel(
    "splits", "kernels/forward.py", "forward_kernel", "keys", "Decoding, split",
    "Few rows ask many keys, so several programs share the keys of the same rows.", ("IS_CUT", 1),
)  # fmt: skip
COMBINE = Kernel(
    "combine", "kernels/combine.py", "combine_kernel", "splits", "Decoding, merged",
    "The results of the splits are joined: each is the softmax of its own keys.",
)  # fmt: skip
DKV = Kernel(
    "dkv", "kernels/backward.py", "sum_over_rows", "rows", "Backward: dK, dV",
    "Each program owns a tile of keys and walks the tiles of rows that see it: the same tiles, by columns.",
    ("RUN", 1),
)  # fmt: skip
DQ = Kernel(
    "dq", "kernels/backward.py", "dq_kernel", "keys", "Backward: dQ",
    "Each program owns a tile of rows again, and walks the keys as the forward does.", ("IS_CUT", 1),
)  # fmt: skip


def integer(x: Any) -> int:
    """A variable of a kernel as a number."""
    if isinstance(x, tl.tensor):
        x = x.handle.data
    return int(np.asarray(getattr(x, "value", x)).reshape(-1)[0])


@functools.cache
def loop_lines(file: str, function: str) -> tuple[int, int]:
    """The first line of the body of a kernel's innermost loop over steps, and its last."""
    begin, end = function_lines(file, function)
    loops = [
        node
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.For) and begin <= node.lineno <= end
        and "range" in ast.unparse(node.iter) and "static" not in ast.unparse(node.iter)
    ]  # fmt: skip
    inner = max(loops, key=lambda loop: loop.col_offset)
    return inner.body[0].lineno, inner.end_lineno or inner.lineno


@functools.cache
def stored_variable(file: str, line: int) -> str:
    """The variable that a statement stores: the second argument of its call."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Expr) and node.lineno == line and isinstance(node.value, ast.Call):
            return ast.unparse(node.value.args[1])
    raise RuntimeError(f"{file}:{line} stores nothing")


def columns_of(name: str, parts: Any, shown: Shown) -> Array:
    """A variable's value as one array: pieces side by side, without padding."""
    x = parts
    if isinstance(parts, tuple):
        is_tile = all(part.ndim == 2 for part in parts)
        x = np.concatenate(parts, 1) if is_tile else np.array([part.reshape(()) for part in parts])
    if x.ndim == 2 and name in HEAD_COLUMNS:
        x = x[:, : shown.head_dim]
    if x.ndim == 2 and name in VALUE_COLUMNS:
        x = x[:, : shown.value_dim]
    if x.ndim == 2 and 1 in x.shape and name not in FETCHED and name not in VALUE_COLUMNS:
        x = x.reshape(-1)  # a number a row, shaped to broadcast
    return x


class Teller:
    """Makes moments of statements, their values kept in `arrays`."""

    def __init__(self, arrays: Arrays, shown: Shown) -> None:
        self.arrays, self.shown = arrays, shown
        self.files: set[str] = set()

    def moment(self, run: Run, statement: Statement, role: str = "") -> Moment | None:
        """None where nothing of it is worth a look."""
        telling = tellings_in(statement.file).get(statement.lines[0], SILENT)
        names = [name for name in statement.sets if name in GLOSSARY]
        if not names and not telling.is_always:
            return None
        values = {name: columns_of(name, statement.sets[name], self.shown) for name in names}
        if run.function == COMBINE.function:
            values = {name: self.of_shown(run, x) for name, x in values.items()}
        sets = {name: self.arrays.add(x) for name, x in values.items()}
        loads, stores = self.loads(run, statement, names), self.stores(run, statement)
        self.files.add(statement.file)
        return Moment(
            statement.file, statement.lines, statement.function, statement.depth, telling.equation,
            telling.note, sets, loads, stores, role,
        )  # fmt: skip

    def of_shown(self, run: Run, x: Array) -> Array:
        """Of a tile with rows of all heads, the rows that are shown, in their order."""
        rows = run.known["row"].handle.data.tolist()
        return x[[rows.index(row) for row in self.shown.merged_rows if row in rows]] if x.ndim else x

    def loads(self, run: Run, statement: Statement, names: list[str]) -> list[Load]:
        """Where the rows of a tile come from; of one in pieces, where the first piece does."""
        fetched = [each for each in statement.fetched if not each.is_store]
        return [Load(FETCHED[name][0], *self.bytes_of(run, FETCHED[name][1], fetched[0]))
                for name in names if name in FETCHED and fetched]  # fmt: skip

    def stores(self, run: Run, statement: Statement) -> list[Store]:
        """Where the rows of a tile go."""
        fetched = [each for each in statement.fetched if each.is_store]
        if not fetched:
            return []
        name = stored_variable(statement.file, statement.lines[0])
        tensor, variable = STORED[name]
        return [Store(tensor, name, *self.bytes_of(run, variable, fetched[0]))]

    def bytes_of(self, run: Run, variable: str, fetched: Fetched) -> tuple[int, int]:
        """The byte at which each row begins, -1 for one that does not count, and from column to column."""
        addresses = fetched.addresses.astype(np.int64) - integer(run.known[variable][0])
        rows = np.where(fetched.mask, addresses[:, 0], -1)
        return self.arrays.add(rows), int(addresses[0, 1] - addresses[0, 0])

    def stages(self, run: Run, kernel: Kernel, tile: tuple[int, int]) -> Iterator[Stage]:
        """What a program did before its walk, in each step, and after it."""
        begin, end = loop_lines(kernel.file, kernel.function)
        stage, which = Stage("start"), 0
        place = [-1, -1]  # of the step, in the grid
        head: int | None = None
        for statement in run.statements:
            line = statement.lines[0]
            if statement.depth == 0:
                sets = statement.sets
                if kernel.run[0] in sets:
                    which = int(sets[kernel.run[0]])
                if line == begin:
                    yield stage
                    state: Literal["cut", "full"] = "cut" if which == kernel.run[1] else "full"
                    stage = Stage("step", None, state if kernel.run[0] else None)
                elif stage.kind == "step" and not begin <= line <= end:
                    yield stage
                    stage = Stage("end")
                if "head" in sets and kernel.walks == "rows":
                    head = int(sets["head"]) if self.shown.group > 1 else None
                place = self.place(kernel, statement, place, tile)
                if stage.kind == "step" and kernel.walks != "splits":
                    stage.tile, stage.head = (place[0], place[1]), head
            moment = self.moment(run, statement)
            if moment is not None:
                stage.moments.append(moment)
        yield stage

    @staticmethod
    def place(kernel: Kernel, statement: Statement, place: list[int], tile: tuple[int, int]) -> list[int]:
        """The row and the column of the grid that the program is at."""
        row, column = place
        if "q_tile" in statement.sets:
            row = int(statement.sets["q_tile"])
        if "kv_start" in statement.sets:
            column = int(statement.sets["kv_start"]) // tile[1]
        return [row, column]


def is_shown(run: Run, kernel: Kernel, shown: Shown) -> bool:
    """Whether a program worked on what is shown."""
    known = run.known
    if kernel.name == "combine":
        rows = known["row"].handle.data
        return bool(np.isin(rows, shown.merged_rows).any())
    if integer(known["batch"]) != shown.batch:
        return False
    is_of_group = kernel.walks == "rows" or shown.is_grouped
    return integer(known["kv_head" if is_of_group else "head"]) == (
        shown.kv_head if is_of_group else shown.head
    )


def pass_of(kernel: Kernel, runs: Sequence[Run], teller: Teller, tile: tuple[int, int]) -> Pass:
    """The programs of a kernel that worked on what is shown."""
    lengths = teller.shown.lengths
    grid = np.full([ceil_div(length, size) for length, size in zip(lengths, tile, strict=True)], SKIPPED)
    programs = []
    for run in runs:
        if (run.file, run.function) != (kernel.file, kernel.function) or not is_shown(
            run, kernel, teller.shown
        ):
            continue
        owns = owned(run, kernel, tile, teller.shown)
        if owns[0] >= owns[1]:  # packed sequences have programs to spare
            continue
        stages = [stage for stage in teller.stages(run, kernel, tile) if stage.moments]
        for stage in stages:
            if stage.tile is not None:
                grid[stage.tile] = CUT if stage.state == "cut" else FULL
        split = run.program[1] if kernel.name == "splits" else None
        programs.append(Program(run.program, kernel.walks, owns, split, stages))
    return Pass(
        kernel.name, kernel.title, kernel.about, kernel.file, kernel.function, tile, lengths,
        ["".join(row) for row in grid], programs,
    )  # fmt: skip


def owned(run: Run, kernel: Kernel, tile: tuple[int, int], shown: Shown) -> tuple[int, int]:
    """The rows, or keys, that a program owns: the first, and the first after the last."""
    if kernel.walks == "splits":
        mine = np.flatnonzero(np.isin(shown.merged_rows, run.known["row"].handle.data))
        return int(mine[0]), int(mine[-1]) + 1
    if kernel.walks == "rows":
        first = integer(run.known["kv_start"])
        return first, min(first + tile[1], integer(run.known["kv_len"]))
    first = integer(run.known["q_tile"]) * tile[0]
    return first, min(first + tile[0], integer(run.known["q_len"]) * len(shown.heads))
