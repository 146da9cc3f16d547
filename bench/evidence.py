"""What can be learned on this machine in a few minutes? The command `python -m bench evidence`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from tilewise.__main__ import interpret_without_gpu

from .conduct import Orders, conduct
from .jobs import canary_jobs
from .report.sections import gather
from .report.summary import screen
from .results import Results
from .stages import STAGES, Plan


def evidence(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, summary.txt and workers.log.")],
    minutes: Annotated[float, typer.Option(help="How long it may take.", min=0.01)] = 9.0,
    only: Annotated[
        list[str] | None, typer.Option(help="A stage to run; several are run in the order given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the random inputs.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the results that are in the folder.")
    ] = False,
) -> None:
    """Check and time tilewise on this machine, the most telling first, within the minutes given.

    Every result is in the file as soon as it is known. Ends with one screen: what passed, what failed, and
    the ratios to rivals against the goals. Exit code 1 if a check failed or an answer of tilewise is wrong.
    """
    began = time.monotonic()
    interpret_without_gpu()
    orders = Orders(
        chosen(only or []), out, 60 * minutes, min(20.0, max(5.0, 15 * minutes)), summary, seed, resume,
        began=began,
    )  # fmt: skip
    try:
        code = conduct(orders)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    raise typer.Exit(code)


def chosen(only: list[str]) -> list[Plan]:
    """The stages of these names, in the order of the names, or all. The canary comes first in any case:
    without it Hopper's forward is left out."""
    plans = {plan.name: plan for plan in STAGES}
    for name in only:
        if name not in plans:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(plans)}", param_hint="--only")
    if not only:
        return [*STAGES]
    canaries = [plan for plan in STAGES if plan.jobs is canary_jobs and plan.name not in only]
    return [*canaries, *(plans[name] for name in only)]


def summary(results: Results, shortfall: list[str]) -> RenderableType:
    (section,) = gather([results])
    return Group(screen(section), *map(Text, shortfall))
