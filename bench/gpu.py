"""The command `python -m bench gpu`, behind `.ci/gpu`: what a GPU that is lent for minutes can tell.

The order of what is done is in first_light.py; docs/gpu_run.md says how to read what comes of it.
"""

from __future__ import annotations

import sys
import tarfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tilewise.__main__ import interpret_without_gpu

from . import first_light, machine, rehearsal
from .conduct import Orders, conduct, console_here
from .report.screen import gpu_screen
from .results import load

FIRST_SECONDS, AGAIN_SECONDS = 405.0, 190.0
GRACE = 8.0
ARCHIVE, KEPT = "everything.tar.gz", "screen.txt"
LARGEST_LOG = 4 << 20


def gpu(
    folder: Annotated[Path, typer.Argument(help="For the results: at most 8 files.")],
    again: Annotated[
        Path | None, typer.Option(help="The folder of a first run: do what that left undone, then tune.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Both runs on a CPU, tiny, with faults planted in the first.")
    ] = False,
    stamp: Annotated[
        bool, typer.Option("--stamp", help="Write down the revision for a machine that has no .git, and end.")
    ] = False,
    screen: Annotated[
        bool, typer.Option("--screen", help="Show again how the run in the folder went, and end.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(help="Default: 405, or 190 with --again.")] = None,
) -> None:
    """Check and time tilewise on a GPU, the most telling first; what is there at any second loads."""
    began = time.monotonic()
    interpret_without_gpu()
    if stamp:
        print(f"wrote {machine.write_stamp()}")
        return
    if screen:
        console_here().print(gpu_screen(load(folder / "results.jsonl"), []))
        return
    try:
        if rehearse:
            raise typer.Exit(rehearsal.rehearse(folder))
        plans = first_light.FIRST if again is None else first_light.again(load(again / "results.jsonl"))
        limit = seconds or (FIRST_SECONDS if again is None else AGAIN_SECONDS)
        orders = Orders(plans, folder, limit, GRACE, gpu_screen, kept=KEPT, began=began, afterwards=pack)
        code = conduct(orders)
    except (ValueError, OSError) as error:
        print(f"bench gpu: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def pack(folder: Path) -> None:
    """Keep the logs short, and put everything into one file as well."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != ARCHIVE)
    for path in files:
        if path.suffix == ".log" and path.stat().st_size > LARGEST_LOG:
            content = path.read_bytes()
            path.write_bytes(content[: LARGEST_LOG // 2] + b"\n[...]\n" + content[-LARGEST_LOG // 2 :])
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for path in files:
            archive.add(path, path.name)
