"""The command: a checkpoint, prompts, the three ways, and whether they agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from torch import Tensor
from train_gpt.checkpoint import CHECKPOINT, load_checkpoint, load_weights
from train_gpt.model import GPT, build_gpt
from train_gpt.settings import ExampleError
from train_gpt.text import TEXT, Corpus, load_corpus

from tilewise.nn import CacheFull
from tilewise.parts.numerics import INTERPRETED

from .ways import Prompts, cached, dense, paged, pages_for

PROMPTS = ["It is a truth", "Mr. Darcy", "She"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"How a text begins; may be given several times. [default: {', '.join(PROMPTS)}]"),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Characters to add to each.")] = 40,
    page_size: Annotated[int, typer.Option(min=1, help="Rows of a page.")] = 16,
    pages: Annotated[int | None, typer.Option(min=1, help="Of the cache. [default: all it takes]")] = None,
    folder: Annotated[Path, typer.Option(help="Where train_gpt has put its checkpoint.")] = Path("train-gpt"),
    text: Annotated[Path, typer.Option(help="The file that it learnt from.", show_default=False)] = TEXT,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu or cuda.")] = "auto",
) -> None:
    """Write on after several prompts at once, with the model that train_gpt has trained, three ways.

    dense: attention over the whole text again for every character. cached: keys and values are kept, in one
    piece for each prompt. paged: they are kept in pages, which are taken as they are needed.

    Each takes the likeliest character every time, so all three must write the same; the times are the host's.
    They compute in fp32, also where the model was trained in bf16: there, two characters are often equally
    likely, and rounding would choose.

    The exit code is 1 if the texts differ, 2 for a request that cannot be met.
    """
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    begins = prompt or PROMPTS
    try:
        model, corpus = load(folder, text, device)
        prompts = encode(corpus, begins, length, len(model.positions.weight))
    except ExampleError as error:
        fail(errors, str(error), 2)
    pages = pages_for(prompts, length, page_size) if pages is None else pages
    ways = {"dense": dense, "cached": cached, "paged": partial(paged, pages=pages, page_size=page_size)}
    found, seconds = {}, {}
    try:
        for name, way in ways.items():
            found[name], seconds[name] = timed(way, model, prompts, length)
    except CacheFull as error:
        takes = pages_for(prompts, length, page_size)
        fail(errors, f"--pages {pages}: {error}; these prompts take {takes} of {page_size} rows", 2)

    for begin, ids in zip(begins, found["dense"].tolist(), strict=True):
        console.print(repr(begin + corpus.decode(ids)), markup=False)
    console.print(f"\n{len(prompts)} prompts, {length} characters each, on {where(model)}:", markup=False)
    for name, took in seconds.items():
        console.print(f"{name:8}{len(prompts) * length / took:10.1f} tokens per second", markup=False)
    problems = [difference(model, prompts, found["dense"], found[name], name) for name in ("cached", "paged")]
    if any(problems):
        fail(errors, "; ".join(filter(None, problems)), 1)
    console.print("all three wrote the same", markup=False)


def load(folder: Path, text: Path, device: str) -> tuple[GPT, Corpus]:
    """The trained model, and the text whose characters it knows. Raises ExampleError where there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise ExampleError(f"--device {device} must be auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ExampleError("--device cuda: torch finds no GPU here")
    if device == "cuda" and INTERPRETED:
        raise ExampleError("TRITON_INTERPRET=1 is set: unset it to run on the GPU")
    content = load_checkpoint(folder)
    if content is None:
        raise ExampleError(
            f"there is no {CHECKPOINT} in {folder}: python examples/train_gpt.py --out {folder} makes one"
        )
    settings = replace(content["settings"], device=device)
    corpus = load_corpus(text, settings.context)
    if content["text"] != corpus.digest:
        raise ExampleError(f"the checkpoint in {folder} is of another text than {text}")
    model = build_gpt("tilewise", settings, len(corpus.vocabulary))
    load_weights(folder, content, settings.variants[0], model)
    return model.eval(), corpus


def encode(corpus: Corpus, begins: list[str], length: int, context: int) -> Prompts:
    """Raises ExampleError for a prompt that the model cannot read, or write on that far after."""
    if not all(begins):
        raise ExampleError("--prompt must have at least one character")
    longest = max(map(len, begins))
    if longest + length > context:
        raise ExampleError(
            f"--length {length} after a prompt of {longest} characters is more than the {context} that the "
            "model has positions for"
        )
    return [corpus.encode(begin).tolist() for begin in begins]


@torch.inference_mode()
def timed(
    way: Callable[[GPT, Prompts, int], Tensor], model: GPT, prompts: Prompts, length: int
) -> tuple[Tensor, float]:
    """What a way writes, [prompts, length], and its seconds. On a GPU it goes first once without the clock,
    for its kernels to be compiled."""
    if model.tokens.weight.is_cuda:
        way(model, prompts, length).cpu()
    started = time.perf_counter()
    found = way(model, prompts, length).cpu()  # waits for the device
    return found, time.perf_counter() - started


def where(model: GPT) -> str:
    if model.tokens.weight.is_cuda:
        return f"{torch.cuda.get_device_name()}, where tilewise's kernels run compiled"
    if INTERPRETED:
        return "the CPU, where tilewise's kernels run in Triton's interpreter"
    return "the CPU, where tilewise computes in plain PyTorch"


@torch.inference_mode()
def difference(model: GPT, prompts: Prompts, dense: Tensor, other: Tensor, name: str) -> str | None:
    """The first place where a way wrote another character than dense attention, and how close a call that
    was; None if there is none."""
    for number, (prompt, mine, its) in enumerate(zip(prompts, dense.tolist(), other.tolist(), strict=True)):
        for i, (a, b) in enumerate(zip(mine, its, strict=True)):
            if a != b:
                ids = torch.tensor([prompt + mine[:i]], device=model.tokens.weight.device)
                logits = model(ids)[0, -1]
                gap = (logits[a] - logits[b]).item()
                return (
                    f"{name} and dense DO NOT AGREE: after prompt {number + 1}, character {i + 1} is another "
                    f"one, whose logit is {gap:.1e} lower"
                )
    return None


def fail(errors: Console, message: str, code: int) -> NoReturn:
    errors.print(f"generate: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(code)
