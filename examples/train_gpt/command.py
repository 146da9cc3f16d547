"""The command: settings, training that can be interrupted, and what is said about it."""

from __future__ import annotations

import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console

from tilewise.parts.numerics import INTERPRETED

from .checkpoint import CHECKPOINT, load_checkpoint, replace_file, restore, steps_done
from .compare import ALLOWED_AT_THE_END, compare
from .figures import draw_losses
from .interpreted import compare_with_interpreter
from .loop import Stop, train
from .ranks import Ranks, SeveralRanks, check_parts, join_ranks, lost_rank, speaks
from .report import describe, explain_allowed, print_losses, write_losses
from .sampling import sample
from .settings import ExampleError, Settings, choose_settings
from .text import TEXT, Corpus, bigram_loss, load_corpus
from .training import Run

INTERRUPTED = 130
INTERPRETER_STEPS = 5  # where there is no GPU, on which the kernels run anyway


class Implementation(str, Enum):
    """What computes attention."""

    tilewise = "tilewise"
    sdpa = "sdpa"
    both = "both"


class Device(str, Enum):
    """Where."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """In which number format."""

    fp32 = "fp32"
    bf16 = "bf16"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def train_gpt(
    implementation: Annotated[
        Implementation | None, typer.Option(help="What computes attention. [default: both, compared]")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: the GPU if there is one.")] = Device.auto,
    dtype: Annotated[
        Dtype | None, typer.Option(help="bf16 is autocast. [default: fp32; on a GPU bf16]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of training. [default: 400; on a GPU 1000]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Texts a step. [default: 24; on a GPU 64]")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Characters of a text. [default: 64; on a GPU 256]")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the model. [default: 128; on a GPU 384]")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the model. [default: 2; on a GPU 6]")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Of each layer. [default: 4; on a GPU 6]")] = None,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Highest learning rate. [default: 0.003; on a GPU 0.001]")
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Share that is dropped in training. [default: 0; on a GPU 0.2]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31, help="Of weights and batches. [default: 0]")
    ] = None,
    text: Annotated[Path, typer.Option(help="A UTF-8 file to learn from.", show_default=False)] = TEXT,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("train-gpt"),
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--fresh", help="Go on from the checkpoint in the folder, or start over."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that train one model; torchrun starts them.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that share each text. [default: all that --shard leaves]"),
    ] = None,
    shard: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of the batch, for as many groups of ranks. [default: 1]"),
    ] = None,
    interpreter_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of a tiny model in Triton's interpreter. [default: 5; on a GPU 0]"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="How the sampled text begins.")] = "It is a truth",
    sample_length: Annotated[int, typer.Option(min=0, help="Characters to sample.")] = 400,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1: likelier characters.")] = 0.8,
) -> None:
    """Train a small character-level GPT with tilewise's attention and with PyTorch's, and compare.

    PyTorch's is scaled_dot_product_attention, "sdpa" for short. Both models start from the same weights and
    see the same batches, so their losses may differ by rounding alone.

    How much that is, a third model shows, the control: it trains with PyTorch's own attention too, but with
    every result moved at random by up to one rounding. It is as right as PyTorch's, so how far its losses
    drift from those of sdpa is how far two right runs can drift apart. Over the first 20 steps, tilewise's
    losses may be ten times as far from sdpa's as the control's are (in bf16 four times), and at the end the
    two models at most 0.05 nats apart on text that they have not seen.

    Writes losses.png, losses.svg, losses.csv, sample.txt and checkpoint.pt. The exit code is 1 if the losses
    do not agree, 2 for a request that cannot be met, 130 if interrupted, which loses nothing: --resume goes
    on.

    On several GPUs, or in several processes of a CPU, torchrun starts the same command:

    torchrun --nproc-per-node 4 examples/train_gpt.py --ranks 4 --context 2 --shard 2

    Then tilewise's model is trained by all ranks together, each with a part of it, of the batch and of every
    text, and rank 0 trains the others, whole, to compare. Any number of ranks can go on from its checkpoint,
    one process too. Without torchrun, --ranks 4 is refused.
    """
    given = dict(
        implementation=implementation and implementation.value, device=device.value,
        dtype=dtype and dtype.value, steps=steps, batch=batch, context=length, width=width, layers=layers,
        heads=heads, lr=lr, dropout=dropout, seed=seed,
    )  # fmt: skip
    stop, first = Stop(), speaks()
    console = Console(highlight=False, quiet=not first)
    errors = Console(stderr=True, highlight=False, quiet=not first)
    try:
        group = join_ranks(ranks, context, shard, device.value)
        settings, corpus, content = group.together(lambda: prepare(given, text, out, resume, prompt, group))
        group.agree(settings=settings, text=corpus.digest, step=content and steps_done(content))
    except ExampleError as error:
        fail(errors, str(error), 2)
    if interpreter_steps is None:
        interpreter_steps = INTERPRETER_STEPS if settings.device == "cpu" else 0
    print_header(console, settings, corpus, text, group)

    problems = []
    try:
        runs = make_runs(settings, len(corpus.vocabulary), group)
        if content is not None:
            group.together(lambda: restore(out, runs, content))
            console.print(f"going on after step {steps_done(content)} of {settings.steps}", markup=False)
        trained = runs[settings.variants[0]]
        complete = train(runs, settings, corpus, out, stop, console, group)
        model = trained.whole() if complete else None
        group.close()
        if model is not None and not stop():
            problems += report(console, runs, corpus, out, group)
        if model is not None and not stop() and interpreter_steps:
            problems += check_interpreter(console, text, settings, interpreter_steps, stop)
        if model is not None and not stop():
            written = sample(model, corpus, settings, prompt, sample_length, temperature)
            replace_file(out / "sample.txt", lambda path: path.write_text(written + "\n", encoding="utf-8"))
            console.print(f"text sampled from the model trained with {trained.variant}:\n", style="italic")
            console.print(written + "\n", markup=False)
    except ExampleError as error:
        fail(errors, str(error), 1)
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        fail(Console(stderr=True, highlight=False), group.named(str(error)), 1)
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        gone = f"cannot go on, because another rank has ended: {lost}"
        fail(Console(stderr=True, highlight=False), group.named(gone), 1)
    if stop() or not complete:
        errors.print(
            f"interrupted: step {len(trained.losses)} of {settings.steps} is saved; to go on:", markup=False
        )
        errors.print(go_on(text, out, group), markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    console.print(
        f"losses.png, losses.svg, losses.csv, sample.txt and {CHECKPOINT} are in {out}", markup=False
    )
    if problems:
        fail(errors, "; ".join(problems), 1)


def make_runs(settings: Settings, vocabulary: int, ranks: Ranks) -> dict[str, Run]:
    """A run for every variant. On several ranks, each has its part of tilewise's, and the first has the
    others, whole."""
    # Asked for by name: with TRITON_INTERPRET=1 set, None would send every step through the interpreter.
    impl = "torch" if settings.device == "cpu" else None
    if not isinstance(ranks, SeveralRanks):
        return {variant: Run(variant, settings, vocabulary, impl) for variant in settings.variants}
    from .parallel import PartOfARun

    part = PartOfARun(settings, vocabulary, impl, ranks)
    others = settings.variants[1:] if ranks.first else []
    return {"tilewise": part} | {variant: Run(variant, settings, vocabulary, impl) for variant in others}


def prepare(
    given: dict[str, Any], text: Path, out: Path, resume: bool | None, prompt: str, ranks: Ranks
) -> tuple[Settings, Corpus, dict[str, Any] | None]:
    """The settings, the text and the checkpoint to go on from, if any. Raises ExampleError for a request that
    cannot be met, before any work is done."""
    content = None if resume is False else load_checkpoint(out)
    if resume and content is None:
        raise ExampleError(f"--resume: there is no {CHECKPOINT} in {out}")
    if content is not None and not resume:
        steps, done = content["settings"].steps, steps_done(content)
        if done < steps:
            raise ExampleError(
                f"{out} holds a run that is at step {done} of {steps}: --resume goes on, --fresh starts over"
            )
        content = None
    settings = choose_settings(given, content and content["settings"])
    if settings.device == "cuda" and INTERPRETED:
        raise ExampleError("TRITON_INTERPRET=1 is set: unset it to train on the GPU")
    check_parts(settings, ranks)
    corpus = load_corpus(text, settings.context)
    if content is not None and content["text"] != corpus.digest:
        raise ExampleError(f"the checkpoint in {out} is of another text than {text}")
    if not prompt:
        raise ExampleError("--prompt must have at least one character")
    corpus.encode(prompt)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExampleError(f"cannot write to --out {out}: {error.strerror}") from error
    return settings, corpus, content


def print_header(console: Console, settings: Settings, corpus: Corpus, text: Path, ranks: Ranks) -> None:
    characters = len(corpus.train) + len(corpus.tail)
    console.print(
        f"{text.name}: {characters} characters, {len(corpus.vocabulary)} different ones, the last "
        f"{len(corpus.tail)} held out",
        markup=False,
    )
    where = "the CPU: tilewise computes in plain PyTorch"
    if settings.device == "cuda":
        where = f"{torch.cuda.get_device_name()}: tilewise's kernels run compiled"
    console.print(f"{settings.dtype} on {where}", markup=False)
    if ranks.count > 1:
        console.print(
            f"{ranks.count} ranks train tilewise's model: the batch in {in_parts(ranks.shard)}, every text "
            f"in {in_parts(ranks.context)}, the weights in {in_parts(ranks.count)}",
            markup=False,
        )


def in_parts(count: int) -> str:
    return "one piece" if count == 1 else f"{count} parts"


def report(console: Console, runs: dict[str, Run], corpus: Corpus, out: Path, ranks: Ranks) -> list[str]:
    """Print the losses, write and draw them, compare them; what is wrong with them, a line a problem."""
    bigram, problems, comparison = bigram_loss(corpus), [], None
    print_losses(console, runs)
    console.print(
        f"for comparison, on the held-out tail: {bigram:.4f} by bigram counts, which see one character back",
        markup=False,
    )
    if len(runs) > 1:
        tilewise, sdpa = runs["tilewise"], runs["sdpa"]
        comparison = compare(tilewise.losses, sdpa.losses, runs["control"].losses, sdpa.settings.dtype)
        tested = "tilewise" if ranks.count == 1 else f"tilewise on {ranks.count} ranks"
        said = describe(comparison, tested, "sdpa")
        console.print(said, markup=False)
        console.print(explain_allowed(comparison), markup=False)
        if not comparison.agrees:
            problems.append(said)
        steps = len(sdpa.losses)
        gap = abs(tilewise.validation[steps] - sdpa.validation[steps])
        said = f"on the held-out tail tilewise and sdpa end {gap:.1e} apart; allowed is {ALLOWED_AT_THE_END}"
        console.print(said, markup=False)
        if not gap <= ALLOWED_AT_THE_END:
            problems.append(said)
    for name in ("losses.png", "losses.svg"):
        replace_file(out / name, lambda path: draw_losses(path, runs, bigram, comparison))
    replace_file(out / "losses.csv", lambda path: write_losses(path, runs))
    return problems


def check_interpreter(console: Console, text: Path, settings: Settings, steps: int, stop: Stop) -> list[str]:
    """Train a tiny model through the real kernels; what is wrong, a line a problem."""
    with console.status(f"{steps} steps of a tiny model in Triton's interpreter"):
        try:
            comparison = compare_with_interpreter(text, settings, steps, stop)
        except ExampleError as error:
            return [str(error)]
    if comparison is None:
        return []
    said = describe(comparison, "a tiny model's kernels in Triton's interpreter", "plain PyTorch")
    console.print(said, markup=False)
    return [] if comparison.agrees else [said]


def go_on(text: Path, out: Path, ranks: Ranks) -> str:
    """The command that resumes this run."""
    start, parts = ["python"], []
    if ranks.count > 1:
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        parts = ["--ranks", ranks.count, "--context", ranks.context, "--shard", ranks.shard]
    command = [*start, sys.argv[0], "--resume", "--out", out, *parts]
    return shlex.join(map(str, command + ([] if text == TEXT else ["--text", text])))


def fail(errors: Console, message: str, code: int) -> NoReturn:
    errors.print(f"train_gpt: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(code)
