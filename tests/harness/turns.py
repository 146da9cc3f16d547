"""Which kernels does this run compile, and for which chip? And which cases of its longest sweeps does it try?

Every variant is compiled in every run, for one of its chips at least; in as many days as it has chips, at
most four, for all of them.

To compile everything for every chip takes minutes of both cores. A change seldom makes a kernel worse in one
row of the table and on one chip alone, so most variants go from chip to chip, a day each: the number of the
day decides, and every run of a day compiles the same.

That is for kernels which have been compiled before. Where a source of theirs, a tile or a list of variants
has changed since all was compiled by this Triton, or Triton is another, everything has its turn.

A test that is marked `in_turns` has many cases: pairs of features, one thing by sizes and dtypes, a feature
with others drawn around it. Each mask and each score by itself, forward and backward, is in tests that run
whole every day. A run of the whole suite in the interpreter takes a quarter of such cases, the next day
another, in four days all. A run that names tests, by file, by -k or by -m, takes all of them, and so does one
on a GPU.

    TILEWISE_TURN=739950 python -m pytest tests/test_compiled.py    as on that day: the header says its number
    TILEWISE_TURN=all python -m pytest tests/test_compiled.py       everything
    TILEWISE_TURN=all python -m pytest                              every kernel, every case of every sweep
    python -m pytest tests/test_properties.py                       every case of that file
    PYTHONPATH=tests python -m harness.turns                        note that all was compiled, and passed
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path

import triton

VARIABLE, EVERYTHING = "TILEWISE_TURN", "all"
SWEEPS = "TILEWISE_SWEEPS"  # "in turns" or "whole": set by the run that starts the workers
DAYS = 4  # in which a sweep is whole
ROOT = Path(__file__).parents[2]
NOTED = (
    ROOT / "tests" / "baselines" / "compiled.json"
)  # by the version of Triton, the sources of all it compiled
SOURCES = (
    "kernels/tilewise/kernels/**/*.py",
    "kernels/tilewise/parts/**/*.py",
    "kernels/tilewise/plan/tile*",
    "kernels/tilewise/plan/tangent_tiles.py",
    "tests/harness/variants.py",
)


def today() -> str:
    """The number of the day, the same wherever the sun stands."""
    return str(datetime.now(timezone.utc).toordinal())


def sources(root: Path = ROOT) -> str:
    """A hash of what compiled kernels depend on."""
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    found = hashlib.sha256()
    for path in paths:
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def due(root: Path = ROOT) -> str:
    """What a run compiles that nobody has said anything about: all, or what has its turn today."""
    noted = json.loads(NOTED.read_text()) if NOTED.exists() else {}
    return today() if noted.get(triton.__version__) == sources(root) else EVERYTHING


def note() -> None:
    """Note that this Triton has compiled everything that these sources ask for."""
    noted = json.loads(NOTED.read_text()) if NOTED.exists() else {}
    NOTED.write_text(json.dumps(noted | {triton.__version__: sources()}, indent=1, sort_keys=True) + "\n")


unsaid = functools.cache(due)  # for a process that asks for each of many


def turn() -> int | None:
    """The number that decides; None where everything has its turn."""
    said = os.environ.get(VARIABLE) or unsaid()
    if said == EVERYTHING:
        return None
    if not said.isdecimal():
        raise ValueError(f"{VARIABLE}={said!r} must be the number of a day, as {today()}, or {EVERYTHING!r}")
    return int(said)


def has_its_turn(place: int, target: str, targets: Sequence[str]) -> bool:
    """Whether the variant at this place in its list, which is for these targets, is compiled for this one."""
    number = turn()
    return target in targets and (number is None or targets[(place + number) % len(targets)] == target)


def whose_turn(cases: Collection[str]) -> set[str]:
    """Of a sweep's cases those that are tried: dealt out by their names, so that no day has one size or one
    dtype alone."""
    number = turn()
    dealt = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())
    return {case for i, case in enumerate(dealt) if number is None or (i + number) % DAYS == 0}


if __name__ == "__main__":
    note()
