"""The command `tilewise doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ...drop_in.text import in_words
from .doctor import Diagnosis, examine
from .maker import MakerError, make
from .model import WRITTEN_OUT, ModelDiagnosis, Seen, examine_model

MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "bold red")}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE.py:FUNCTION]",
            help="A function that returns (model, inputs), or a model of Transformers: what becomes of its "
            "attention. Without it, this machine is looked at.",
        ),
    ] = None,
    meta: Annotated[
        bool, typer.Option("--meta", help="Run the model without memory, on the device meta.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Run the model in training mode, with gradients.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="The GPU that advice is for. [default: this machine's, else H200]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is installed, what runs here and what does not, and why; ends with a self test. Exit status 1
    if something keeps tilewise from working.

    With a model, run it once with tilewise behind PyTorch's own attention, and print each call of attention:
    its sizes and mask, who answers, why not tilewise, and what to change. Exit status 1 if tilewise does not
    answer them all, 2 if the model cannot be made.
    """
    console = Console(highlight=False)
    if model is None:
        if meta or training or gpu is not None:
            raise typer.BadParameter("--meta, --training and --gpu go with a model, FILE.py:FUNCTION")
        found = examine()
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1))
        else:
            print_diagnosis(console, found)
        if found.problems:
            raise typer.Exit(1)
        return
    try:
        made = make(model)
        of_model = examine_model(made.to("meta") if meta else made, training, gpu)
    except MakerError as error:
        typer.echo(f"tilewise doctor: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(of_model.to_dict(), indent=1))
    else:
        print_model(console, of_model)
    if of_model.answered < of_model.calls:
        raise typer.Exit(1)


def print_model(console: Console, diagnosis: ModelDiagnosis) -> None:
    for seen in diagnosis.seen:
        entry = seen.entry
        where = entry.module or "outside of modules"
        modules = f", {seen.modules} modules" if seen.modules > 1 else ""
        console.print(Text(f"{where}  ({times(entry.calls)}{modules})", style="bold"))
        console.print(Padding(Text(", ".join(call_in_words(seen))), (0, 0, 0, 2)))
        mark, style = MARKS["ok" if seen.is_answered else "problem"]
        console.print(Padding(Text.assemble((f"{mark} ", style), who_in_words(seen)), (0, 0, 0, 2)))
        for advice in seen.advice:
            console.print(Padding(Text(f"→ {advice}", style="dim"), (0, 0, 0, 4)))
    if diagnosis.seen:
        verdict = f"tilewise answers {diagnosis.answered} of {times(diagnosis.calls)} of attention"
        console.print()
    else:
        verdict = "no attention seen; what other libraries' own kernels compute is not"
    console.print(Text(f"tilewise doctor: {diagnosis.model}: {verdict}", style="bold"))


def times(calls: int) -> str:
    return f"{calls} call{'s' * (calls != 1)}"


def call_in_words(seen: Seen) -> list[str]:
    entry = seen.entry
    named = [(name, sizes) for name, sizes in zip("qkv", entry[1:4], strict=True) if sizes is not None]
    sizes = [f"{name} {in_words(sizes)}" for name, sizes in named]
    return [*sizes, entry.dtype, *[words for words in (entry.mask, entry.options) if words]]


def who_in_words(seen: Seen) -> str:
    if seen.is_answered:
        return f"here: {seen.entry.answered_by}; {seen.on_gpu}"
    if seen.entry.answered_by == WRITTEN_OUT:
        return "written out, as softmax(scores) @ v: nobody can answer it in one kernel"
    return "PyTorch, and not tilewise, because:"


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
