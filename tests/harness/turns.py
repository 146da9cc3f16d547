"""Which kernels does this run compile, and for which chip? Every variant in every run, for one of its chips
at least; in as many days as it has chips, at most four, for all of them.

To compile everything for every chip takes minutes of both cores. A change seldom makes a kernel worse in one
row of the table and on one chip alone, so most variants go from chip to chip, a day each: the number of the
day decides, and every run of a day compiles the same.

    TILEWISE_TURN=739950 python -m pytest tests/test_compiled.py    as on that day: the header says its number
    TILEWISE_TURN=all python -m pytest tests/test_compiled.py       everything, as a change of tiles deserves
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone

VARIABLE, EVERYTHING = "TILEWISE_TURN", "all"


def today() -> str:
    """The number of the day, the same wherever the sun stands."""
    return str(datetime.now(timezone.utc).toordinal())


def turn() -> int | None:
    """The number that decides; None where everything has its turn."""
    said = os.environ.get(VARIABLE) or today()
    if said == EVERYTHING:
        return None
    if not said.isdecimal():
        raise ValueError(f"{VARIABLE}={said!r} must be the number of a day, as {today()}, or {EVERYTHING!r}")
    return int(said)


def has_its_turn(place: int, target: str, targets: Sequence[str]) -> bool:
    """Whether the variant at this place in its list, which is for these targets, is compiled for this one."""
    number = turn()
    return target in targets and (number is None or targets[(place + number) % len(targets)] == target)
