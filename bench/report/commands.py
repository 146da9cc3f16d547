"""`python -m bench report`, `compare` and `readme`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..results import Results, load
from .compare import compare_sections
from .page import write_report
from .readme import filled
from .sections import Section, gather
from .summary import print_summary
from .table import group_table

RESULTS = typer.Argument(
    exists=True, dir_okay=False, help="Files of `bench evidence`, or of pytest --benchmark-json."
)


def report(
    results: Annotated[list[Path], RESULTS],
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("bench-report"),
    tables: Annotated[bool, typer.Option("--tables", help="Print every row here too.")] = False,
) -> None:
    """Write report.md with tables and pictures, and print how tilewise stands."""
    sections = gather([read(path) for path in results])
    console = terminal()
    if tables:
        for section in sections:
            for group in section.groups:
                console.print(group_table(section, group).rich())
    page = write_report(sections, out)
    print_summary(sections, console)
    console.print(f"wrote {page} and its pictures", markup=False)


def compare(
    first: Annotated[Path, RESULTS],
    second: Annotated[Path, RESULTS],
    out: Annotated[Path | None, typer.Option(help="A Markdown file to write it to as well.")] = None,
) -> None:
    """Say what got faster or slower from the first results to the second, beyond the noise."""
    comparison = compare_sections(only(read(first)), only(read(second)))
    console = terminal()
    for line in comparison.warnings:
        console.print(line, markup=False, style="bold red")
    for line in comparison.remarks:
        console.print(line, markup=False)
    table = comparison.table()
    console.print(table.rich())
    if out is not None:
        parts = ["# " + table.title, *(f"**{line}**" for line in comparison.warnings)]
        parts += ["\n".join(f"- {line}" for line in comparison.remarks), table.markdown()]
        out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def readme(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if it is out of date.")
    ] = False,
) -> None:
    """Write the README's section on performance from bench/measured, and the goals in docs/benchmarks.md."""
    try:
        pages = filled()
    except ValueError as error:
        raise refuse(error) from None
    old = [path for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    if check:
        typer.echo(f"out of date: {', '.join(path.name for path in old)}" if old else "up to date")
        raise typer.Exit(int(bool(old)))
    for path in old:
        path.write_text(pages[path], encoding="utf-8")


def read(path: Path) -> Results:
    """The results in a file; ends the command with one line where it holds none."""
    try:
        return load(path)
    except (ValueError, TypeError, KeyError) as error:  # not ours, or of another version
        raise refuse(error) from None


def terminal() -> Console:
    """Standard output, wide enough for a table where that is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def only(results: Results) -> Section:
    return gather([results])[0]


def refuse(error: Exception) -> typer.Exit:
    typer.echo(f"bench: {error}", err=True)
    return typer.Exit(2)
