"""What the page of `tilewise watch` is made of: one call, and all that its kernels computed.

A recording is a tree of the classes here; arrays of numbers lie beside it, each once, and are named by their
place. `Recording.to_json` is what the page reads (page/src/recording.ts has the same tree).
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

FORMAT = 1
MOST_BYTES = 3_000_000  # of all arrays, so that the page stays below 5 MB: base64 takes four for three
Array = np.ndarray[Any, Any]
PassName = Literal["forward", "splits", "combine", "dkv", "dq", "hopper"]
SKIPPED, CUT, FULL = ".", "%", "#"  # a tile of the grid


class TooLarge(ValueError):
    """The call has more numbers than a page can hold."""


class Arrays:
    """Arrays by their place; equal ones are kept once. most: bytes of all together; None: any number."""

    def __init__(self, most: int | None = MOST_BYTES) -> None:
        self.most = most
        self.kept: list[Array] = []
        self._places: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._bytes = 0

    def add(self, x: Array) -> int:
        """x's place. Floats are kept in fp32, which every dtype of a kernel fits, integers in int32."""
        kind = {"f": np.float32, "b": np.uint8}.get(x.dtype.kind, np.int32)
        kept = np.ascontiguousarray(x, dtype=kind).reshape(x.shape)
        key = (kept.dtype.str, kept.shape, kept.tobytes())
        if key not in self._places:
            self._bytes += kept.nbytes
            if self.most is not None and self._bytes > self.most:
                raise TooLarge
            self._places[key] = len(self.kept)
            self.kept.append(kept)
        return self._places[key]

    def __getitem__(self, place: int) -> Array:
        return self.kept[place]


@dataclass(frozen=True)
class Load:
    """Where a tile came from: the byte at which each row begins, from the tensor's first byte on, and how
    many bytes lie between columns. A row that reads as 0 instead has -1."""

    tensor: str
    rows: int
    column: int


@dataclass(frozen=True)
class Store:
    """Where a variable went, in the same way. A row that is not written has -1."""

    tensor: str
    variable: str
    rows: int
    column: int


@dataclass(frozen=True)
class Moment:
    """One statement of a kernel, and the variables that it set."""

    file: str
    lines: tuple[int, int]
    function: str
    depth: int  # 0: the kernel itself, 1: a function that it called
    equation: str
    note: str
    sets: dict[str, int]
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    role: str = ""


@dataclass
class Stage:
    """The moments before the walk, of one step, or after the walk."""

    kind: Literal["start", "step", "end"]
    tile: tuple[int, int] | None = None  # row and column of the grid
    state: Literal["cut", "full"] | None = None
    head: int | None = None  # of queries, where a program walks the rows of several
    moments: list[Moment] = field(default_factory=list)


@dataclass
class Program:
    """One program of a launch: what it owns, and what it did."""

    id: tuple[int, ...]
    walks: Literal["keys", "rows", "splits"]
    owns: tuple[int, int]  # rows, or keys where it walks rows: first, stop
    split: int | None = None
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Span:
    name: str
    step: int
    begin: float
    end: float


@dataclass(frozen=True)
class Lane:
    name: str
    unit: bool  # of the chip; else a role
    spans: list[Span]


@dataclass(frozen=True)
class Timeline:
    """Who works when, by the machine model of tools/overlap; nobody has measured it."""

    about: str
    clocks: float
    lanes: list[Lane]


@dataclass
class Pass:
    """The programs of one kernel that worked on the head shown."""

    name: PassName
    title: str
    about: str
    file: str
    kernel: str
    tile: tuple[int, int]
    lengths: tuple[int, int]
    grid: list[str]
    programs: list[Program]
    words: dict[str, list[str]] | None = None  # where they are not the call's: "queries" and "keys"
    tensors: dict[str, int] | None = None  # as for words
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Similarity:
    name: str
    equation: str
    weights: int


@dataclass(frozen=True)
class Masked:
    name: str
    weights: int
    grid: list[str]
    visited: int
    total: int


@dataclass(frozen=True)
class Rounding:
    """How far O / row_sum of each row is from float64's over the same keys: the largest of its columns. NaN
    where a row has seen no key."""

    dtype: str
    keys: list[int]
    error: int  # [steps, rows]


@dataclass(frozen=True)
class Cost:
    """What the page needs to count the bytes of a matrix of scores of any length."""

    heads: int
    element: int


@dataclass(frozen=True)
class Compare:
    similarity: list[Similarity]
    mask: list[Masked]
    rounding: list[Rounding]
    bytes: Cost


@dataclass(frozen=True)
class CallShown:
    """The call, and the batch and head of it that are shown."""

    text: str
    q: list[int]
    k: list[int]
    v: list[int]
    dtype: str
    mask: str
    score: str
    similarity: str
    scale: float | None  # of the dot products; None where it has been applied in `scores`
    batch: int
    head: int


@dataclass(frozen=True)
class Recording:
    title: str
    made: dict[str, str]
    call: CallShown
    words: dict[str, list[str]]  # "queries" and "keys"
    arrays: Arrays
    tensors: dict[str, int]
    passes: list[Pass]
    sources: dict[str, list[list[tuple[str, str]]]]
    glossary: dict[str, dict[str, str]]
    compare: Compare
    omitted: dict[str, str]  # what could not be recorded of this call, and why

    def to_json(self) -> str:
        """The text that the page reads."""
        names = [name for name in self.__dataclass_fields__ if name != "arrays"]
        tree = {name: _plain(getattr(self, name)) for name in names}
        arrays = [
            {"shape": x.shape, "type": x.dtype.str[1:], "data": base64.b64encode(x.tobytes()).decode("ascii")}
            for x in self.arrays.kept
        ]
        return json.dumps({"format": FORMAT, **tree, "arrays": arrays}, separators=(",", ":"))


def _plain(x: Any) -> Any:
    if isinstance(x, list):
        return [_plain(each) for each in x]
    return asdict(x) if hasattr(x, "__dataclass_fields__") else x
