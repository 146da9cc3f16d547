"""How does a mask's picture read in a terminal? A character or two a tile, or a pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from ...parts.shape import ceil_div
from ..explain.coverage import STATES
from .show import Shown, counts

MOST_LINES = 48


class Mark(NamedTuple):
    """How one kind of tile or of pair looks."""

    character: str
    style: str
    meaning: str


TILES = (
    Mark("·", "dim", "skipped: never visited"),
    Mark("▒", "yellow", "cut: the mask is asked pair by pair"),
    Mark("█", "blue", "full: every pair counts"),
)
PAIRS = (  # by 2 · state of the tile + whether the pair counts
    Mark(" ", "", "in a skipped tile"),
    Mark("!", "bold red", "counts, and its tile is skipped"),
    Mark("·", "dim", "does not count, in a cut tile"),
    Mark("▓", "yellow", "counts, in a cut tile"),
    Mark("?", "bold red", "does not count, and its tile is full"),
    Mark("█", "blue", "counts, in a full tile"),
)


def print_shown(console: Console, shown: Shown) -> None:
    """What is drawn, the picture, its legend and its counts. Raises ValueError where pairs find no room."""
    console.print(Text(shown.mask, style="bold"))
    tile = " × ".join(map(str, shown.tile))
    console.print(Text(f"q_len {shown.q_len:,}, kv_len {shown.kv_len:,}; tiles of {tile}: {shown.tile_from}"))
    if max(shown.sizes) > 1:
        of = f"batch {shown.batch} of {shown.sizes[0]}, head {shown.head} of {shown.sizes[1]}"
        console.print(Text(f"drawn: {of}"))
    console.print()
    cells, marks, said, rows = (of_tiles if shown.pairs is None else of_pairs)(console, shown)
    draw(console, cells, marks, rows)
    console.print()
    for mark in marks_in(cells, marks):
        console.print(Text.assemble("  ", (mark.character * 2, mark.style), f"  {mark.meaning}"))
    if said:
        console.print(Text(f"  {said}", style="dim"))
    console.print()
    for line in in_words(shown):
        console.print(Text(line))
    for line in warnings(shown):
        console.print(Text(line, style="bold red"))


def of_tiles(console: Console, shown: Shown) -> tuple[torch.Tensor, tuple[Mark, ...], str, int]:
    """The cells to draw, two characters each, their marks, what a cell stands for, and the rows of one."""
    q_tiles, kv_tiles = shown.grid
    across = max(1, ceil_div(kv_tiles, room(console, shown) // 2))
    down = max(1, ceil_div(q_tiles, MOST_LINES))
    said = ""
    if (down, across) != (1, 1):
        said = f"a mark stands for {down} × {across} tiles: full or skipped where all of these are, else cut"
    return shown.blocks(down, across), TILES, said, down * shown.tile[0]


def of_pairs(console: Console, shown: Shown) -> tuple[torch.Tensor, tuple[Mark, ...], str, int]:
    assert shown.pairs is not None
    if shown.kv_len * 2 > room(console, shown):
        raise ValueError(
            f"kv_len={shown.kv_len}: its pairs need {shown.kv_len * 2 + margin(shown)} columns, and the "
            f"terminal has {console.width}; widen it, give --svg FILE, or leave out --pairs"
        )
    state = shown.states.repeat_interleave(shown.tile[0], 0).repeat_interleave(shown.tile[1], 1)
    state = state[: shown.q_len, : shown.kv_len]
    return 2 * state + shown.pairs, PAIRS, "", 1


def margin(shown: Shown) -> int:
    """Columns before the picture."""
    return len(str(shown.q_len)) + 3


def room(console: Console, shown: Shown) -> int:
    return max(2, console.width - margin(shown))


def draw(console: Console, cells: torch.Tensor, marks: tuple[Mark, ...], rows: int) -> None:
    """A line a row of cells, before it its first query."""
    if not cells.numel():
        console.print(Text("  there are no tiles", style="dim"))
        return
    wide = len(str((len(cells) - 1) * rows))
    console.print(Text(f"{'':>{wide + 2}} keys →", style="dim"))
    for i, row in enumerate(cells.tolist()):
        line = Text.assemble((f"{i * rows:>{wide + 1}}  ", "dim"))
        for cell in row:
            line.append(marks[cell].character * 2, marks[cell].style)
        console.print(line, no_wrap=True, crop=False)


def marks_in(cells: torch.Tensor, marks: tuple[Mark, ...]) -> list[Mark]:
    """Those that are drawn."""
    drawn = set(cells.unique().tolist())
    return [mark for i, mark in enumerate(marks) if i in drawn]


def in_words(shown: Shown) -> list[str]:
    """The counts."""
    own = counts(shown.coverage)
    parts = [f"{state} {own[state]:,}" for state in STATES]
    share = f"{shown.coverage.skipped_share:.1%} skipped"
    lines = [f"{own['total']:,} tile{'s' * (own['total'] != 1)}: {', '.join(parts)}; {share}"]
    if max(shown.sizes) > 1:
        lines.append(
            f"of all batches and heads {shown.of_all.skipped:,} of {shown.of_all.total:,} tiles, "
            f"{shown.of_all.skipped_share:.1%}, are skipped"
        )
    if shown.pairs is not None:
        lines.append(f"{int(shown.pairs.sum()):,} of {shown.pairs.numel():,} pairs count")
    return lines


def warnings(shown: Shown) -> list[str]:
    """What keeps the picture from being the kernels' own."""
    found = [f"{reason}: at most so many tiles are visited" for reason in shown.unknown]
    if shown.contradicted:
        found.append(
            f"the mask contradicts itself: of {shown.contradicted:,} pairs its twin says one thing and its "
            "interval the other"
        )
    return found
