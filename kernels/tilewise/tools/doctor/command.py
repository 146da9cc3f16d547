"""The command `tilewise doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from .doctor import Diagnosis, examine

MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "bold red")}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is installed, what runs here and what does not, and why; ends with a self test.

    Exit status 1 if something keeps tilewise from working.
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_diagnosis(Console(highlight=False), found)
    if found.problems:
        raise typer.Exit(1)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    topic = ""
    for finding in diagnosis.findings:
        if finding.topic != topic:
            topic = finding.topic
            console.print(Text(topic, style="bold"))
        mark, style = MARKS[finding.verdict]
        line = Text.assemble((f"{mark} ", style), f"{finding.subject}: {finding.found}")
        console.print(Padding(line, (0, 0, 0, 2)))
        if finding.advice:
            console.print(Padding(Text(f"→ {finding.advice}", style="dim"), (0, 0, 0, 4)))
    count = len(diagnosis.problems)
    console.print()
    verdict = "nothing wrong" if not count else f"{count} problem{'s' * (count > 1)}, marked ✗"
    console.print(Text(f"tilewise doctor: {verdict}", style="bold"))
