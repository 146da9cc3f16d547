"""The command `tilewise watch`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...demo.dtypes import Dtype
from ...demo.text import DemoError
from ...kernels.tile import Tile
from ...parts.masks.mask import Mask
from ..show.expression import mask_from
from . import calls
from .page import write
from .record import Asked, record


def watch(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="A sentence or several, or a script.py and its arguments. [default: a text]"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    encoding: Annotated[str, typer.Option(help="The encoding of the text file.")] = "utf-8",
    article: Annotated[
        bool, typer.Option("--article", help="The article's model: ten vectors, three Linear(512, 256).")
    ] = False,
    case: Annotated[
        str | None, typer.Option(help="A named case, shortened; `explain --list` has them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("tilewise-watch"),
    layer: Annotated[int, typer.Option(help="Of the encoder that reads a text, from 1.")] = 4,
    head: Annotated[
        int | None, typer.Option(help="The head that is shown, from 1. [default: 2 of a text]")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="The sequence that is shown, from 1, of a case or a script.")
    ] = 1,
    call: Annotated[int, typer.Option(help="Which of a script's calls, from 1.")] = 1,
    mask: Annotated[
        str, typer.Option(help="Of a text, as in `tilewise show`; none for no mask.")
    ] = "Causal()",
    dtype: Annotated[Dtype, typer.Option(help="Of a text's queries, keys and values.")] = Dtype.fp32,
    tile: Annotated[tuple[int, int], typer.Option(help="Rows of queries and of keys a tile.")] = (16, 16),
) -> None:
    """Record one call of the real kernels in the interpreter, and write a page that plays it.

    tilewise watch "The cat sat on the mat, and the dog barked at it."
    """
    console = Console(stderr=True, highlight=False)
    try:
        with console.status("reading") as status:
            asked = find(
                what or [], text, encoding, article, case, layer, head, batch, call, mask, dtype, tile
            )
            found = record(asked, lambda part: status.update(part))
        path = write(found, out)
    except (ValueError, NotImplementedError, DemoError, OSError) as error:
        typer.echo(f"tilewise watch: {error}", err=True)
        raise typer.Exit(2) from None
    for name, reason in found.omitted.items():
        console.print(f"not on the page: {name}: {reason}", markup=False)
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


def find(
    what: list[str], text: Path | None, encoding: str, article: bool, case: str | None, layer: int,
    head: int | None, batch: int, call: int, mask: str, dtype: Dtype, sizes: tuple[int, int],
) -> Asked:  # fmt: skip
    """The call that the command line asks for."""
    is_script = bool(what) and what[0].endswith(".py")
    given = {
        "a sentence": bool(what) and not is_script, "a script": is_script, "--text": text is not None,
        "--article": article, "--case": case is not None,
    }  # fmt: skip
    asked = [name for name, is_given in given.items() if is_given]
    if len(asked) > 1:
        raise ValueError(f"give one of these, not {' and '.join(asked)}")
    tile = Tile(*sizes)
    command = shlex.join(["tilewise", *sys.argv[1:]])
    if head is None:
        head = 1 if case is not None or is_script else 2
    if case is not None:
        return calls.of_case(case, batch, head, tile, command)
    if is_script:
        return calls.of_script(Path(what[0]), what[1:], call, batch, head, tile, command)
    chosen: Mask | None = None if mask == "none" else mask_from(mask)
    if article:
        return calls.of_article(chosen, dtype, tile, command)
    return calls.of_text(what, text, encoding, layer, head, chosen, dtype, tile, command)
