"""Watches kernels that Python runs: which statement set which variable to what, and where tiles came from.

Triton's interpreter, and the emulator of Gluon, run a kernel's source as Python, statement by statement. A
trace function (`sys.settrace`) sees each line of the kernel's own frame. Whatever variable holds another
object at the next line was set by the statement of the line before. Nothing in a kernel knows of it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

PACKAGE = Path(__file__).parents[2]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fetched:
    """A tile that was loaded or stored: the address of each element, and which rows count."""

    addresses: Array  # [rows, columns] uint64
    mask: Array  # [rows] bool
    is_store: bool


@dataclass
class Statement:
    """A statement that has run."""

    number: int  # in the order in which statements ended, of all programs and roles
    file: str  # from the package's folder on
    lines: tuple[int, int]
    function: str
    depth: int
    sets: dict[str, Any]  # as `value_of` gives them
    fetched: list[Fetched] = field(default_factory=list)


@dataclass
class Run:
    """One program, or one role of it: the statements of its kernel, and of what it calls that is watched."""

    program: tuple[int, ...]
    file: str
    function: str
    statements: list[Statement] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)  # the kernel's variables as they are at the end


# Functions that a kernel calls whose own statements are worth a look, by file.
INSIDE = {"parts/softmax.py": {"softmax_step", "softmax_merge", "softmax_join"}}
ADDRESSES = ("parts/addressing.py", "tile_ptrs")
LOADS = ("parts/addressing.py", "load_tile")
STORES = ("parts/addressing.py", "store_tile")


def source_of(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse(source_of(file))


@functools.cache
def statements_of(file: str) -> dict[int, tuple[int, int]]:
    """The first and the last line of the innermost statement that each line of a file is part of; of one with
    a body, its head alone."""
    lines: dict[int, tuple[int, int]] = {}
    for node in ast.walk(tree_of(file)):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        last = max(node.lineno, body[0].lineno - 1 if body else node.end_lineno or 0)
        for line in range(node.lineno, last + 1):
            if line not in lines or lines[line][0] <= node.lineno:
                lines[line] = (node.lineno, last)
    return lines


def number_of(x: tl.tensor) -> Array | None:
    """A copy of what a value of the interpreter holds; None for addresses."""
    dtype = x.dtype.scalar
    if dtype.is_ptr():
        return None
    data = x.handle.data
    if dtype == tl.bfloat16:  # the interpreter keeps its raw bits
        data = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(data).reshape([int(getattr(size, "value", size)) for size in x.shape])


def value_of(x: Any) -> Any:
    """An array, a tuple of arrays, of an aggregate's fields a dict of arrays; None for what is neither."""
    if isinstance(x, tl.tensor):
        return number_of(x)
    if isinstance(x, tl.constexpr):
        x = x.value
    if isinstance(x, int):  # what is known when a kernel is compiled, such as IS_CUT
        return np.array(int(x))
    if isinstance(x, (tuple, tl.tuple)) and len(x):
        parts = tuple(value_of(part) for part in x)
        return parts if all(isinstance(part, np.ndarray) for part in parts) else None
    fields = getattr(x, "__dict__", None) or {}
    if fields and all(isinstance(field, tl.tensor) for field in fields.values()):
        return {name: number_of(field) for name, field in fields.items()}
    return None


class _Frame:
    """A frame that is watched: its variables at the line before, and what its statement has set so far."""

    def __init__(self, tracer: Tracer, frame: FrameType, run: Run, depth: int) -> None:
        self.tracer, self.run, self.depth = tracer, run, depth
        self.file, self.function = relative(frame), frame.f_code.co_name
        self.before = dict(frame.f_locals)
        self.lines = self._statement(frame.f_lineno)
        self.sets: dict[str, Any] = {}
        self.fetched: list[Fetched] = []

    def _statement(self, line: int) -> tuple[int, int]:
        return statements_of(self.file).get(line, (line, line))

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event not in ("line", "return"):
            return self
        now = dict(frame.f_locals)
        for name, x in now.items():
            if self.before.get(name, self) is not x and (value := value_of(x)) is not None:
                self.sets[name] = value
        lines = self._statement(frame.f_lineno)
        if event == "return" or lines != self.lines:
            self._end()
        self.before, self.lines = now, lines
        if event == "return" and self.depth == 0:
            self.run.known = now
            self.tracer.running.pop(threading.get_ident(), None)
        return self

    def _end(self) -> None:
        """The statement is over."""
        if self.sets or self.fetched or self.tracer.is_told(self.file, self.lines[0]):
            self.tracer.count += 1
            self.run.statements.append(
                Statement(
                    self.tracer.count,
                    self.file,
                    self.lines,
                    self.function,
                    self.depth,
                    self.sets,
                    self.fetched,
                )
            )
        self.sets, self.fetched = {}, []


class Tracer:
    """Watches the functions `kernels`, by file and name: each call of one is a `Run`."""

    def __init__(
        self,
        kernels: set[tuple[str, str]],
        is_told: Callable[[str, int], bool],
    ) -> None:
        """is_told: whether a statement counts that sets nothing, by its file and first line."""
        self.kernels, self.is_told = kernels, is_told
        self.runs: list[Run] = []
        self.running: dict[int, _Frame] = {}  # by thread
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        file = relative(frame)
        if not file:
            return None
        name = frame.f_code.co_name
        mine = self.running.get(threading.get_ident())
        if mine is None:
            if (file, name) not in self.kernels:
                return None
            run = Run(tuple(interpreter_builder.grid_idx), file, name)
            self.runs.append(run)
            watched = self.running[threading.get_ident()] = _Frame(self, frame, run, 0)
            return watched
        if name in INSIDE.get(file, ()):
            return _Frame(self, frame, mine.run, 1)
        if (file, name) == ADDRESSES:
            return functools.partial(self._addresses, mine)
        return None

    def _addresses(self, mine: _Frame, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        """Of `tile_ptrs`, whose result are addresses."""
        if event == "return":
            caller = frame.f_back
            while caller is not None and not relative(caller):  # Triton's frames are between
                caller = caller.f_back
            assert caller is not None
            who = relative(caller), caller.f_code.co_name
            assert who in (LOADS, STORES), f"{who} asks for addresses"
            mask = caller.f_locals["row_mask"]
            addresses = np.array(arg.handle.data)
            counts = np.ones(len(addresses), bool) if mask is None else np.array(mask.handle.data, bool)
            mine.fetched.append(Fetched(addresses, counts, who == STORES))
        return functools.partial(self._addresses, mine)


@functools.cache
def _relative(path: str) -> str:
    try:
        return Path(path).relative_to(PACKAGE).as_posix()
    except ValueError:
        return ""


def relative(frame: FrameType) -> str:
    """The file of a frame, from the package's folder on; "" where it is not of the package."""
    return _relative(frame.f_code.co_filename)


@contextlib.contextmanager
def watching(tracer: Tracer) -> Iterator[Tracer]:
    """Watch what this thread, and threads that it starts, run in the block."""
    before = sys.gettrace()
    sys.settrace(tracer)
    threading.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(before)
        threading.settrace(before)
