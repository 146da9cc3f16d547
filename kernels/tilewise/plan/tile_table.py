"""What is a table of tiles, as a file? Rows of plain data, each with its evidence; read, checked and written.

The table that ships is `tile_table.json`; one that `tilewise tune` made for a GPU has the same form:

    {"format": 1, "rows": [
    {"pass": "forward", "arch": "sm_90", "element_bytes": 2, "dim": 64, "tile_q": 128, ..., "evidence": {}},
    ...
    ]}
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..kernels.tile import HOPPER_PASSES, PASSES, Pass, Tile, tile_from

# Pass, architecture, bytes an element (1: fp8, in the forward; 2: fp16 and bf16; 4: fp32), and the widest
# head_dim and value_dim that
# the row serves: down to those of the next narrower row; of Hopper's forward, see `tiles.tile_dim`.
Key = tuple[Pass, str, int, int]

SHIPPED = Path(__file__).with_name("tile_table.json")
FORMAT = 1
ELEMENT_BYTES, DIMS = (1, 2, 4), (64, 128, 256)
# These have a row where that of the next width does not do, or where there is none.
OTHER_DIMS = (96, 160, 192, 576)
MOST_WARPS, MOST_STAGES = 32, 8


@dataclass(frozen=True)
class Evidence:
    """Why a row is what it is. Without a GPU it was compiled, and never timed."""

    triton: str  # the version that compiled it
    registers: int | None = None  # a thread's
    shared_bytes: int | None = None  # a program's
    gpu: str | None = None  # on which it was timed
    milliseconds: dict[str, float] = field(default_factory=dict)  # median by case
    before: dict[str, float] = field(default_factory=dict)  # the same of the tile that it was compared with
    before_tile: str | None = None  # "128 x 64, 8 warps, 2 stages"
    gain: float | None = None  # before / after, geometric mean over the cases; 1.05: 5 % less time
    over_portable: float | None = None  # Hopper's: portable time / its time, the least over the cases
    samples: int | None = None  # the fewest behind a median
    error: float | None = None  # the largest, as a share of what the rule allows
    torch: str | None = None
    driver: str | None = None
    kernels: str | None = None  # `user_tiles.kernels_hash` of the kernels that were timed
    date: str | None = None  # UTC, ISO 8601


@dataclass(frozen=True)
class Row:
    """One tile, the calls that get it, and why."""

    work: Pass
    arch: str
    element_bytes: int
    dim: int
    tile: Tile
    evidence: Evidence

    @property
    def key(self) -> Key:
        return self.work, self.arch, self.element_bytes, self.dim


def to_json(row: Row) -> dict[str, Any]:
    """A row as plain data; what its evidence does not say is left out, except that it was timed nowhere."""
    evidence = {name: value for name, value in asdict(row.evidence).items() if value not in (None, {})}
    return {
        "pass": row.work,
        "arch": row.arch,
        "element_bytes": row.element_bytes,
        "dim": row.dim,
        **asdict(row.tile),
        "evidence": {"gpu": None, **evidence},
    }


_NUMBER, _TIMES = (int, float), dict
_EVIDENCE_TYPES: dict[str, Any] = {
    "registers": int, "shared_bytes": int, "samples": int, "gain": _NUMBER, "over_portable": _NUMBER,
    "error": _NUMBER, "milliseconds": _TIMES, "before": _TIMES,
}  # fmt: skip
_ROW_TYPES: dict[str, Any] = {
    "pass": str, "arch": str, "element_bytes": int, "dim": int, "tile_q": int, "tile_kv": int,
    "num_warps": int, "num_stages": int, "evidence": dict,
}  # fmt: skip
_COPIED_TYPES: dict[str, Any] = {"is_copied": bool}
_HOPPER_TYPES: dict[str, Any] = {"has_turns": bool, "is_q_in_registers": bool, "producer_warps": int}


def from_json(given: Any) -> Row:
    """The row that this plain data means. Raises ValueError that says what is wrong with it."""
    is_hopper = isinstance(given, dict) and given.get("pass") == "hopper"
    is_copied = isinstance(given, dict) and given.get("pass") == "forward" and "is_copied" in given
    types = _ROW_TYPES | (_HOPPER_TYPES if is_hopper else _COPIED_TYPES if is_copied else {})
    _check_fields("a row", given, types, required=types)
    known = {each.name: _EVIDENCE_TYPES.get(each.name, str) for each in fields(Evidence)}
    evidence = {name: value for name, value in given["evidence"].items() if value is not None}
    _check_fields("evidence", evidence, known, required=["triton"])
    for name in ("milliseconds", "before"):
        for case, value in evidence.get(name, {}).items():
            if isinstance(value, bool) or not isinstance(value, _NUMBER) or not value > 0:
                raise ValueError(f"{name}[{case!r}]={value!r} must be a positive number")
    for name, allowed in (
        ("pass", (*PASSES, *HOPPER_PASSES)),
        ("element_bytes", ELEMENT_BYTES),
        ("dim", sorted(DIMS + OTHER_DIMS)),
    ):
        if given[name] not in allowed:
            raise ValueError(f"{name}={given[name]!r} must be one of {', '.join(map(str, allowed))}")
    where = given["pass"], given["arch"], given["element_bytes"], given["dim"]
    if given["pass"] in HOPPER_PASSES:
        return Row(*where, tile_from(given["pass"], given), Evidence(**evidence))
    warps, stages = given["num_warps"], given["num_stages"]
    if not 1 <= warps <= MOST_WARPS or warps & (warps - 1):
        raise ValueError(f"num_warps={warps} must be a power of two from 1 to {MOST_WARPS}")
    if not 1 <= stages <= MOST_STAGES:
        raise ValueError(f"num_stages={stages} must be from 1 to {MOST_STAGES}")
    return Row(*where, tile_from(given["pass"], given), Evidence(**evidence))


def _check_fields(what: str, given: Any, types: dict[str, Any], required: Iterable[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, not {given!r}")
    if unknown := sorted(given.keys() - types.keys()):
        raise ValueError(f"{what} has no field {', '.join(unknown)}; it has {', '.join(types)}")
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    for name, value in given.items():
        if isinstance(value, bool) != (types[name] is bool) or not isinstance(value, types[name]):
            wanted = "a number" if types[name] is _NUMBER else types[name].__name__
            raise ValueError(f"{name}={value!r} must be {wanted}")


def load(path: Path) -> dict[Key, Row]:
    """The rows of a file by key. Raises ValueError naming the file, the row and what is wrong with it, and
    FileNotFoundError where there is none."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is no table of tiles: {error}") from None
    if (
        not isinstance(given, dict)
        or given.keys() != {"format", "rows"}
        or not isinstance(given["rows"], list)
    ):
        raise ValueError(f"{path} is no table of tiles: it must hold an object of format and rows")
    if given["format"] != FORMAT:
        raise ValueError(f"{path} has format={given['format']!r}; this version of tilewise reads {FORMAT}")
    rows: dict[Key, Row] = {}
    for number, each in enumerate(given["rows"], 1):
        try:
            row = from_json(each)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        if row.key in rows:
            raise ValueError(f"{path}, row {number}: a second row for {row.key}")
        rows[row.key] = row
    return rows


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of these rows, one a line. Whoever reads it sees all of the old file or all of the new."""
    lines = ",\n".join(json.dumps(to_json(row)) for row in rows)
    write_whole(path, f'{{"format": {FORMAT}, "rows": [\n{lines}\n]}}\n')


def write_whole(path: Path, text: str) -> None:
    """Put `text` into a file in one step: at no time is a part of it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
