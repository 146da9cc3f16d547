"""Who is faster? The contest of one case: which rival is the fastest, and every row's ratio to it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from ..results import Ceilings, Row

PORTABLE, HOPPER = "tilewise portable", "tilewise hopper"
FASTER = "tilewise, the faster"  # of its kernels, in each case


def is_tilewise(implementation: str) -> bool:
    return implementation.startswith("tilewise")


def is_whole(implementation: str) -> bool:
    """Whether it does all that a user waits for: a host time without the launch of kernels is a part."""
    return "no launch" not in implementation


def is_contender(implementation: str) -> bool:
    """Whether it is there to be fast: tilewise's kernels, not its path in plain PyTorch."""
    return is_tilewise(implementation) and is_whole(implementation) and implementation != "tilewise torch"


def kernels_of(rows: Iterable[Row]) -> list[str]:
    """The implementations of tilewise that users call and that are there to be fast, not what is wrapped
    around them: "tilewise portable", "tilewise hopper"."""
    names = dict.fromkeys(row.implementation for row in rows)
    return [name for name in names if is_contender(name) and "," not in name]


def counts(row: Row) -> bool:
    """Whether a row is right and timed: only such a row can be faster than another."""
    return row.status == "ok" and bool(row.seconds)


@dataclass(frozen=True)
class Contest:
    """All rows of one case and work."""

    rows: tuple[Row, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.rows[0].key

    @property
    def case(self) -> str:
        return self.rows[0].case

    @property
    def work(self) -> str:
        return self.rows[0].work

    @property
    def rival(self) -> Row | None:
        """The fastest rival whose answer is right."""
        return self.fastest({row.implementation for row in self.rows if not is_tilewise(row.implementation)})

    def fastest(self, names: Container[str]) -> Row | None:
        """The fastest row of these implementations whose answer is right."""
        rows = [row for row in self.rows if row.implementation in names and counts(row)]
        return min(rows, key=lambda row: row.median or math.inf, default=None)

    def ratio(self, row: Row) -> float | None:
        """The fastest rival's time over the row's: above 1, the row is faster. None where one is missing
        or the row times a part only."""
        rival = self.rival
        if (
            rival is None
            or not counts(row)
            or not is_whole(row.implementation)
            or not row.median
            or rival.median is None
        ):
            return None
        return rival.median / row.median


def over_portable(contest: Contest) -> float | None:
    """The portable kernel's time over that of Hopper's forward, where both are right."""
    hopper, portable = (contest.fastest((name,)) for name in (HOPPER, PORTABLE))
    if hopper is None or portable is None or not hopper.median or not portable.median:
        return None
    return portable.median / hopper.median


def has_rate(row: Row) -> bool:
    """Whether FLOPs a second mean something: not for the host's work, nor for a first call."""
    return row.flops > 0 and not row.work.startswith("host") and row.work != "cold start"


def contests(rows: Iterable[Row]) -> list[Contest]:
    """The rows by what they are compared under, in the order in which they were measured."""
    by_key: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_key.setdefault(row.key, []).append(row)
    return [Contest(tuple(same)) for same in by_key.values()]


def case_names(rows: Iterable[Row]) -> dict[tuple[str, str, str], str]:
    """What to call each case of a group: the work is named where the group has several."""
    rows = list(rows)
    several = len({row.work for row in rows}) > 1
    return {row.key: f"{row.case}, {row.work}" if several else row.case for row in rows}


def limit(row: Row, ceilings: Ceilings | None, by: float = 1.0) -> Literal["compute", "memory"] | None:
    """What bounds the row on this machine: "memory" where its memory traffic takes more than `by` times as
    long as its matmuls at the measured rates. None where a rate or a number is missing."""
    if ceilings is None or not ceilings.copy_bytes_per_second or not has_rate(row) or not row.bytes:
        return None
    rate = ceilings.matmul_flops_per_second.get(row.dtype)
    if not rate:
        return None
    return "memory" if row.bytes / ceilings.copy_bytes_per_second > by * row.flops / rate else "compute"


def geometric_mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs))
