"""How long do many calls of one size take at least? Their tiles are counted together, and calls of the same
counts are looked at once: a plan for thousands of ranks has millions of calls, and few that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ....parts.shape import Shape
from ..coverage import (
    Coverage,
    Rows,
    Visits,
    coverage_of,
    keys_of_each,
    keys_that_are_seen,
    of_a_parameter,
    over_keys,
    over_rows,
    pairs_of_each,
    pairs_that_count,
    walk_of_a_parameter,
    walk_over_keys,
    walk_over_rows,
)
from ..parts import Part, Parts
from ..workload import Workload, hopper_over_keys, hopper_walk, kernels_of

# What the model asks of `Parts`, and the same of each batch and head.
VISITS: dict[Callable[..., Coverage], Callable[..., Visits]] = {
    walk_over_keys: over_keys,
    walk_over_rows: over_rows,
    walk_of_a_parameter: of_a_parameter,
    hopper_walk: hopper_over_keys,
}
COUNTS: dict[Callable[..., int], Callable[..., torch.Tensor]] = {
    pairs_that_count: pairs_of_each,
    keys_that_are_seen: keys_of_each,
}
Question = tuple[Any, ...]  # the count, and of a walk the tile


@dataclass(frozen=True)
class Times:
    """Of each piece: the least seconds of its forward and of its backward, float64, and the pairs of query
    and key that count, int64. Each [pieces]."""

    forward: torch.Tensor
    backward: torch.Tensor
    pairs: torch.Tensor

    def __getitem__(self, which: Any) -> Times:
        return Times(self.forward[which], self.backward[which], self.pairs[which])

    def __add__(self, other: Times) -> Times:
        return Times(self.forward + other.forward, self.backward + other.backward, self.pairs + other.pairs)


def joined(times: list[Times]) -> Times:
    """The pieces of all, in order."""
    columns = ([getattr(each, field.name) for each in times] for field in fields(Times))
    return Times(*map(torch.cat, columns))


class Pieces:
    """Calls of one shape. rows: what each sees, those of a call behind those of the call before it,
    [pieces · (batch or 1), q_heads or 1, q_len]."""

    def __init__(self, shape: Shape, rows: Rows, count: int) -> None:
        self.shape, self.rows, self.count = shape, rows, count

    def asked(self, count: Callable[..., Any], *tile: int) -> torch.Tensor:
        """The answers of all pieces, int64 [pieces, 1], or [pieces, 2] of tiles: visited and full ones."""
        shape = self.shape._replace(batch=self.rows.repeats[0])
        if 0 in self.shape.scores:
            return torch.zeros(self.count, 2 if count in VISITS else 1, dtype=torch.int64, device="cpu")
        if count in VISITS:
            return torch.stack([self.summed(x) for x in VISITS[count](self.rows, shape, *tile)], 1)
        heads = shape.kv_heads if count is keys_that_are_seen else shape.q_heads
        return self.summed(COUNTS[count](self.rows, shape), heads)[:, None]

    def summed(self, each: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """[pieces · (batch or 1), heads or 1] as the sum over all batches and heads, [pieces]."""
        heads = self.shape.q_heads if heads is None else heads
        alike = self.shape.batch * self.count // each.shape[0] * (heads // each.shape[1])
        return each.reshape(self.count, -1).sum(1) * alike


class OnePiece(Parts):
    """A piece as the model of a call sees it: `answers` holds what it may ask."""

    def __init__(self, pieces: Pieces, answers: dict[Question, list[int]]) -> None:
        super().__init__([Part(pieces.shape, pieces.rows)])
        self.answers = answers

    def total(self, count: Callable[..., Any], start: Any, *tile: int) -> Any:
        question = (count, *tile)
        found = self.answers[question]
        if count not in VISITS:
            return found[0]
        sides = (tile[0], tile[-1])  # that of a parameter is square
        return coverage_of(self.parts[0].shape, sides, found[0], found[1])


class Asking(dict[Question, list[int]]):
    """Answers of the first piece, worked out when they are asked for: then it is known what is asked."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self.pieces = pieces
        self.of_all: dict[Question, torch.Tensor] = {}

    def __missing__(self, question: Question) -> list[int]:
        self[question] = self.all_answers(*question)[0].tolist()
        return self[question]

    def all_answers(self, *question: Any) -> torch.Tensor:
        """Those of all pieces."""
        if question not in self.of_all:
            self.of_all[question] = self.pieces.asked(*question)
        return self.of_all[question]


def seconds_of(work: Workload, parts: Parts) -> tuple[float, float]:
    """The least time of the forward's kernels and of the backward's."""
    forward, *backward = (kernel.limits.overlapped for kernel in kernels_of(replace(work, parts=parts)))
    return forward, sum(backward)


def times_of(work: Workload, pieces: Pieces) -> Times:
    """The times of all pieces; `work` is a workload of their shape."""
    if pieces.count == 0:
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return Times(nothing, nothing, nothing.long())
    asking = Asking(pieces)
    seconds_of(work, OnePiece(pieces, asking))
    pairs = asking.all_answers(pairs_that_count)[:, 0]
    widths = [answers.shape[1] for answers in asking.of_all.values()]
    table = torch.cat([*asking.of_all.values()], 1)
    distinct, which = table.unique(dim=0, return_inverse=True)
    found = []
    for row in distinct:
        split = [part.tolist() for part in row.split(widths)]
        found.append(seconds_of(work, OnePiece(pieces, dict(zip(asking.of_all, split, strict=True)))))
    forward, backward = torch.tensor(found, dtype=torch.float64, device="cpu").unbind(1)
    return Times(forward[which], backward[which], pairs)
