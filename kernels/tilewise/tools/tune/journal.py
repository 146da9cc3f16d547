"""What has tuning tried so far? A file of JSON lines beside the table, so that no candidate is tried twice.

An entry counts for the GPU, Triton and kernels that it was made with (its stamp), and for one subject: a row
of the table, the cases that decide it and the tile that candidates are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, NamedTuple

from ...kernels.tile import CopiedTile, HopperBackwardTile, HopperTile, Pass, Tile
from ...plan.tile_table import Key

ATTEMPTS = 2  # a candidate that twice left no result took the process with it


def tile_of(work: Pass, numbers: Sequence[Any]) -> Tile:
    """A pass' tile, of its numbers as an entry has them."""
    if work == "hopper":
        return HopperTile(*numbers)
    if work == "hopper_backward":
        return HopperBackwardTile(*numbers)
    return CopiedTile(*numbers) if len(numbers) > len(fields(Tile)) else Tile(*numbers)


class Subject(NamedTuple):
    key: Key
    cases: tuple[str, ...]
    shipped: Tile


class Journal:
    """The entries of one file; those with another stamp stay there and are not seen."""

    def __init__(self, path: Path, stamp: str, fresh: bool = False) -> None:
        """fresh: nothing that was tried before counts."""
        self.path, self.stamp = path, stamp
        if fresh:
            path.unlink(missing_ok=True)
        self._entries = [entry for entry in read_entries(path) if entry.get("stamp") == stamp]

    def add(self, kind: str, subject: Subject, tile: Tile | None = None, **facts: Any) -> None:
        """Write an entry; it is in the file when this returns."""
        entry = {"stamp": self.stamp, "kind": kind, **_words(subject), **facts}
        if tile is not None:
            entry["tile"] = list(astuple(tile))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._entries.append(entry)

    def about(self, subject: Subject) -> list[dict[str, Any]]:
        words = _words(subject)
        return [entry for entry in self._entries if all(entry.get(k) == v for k, v in words.items())]

    def tried(self, subject: Subject) -> dict[Tile, dict[str, Any]]:
        """By tile the entry that says how it went: its kind is "timed", "rejected" or "lost"."""
        found: dict[Tile, dict[str, Any]] = {}
        attempts: dict[Tile, int] = {}
        for entry in self.about(subject):
            if "tile" not in entry:
                continue
            tile = tile_of(subject.key[0], entry["tile"])
            if entry["kind"] in ("trying", "interrupted"):
                attempts[tile] = attempts.get(tile, 0) + (1 if entry["kind"] == "trying" else -1)
            elif entry["kind"] != "timed" or found.get(tile, entry)["kind"] == "timed":
                found[tile] = entry  # what was found wrong later on stays wrong
        for tile, count in attempts.items():
            if count >= ATTEMPTS and tile not in found:
                found[tile] = {"kind": "lost", "reason": f"{count} runs ended while it was tried"}
        return found

    def outcome(self, subject: Subject) -> dict[str, Any] | None:
        """The last outcome, if no candidate was left to try."""
        outcomes = [entry for entry in self.about(subject) if entry["kind"] == "outcome"]
        return outcomes[-1] if outcomes and outcomes[-1]["left"] == 0 else None

    def row(self, subject: Subject) -> dict[str, Any] | None:
        """The last row that was made of an outcome, with the evidence of then."""
        rows = [entry["data"] for entry in self.about(subject) if entry["kind"] == "row"]
        return rows[-1] if rows else None


def _words(subject: Subject) -> dict[str, Any]:
    return {
        "row": list(subject.key),
        "cases": list(subject.cases),
        "shipped": list(astuple(subject.shipped)),
    }


def read_entries(path: Path) -> list[dict[str, Any]]:
    """All entries of a file, none where there is no file; a last line that was cut off is left out.

    Raises ValueError for a file of anything else.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}; start over with --fresh") from None
    return entries
