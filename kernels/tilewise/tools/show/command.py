"""The command `tilewise show`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from .expression import mask_from
from .picture import picture
from .show import as_dict
from .show import show as show_mask
from .terminal import print_shown, warnings

DEFAULT, DEFAULT_OF_PAIRS = 512, 64  # tokens of a side
OF_TWO = ("--lengths", "--tile")


class OneOrTwo(TyperCommand):
    """A command some of whose options take two numbers, or one that stands for both."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(doubled(args)))


def doubled(args: list[str]) -> Iterator[str]:
    """The words with a second number where only one is given."""
    joined = tuple(f"{option}=" for option in OF_TWO)
    words = [part for word in args for part in (word.split("=", 1) if word.startswith(joined) else [word])]
    for word, before, behind in zip(words, ["", *words], [*words[1:], ""], strict=False):
        yield word
        if before in OF_TWO and not behind.lstrip("-").isdigit():
            yield word


def show(
    mask: Annotated[
        str,
        typer.Argument(
            help="An expression, as in 'Causal() & Window(64, 0)', where a list stands for a tensor; or "
            "FILE.py:NAME, a mask or a function that returns one."
        ),
    ],
    lengths: Annotated[
        tuple[int, int] | None,
        typer.Option(help="q_len and kv_len; one number is both. [default: 512, with --pairs 64]"),
    ] = None,
    tile: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Rows of queries and keys of a tile, powers of two from 16. [default: those of the portable "
            "forward on an H200, bf16, head_dim 128; with --pairs 16 16]"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Which is drawn, where the mask tells batches apart.")] = 0,
    head: Annotated[int, typer.Option(help="Which is drawn, where it tells heads apart.")] = 0,
    pairs: Annotated[bool, typer.Option("--pairs", help="Draw each pair, up to 128 × 128 tokens.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tiles and counts as JSON.")] = False,
) -> None:
    """Draw the tiles of a mask: those that the forward skips, those that the mask cuts, and the full ones.

    tilewise show 'Causal() & Window(64, 0)' --lengths 300 512
    """
    try:
        both = lengths or ((DEFAULT_OF_PAIRS,) * 2 if pairs else (DEFAULT,) * 2)
        shown = show_mask(mask_from(mask), both, tile=tile, batch=batch, head=head, pairs=pairs)
        if svg is not None:
            svg.write_text(picture(shown), encoding="utf-8")
        if as_json:
            typer.echo(json.dumps(as_dict(shown), indent=1))
        elif svg is None:
            print_shown(Console(highlight=False), shown)
        else:
            for line in warnings(shown):
                typer.echo(line, err=True)
    except (ValueError, OSError) as error:
        typer.echo(f"tilewise show: {error}", err=True)
        raise typer.Exit(2) from None
