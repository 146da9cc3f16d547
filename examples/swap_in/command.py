"""The command: similarities and losses, with tilewise and with Transformers' own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_gpt.compare import compare
from train_gpt.settings import ExampleError, Settings
from train_gpt.text import TEXT, load_corpus

import tilewise
from tilewise.demo.measure import similarities
from tilewise.demo.output import check_writable
from tilewise.demo.report import print_sentences, print_similarities
from tilewise.demo.text import DemoError, read_text
from tilewise.parts.numerics import INTERPRETED

from .learning import IMPLEMENTATIONS, draw, learn, register_control
from .sentences import embeddings

SAME = 0.9999  # the smallest cosine between two embeddings that counts as the same, as in the demo
SHOWN = 5  # every so many steps there is a line

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def swap_in(
    sentences: Annotated[
        list[str] | None, typer.Argument(help="Sentences to compare. [default: those of tilewise demo]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 50,
    text: Annotated[Path, typer.Option(help="The file to learn from, UTF-8.", show_default=False)] = TEXT,
    out: Annotated[Path, typer.Option(help="Folder for the picture of the losses.")] = Path("swap-in"),
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu or cuda.")] = "auto",
) -> None:
    """Put tilewise behind two models of Transformers, and see that nothing else changes.

    The exit code is 1 if they differ by more than rounding, 2 for a request that cannot be met.
    """
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    transformers.logging.set_verbosity_error()
    tilewise.integrations.transformers.register()
    register_control()
    try:
        settings = settings_for(steps, device)
        given = read_text(sentences or [], None, "utf-8")
        corpus = load_corpus(text, settings.context)
        check_writable(out)
        console.print(f"Transformers {transformers.__version__} on {where(settings.device)}\n", markup=False)
        vectors = {way: embeddings(given.sentences, way, settings.device) for way in ("tilewise", "eager")}
    except (ExampleError, DemoError) as error:
        fail(errors, str(error), 2)
    console.print("all-MiniLM-L6-v2 in transformers.BertModel, attn_implementation='tilewise'", markup=False)
    print_sentences(console, given.sentences)
    print_similarities(console, similarities(vectors["tilewise"]), given.sentences, vectors["eager"].shape[1])
    same = F.cosine_similarity(vectors["tilewise"], vectors["eager"]).min().item()
    console.print(f"smallest cosine to the embeddings with 'eager': {same:.7f}\n", markup=False)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    losses = {}
    with Progress(*columns, console=console) as progress:
        for way in IMPLEMENTATIONS:
            task = progress.add_task(f"a tiny Llama with {way!r}", total=steps)
            losses[way] = learn(way, corpus, settings, lambda task=task: progress.advance(task))
    print_losses(console, losses)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "losses.png", losses)
    console.print(f"wrote {out / 'losses.png'}", markup=False)
    verdict = compare(losses["tilewise"], losses["eager"], losses["control"], "fp32")
    console.print(
        f"largest difference in the first {verdict.count} steps: {verdict.gap:.1e} nats; rounding alone "
        f"makes {verdict.control_gap:.1e}, and {verdict.allowed:.1e} is allowed",
        markup=False,
    )
    if same < SAME:
        fail(errors, f"the embeddings DO NOT AGREE: at least {SAME} was expected", 1)
    if not verdict.agrees:
        fail(errors, f"the losses DO NOT AGREE: they differ by {verdict.gap:.1e} in step {verdict.step}", 1)
    console.print("tilewise and Transformers' own attention agree", markup=False)


def settings_for(steps: int, device: str) -> Settings:
    """Raises ExampleError for a device that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ExampleError(f"--device {device} must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExampleError("--device cuda: torch finds no GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    return Settings(
        implementation="both", device=device, dtype="fp32", steps=steps, batch=8, context=64, width=64,
        layers=2, heads=4, lr=3e-3, dropout=0.0, seed=0,
    )  # fmt: skip


def where(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}: the kernels run compiled"
    return f"the CPU, where {'the kernels run interpreted' if INTERPRETED else 'plain PyTorch computes'}"


def print_losses(console: Console, losses: dict[str, list[float]]) -> None:
    table = Table("step", "tilewise", "eager", "difference", title="loss (nats a character)")
    for step, (ours, theirs) in enumerate(zip(losses["tilewise"], losses["eager"], strict=True), 1):
        if step % SHOWN == 0 or step in (1, len(losses["eager"])):
            table.add_row(str(step), f"{ours:.6f}", f"{theirs:.6f}", f"{ours - theirs:+.1e}")
    console.print(table)


def fail(errors: Console, message: str, code: int) -> NoReturn:
    errors.print(f"swap_in: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(code)
