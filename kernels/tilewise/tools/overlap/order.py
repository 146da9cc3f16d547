"""What does it cost that dQ is summed in one order? Programs of a backward, dealt out and timed.

A program owns a tile of keys of one head and walks the tiles of rows that see it. It adds its share of a
tile of rows when the program of the keys before has added its own; it computes on meanwhile, until what it
would hand over next has no place. Programs start in the order of their numbers, each where a multiprocessor
is free: of some heads together the first tile of keys, then the second ones, and so on.

Two things keep programs from waiting. They walk from the last rows to the first: under a causal mask all
begin with the same rows, and the program of the first keys has the longest way, so the others need not wait
for it to come to them. And of heads taken together, neighbours in one head start at different times.

Not in the model: that programs differ in speed, and what memory does where many heads are under way.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

# Times are in steps of a program.
START = 1.0  # before its first step: an assumption
ADDING = 0.5  # from having a turn to the next program having it: an assumption
PLACES = 1  # of shares that wait to be added, besides the one being computed


@dataclass(frozen=True)
class Order:
    """In which order programs start and walk, and whether sums have one, too."""

    is_ordered: bool = True
    rows_last_first: bool = True
    together: int = 8  # heads
    adding: float = ADDING


def walk_of(keys: int, rows: int, is_causal: bool, ratio: int, rows_last_first: bool) -> range:
    """The tiles of rows that a tile of keys visits, in order; ratio: tiles of rows to one of keys."""
    first = keys * ratio if is_causal else 0
    return range(rows - 1, first - 1, -1) if rows_last_first else range(first, rows)


@functools.cache
def call_steps(
    heads: int, key_tiles: int, ratio: int, is_causal: bool, processors: int, order: Order
) -> float:
    """When the last program of a call ends, on so many multiprocessors."""
    rows = key_tiles * ratio
    free = [0.0] * processors
    end = 0.0
    for first in range(0, heads, order.together):
        group = range(min(order.together, heads - first))
        added = [[0.0] * rows for _ in group]  # when a tile of rows has had its latest share
        for keys in range(key_tiles):
            for head in group:
                now = free[0] + START
                waiting: list[float] = []  # when shares that were handed over will have been added
                for m in walk_of(keys, rows, is_causal, ratio, order.rows_last_first):
                    if len(waiting) > PLACES:
                        now = max(now, waiting.pop(0))
                    now += 1
                    turn = max(now, *waiting[-1:], added[head][m] if order.is_ordered else 0.0)
                    added[head][m] = turn + order.adding
                    waiting.append(added[head][m])
                heapq.heapreplace(free, waiting[-1])
                end = max(end, waiting[-1])
    return end


# The papers' grid at head_dim 128: 16k tokens in all, 16 heads, 128 keys and 64 rows a tile.
TOKENS, HEADS, KEYS, ROWS, PROCESSORS = 16_384, 16, 128, 64, 132
LENGTHS = (1024, 2048, 4096, 16_384)


def grid_cost(length: int, is_causal: bool, order: Order) -> float:
    """How many times as long a call of the grid takes as the same with additions as they come, in the best
    order of programs."""
    call = (HEADS * TOKENS // length, length // KEYS, KEYS // ROWS, is_causal, PROCESSORS)
    return call_steps(*call, order) / call_steps(*call, Order(is_ordered=False))


COLUMNS = ("length", "as it is", "a head at a time", "first rows first", "as it is, handing over in a step")
ORDERS = (Order(), Order(together=1), Order(together=1, rows_last_first=False), Order(adding=1.0))


def table() -> list[str]:
    """What the order costs, full / causal, a line a row."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for length in LENGTHS:
        costs = [[grid_cost(length, is_causal, order) for is_causal in (False, True)] for order in ORDERS]
        rows.append((str(length), *(" / ".join(f"{cost:.2f}" for cost in each) for each in costs)))
    return ["| " + " | ".join(row) + " |" for row in rows]
