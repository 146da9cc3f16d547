"""What is tilewise meant to reach? The goals, and which rows each of them speaks of.

They were set for an H200 before anything had run on one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..results import Row
from .ranking import Contest, geometric_mean
from .table import Table
from .units import duration, percent, teraflops, times

GPUS = ("H100", "H200")  # whose limits a clock are the same; the goals say nothing about others


@dataclass(frozen=True)
class Goal:
    """`measure` says what the three levels are: tilewise's ratio to the fastest rival (geometric mean over
    the cases), FLOPs a second (of the slowest case), the time of a call in seconds (likewise), the share of
    the datasheet's memory bandwidth (geometric mean), or FLOPs a second over tilewise's own in another case
    (geometric mean).

    beside: how the case's name ends, and how that of the other does."""

    name: str
    covers: Callable[[Row], bool]
    floor: float
    target: float
    stretch: float | None
    measure: Literal["ratio", "rate", "seconds", "bandwidth", "beside"] = "ratio"
    beside: tuple[str, str] = ("", "")

    def written(self, value: float | None) -> str:
        """A level or a result in the goal's unit."""
        if value is None:
            return ""
        units = {
            "ratio": times,
            "rate": teraflops,
            "seconds": duration,
            "bandwidth": percent,
            "beside": times,
        }
        return units[self.measure](value)

    def verdict(self, value: float) -> str:
        """The highest level that `value` reaches."""
        sign = -1 if self.measure == "seconds" else 1
        levels = (("stretch", self.stretch), ("target", self.target), ("floor", self.floor))
        return next(
            (name for name, level in levels if level is not None and sign * value >= sign * level),
            "below floor",
        )


def _grid(work: str, head_dim: int, kind: str = "", least: int = 1025) -> Callable[[Row], bool]:
    """Rows of the papers' grid, `least` tokens or more."""

    def matches(row: Row) -> bool:
        long = row.sizes.get("kv_len", 0) >= least
        return row.work == work and row.case.startswith(f"paper-d{head_dim}-{kind}") and long

    return matches


def _short(row: Row) -> bool:
    named = row.case.startswith(("paper-", "short-"))
    return row.work == "forward" and named and 0 < row.sizes.get("kv_len", 0) <= 1024


HARD = re.compile(r"feature-(bool-mask|bias-gradient|softcap|sink|dropout)|gemma2-|gpt-oss-|deepseek-")


def _hard(row: Row) -> bool:
    decoding = row.sizes.get("q_len") == 1  # has a goal of its own
    return row.work in ("forward", "backward") and HARD.match(row.case) is not None and not decoding


def _host(row: Row) -> bool:
    return row.work == "host forward" and not row.case.endswith("-training")


def _cold(row: Row) -> bool:
    return row.work == "cold start"


def _decode(row: Row) -> bool:
    paged = "-pages" in row.case  # has goals of its own
    return row.work == "forward" and row.sizes.get("q_len") == 1 and row.bytes >= 256e6 and not paged


def _paged(page_size: int) -> Callable[[Row], bool]:
    return lambda row: row.case.startswith("cached-") and row.case.endswith(f"-pages{page_size}")


def _packed(how: str) -> Callable[[Row], bool]:
    return lambda row: row.case.startswith("packed-") and row.case.endswith(f"-{how}")


_FULL, _CAUSAL = _grid("forward", 128, "full", 4096), _grid("forward", 128, "causal", 4096)
_LACKING = "boolean mask, bias with gradient, softcap, sink, dropout, head_dim ≠ value_dim"
_DECODE = "decode, keys and values of 256 MB: share of the datasheet's bandwidth"
_PAGES = "a cache in pages of {} rows, beside the same without pages"
_DENSE = "packed sequences of equal length, beside the same as a dense batch"
# 1 where cost rises with the sum of squared lengths. Padding to the longest would give 0.04; tiles of 128
# rows alone, which ends of sequences fill in part, leave 0.91.
_EVEN = "packed sequences of mixed lengths, FLOPs a second beside those of equal ones"

GOALS = (
    Goal("forward, head_dim 128, full, from 4k", _FULL, 0.70, 0.96, 1.02),
    Goal("forward, head_dim 128, full, from 4k: FLOPs a second", _FULL, 420e12, 600e12, 700e12, "rate"),
    Goal("forward, head_dim 128, causal, from 4k", _CAUSAL, 0.70, 0.96, 1.02),
    Goal("forward, head_dim 64, above 1k", _grid("forward", 64), 0.70, 0.95, 1.02),
    Goal("forward, head_dim 256, above 1k", _grid("forward", 256), 0.65, 0.95, 1.01),
    Goal("backward, head_dim 128, above 1k", _grid("backward", 128), 0.65, 0.90, 1.00),
    Goal("forward, up to 1k", _short, 0.80, 1.00, 1.10),
    Goal(_LACKING, _hard, 2.0, 3.0, None),
    Goal(_DECODE, _decode, 0.75, 0.83, 0.88, "bandwidth"),
    Goal(_PAGES.format(64), _paged(64), 0.90, 0.95, 1.00, "beside", ("-pages64", "")),
    Goal(_PAGES.format(16), _paged(16), 0.80, 0.90, None, "beside", ("-pages16", "")),
    Goal(_DENSE, _packed("equal"), 0.90, 0.97, 1.00, "beside", ("-equal", "-dense")),
    Goal(_EVEN, _packed("mixed"), 0.60, 0.75, 0.85, "beside", ("-mixed", "-equal")),
    Goal("host time of a forward call without gradients", _host, 25e-6, 15e-6, 10e-6, "seconds"),
    Goal("first call, cold cache, one shape", _cold, 10.0, 5.0, 2.0, "seconds"),
)


def concerns(gpu: str | None) -> bool:
    """Whether the goals were set for this GPU."""
    return gpu is not None and any(name in gpu for name in GPUS)


@dataclass(frozen=True)
class Outcome:
    """Where one implementation stands with a goal; no case: nothing was measured that the goal speaks of."""

    goal: Goal
    cases: tuple[str, ...]
    value: float | None


def outcome(goal: Goal, found: Iterable[Contest], implementations: Iterable[str], gpu: str) -> Outcome:
    """The result of the implementations, of each case the faster of them, over the cases in which an answer
    of theirs is right (and, for a ratio, a rival's too)."""
    names, found = {*implementations}, list(found)
    fastest = {(contest.case, contest.work): contest.fastest(names) for contest in found}
    values: dict[str, float] = {}
    for contest in found:
        row = fastest[contest.case, contest.work]
        if row is None or not goal.covers(row):
            continue
        if goal.measure == "beside":
            other = row.case.removesuffix(goal.beside[0]) + goal.beside[1]
            value = rate_over(row, fastest.get((other, row.work)))
        else:
            value = measured(goal, contest, row, gpu)
        if value is not None:
            values[f"{contest.case}, {contest.work}"] = value
    if not values:
        return Outcome(goal, (), None)
    combine = {"seconds": max, "rate": min}.get(goal.measure, geometric_mean)
    return Outcome(goal, tuple(values), combine(values.values()))


def measured(goal: Goal, contest: Contest, row: Row, gpu: str) -> float | None:
    """What the goal measures of a row that is right."""
    if goal.measure == "ratio":
        return contest.ratio(row)
    assert row.median
    if goal.measure == "rate":
        return row.flops / row.median
    return row.median if goal.measure == "seconds" else row.bytes / row.median / datasheet_bandwidth(gpu)


def rate_over(row: Row, other: Row | None) -> float | None:
    """FLOPs a second of a row over those of another; None where there is none."""
    if other is None or not row.median or not other.median:
        return None
    return row.flops / row.median / (other.flops / other.median)


def datasheet_bandwidth(gpu: str) -> float:
    # Here, so that a report in which nobody decodes need not import torch.
    from tilewise.tools.chips import find_chip

    return find_chip(gpu).memory_bytes


def levels() -> Table:
    """The goals by themselves."""
    lines = [(g.name, *map(g.written, (g.floor, g.target, g.stretch))) for g in GOALS]
    return Table("Goals", ("goal", "floor", "target", "stretch"), tuple(lines))
