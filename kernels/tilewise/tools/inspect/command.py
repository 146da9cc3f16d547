"""The command `tilewise inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..compiled.compiler import CompileError
from ..compiled.variants import KERNELS, MASKS
from .inspect import ALL_KERNELS, DIMS, applicable, check_arguments, inspect_kernels, to_json, variants
from .table import WIDTH, print_inspections


def inspect(
    arch: Annotated[
        list[str] | None, typer.Option(help="Target: sm_80, sm_90, sm_100, gfx942 … [default: sm_90]")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="bf16, fp16, fp32 or fp8 (forward alone; sm_90, sm_100). [default: bf16]"),
    ] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Head dimension. [default: 64, 128, 256]")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="causal or full. [default: both]")] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, hopper, dkv, dq, dqkv, hopper_backward, prepare or parameter. [default: the first "
            "six, Hopper's two where they apply to the rest: sm_90, 16 bits; hopper_backward up to --dim 128]"
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All kernels that apply.")] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(help="The call of a named case instead, with its features."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything as JSON to a file; - is standard output.")
    ] = None,
    sass: Annotated[Path | None, typer.Option(help="A folder for the kernels' assembly.")] = None,
) -> None:
    """Compile the shipped kernels without a GPU, and say what they would ask of one.

    Prints registers, spills, shared memory and how many programs fit at once; for the loop over tiles, its
    instructions and the clocks that they take at least. Nothing is run or timed. Options that choose may be
    given several times.
    """
    if every and kernel:
        raise typer.BadParameter("--all and --kernel exclude each other")
    archs = arch or ["sm_90"]
    dtypes, cases = dtype or ["bf16"], case or []
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # rather broken lines than columns cut off
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        dims = dim or DIMS
        kernels = kernel or applicable(ALL_KERNELS if every else KERNELS, archs, dtypes, dims, cases)
        arguments = check_arguments(archs, dtypes, dims, mask or list(MASKS), kernels, cases)
        screen = Console(stderr=True)
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
            count = len(archs) * len(variants(**arguments))
            compiling = progress.add_task("compiling", total=count)
            found = inspect_kernels(
                archs, **arguments, assembly=sass, on_variant=lambda *_: progress.advance(compiling)
            )
    except (ValueError, CompileError) as error:
        typer.echo(f"tilewise inspect: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    if json_file is not None:
        text = json.dumps(to_json(found), indent=1) + "\n"
        if str(json_file) == "-":
            typer.echo(text, nl=False)
            return
        json_file.write_text(text)
    print_inspections(console, found)
