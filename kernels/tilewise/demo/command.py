"""The command `tilewise demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from warnings import catch_warnings, simplefilter

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..parts.numerics import INTERPRETED
from .dtypes import TORCH_DTYPES, Dtype
from .encoder import build_encoder
from .figures import draw_attention, draw_similarity
from .measure import LayerReport, attention_weights, similarities, watch
from .model import load_config, load_weights, model_folder, pad, split_into_pieces
from .output import check_writable, staged, write_pairs
from .report import print_layers, print_sentences, print_similarities
from .text import DemoError, check_choice, read_text
from .torch_encoder import torch_embeddings

BATCH = 32

# The smallest cosine between an embedding and that of PyTorch's encoder in fp32 that counts as the same.
SAME = {Dtype.fp32: 0.9999, Dtype.fp16: 0.999, Dtype.bf16: 0.99}


def demo(
    sentences: Annotated[
        list[str] | None, typer.Argument(help="Sentences to compare; - reads them from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text file, one sentence a line.")] = None,
    encoding: Annotated[str, typer.Option(help="The encoding of the file or standard input.")] = "utf-8",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("tilewise-demo"),
    sentence: Annotated[int, typer.Option(help="Sentence of the attention picture, from 1.")] = 1,
    layer: Annotated[int, typer.Option(help="Layer of the attention picture, from 1.")] = 4,
    head: Annotated[int, typer.Option(help="Head of the attention picture, from 1.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the encoder.")] = Dtype.fp32,
) -> None:
    """Compare sentences with a pretrained encoder whose attention is tilewise's fused kernel.

    Without sentences or a file, a short text of the demo's own is compared. Prints the similarities
    and the most alike pairs, the kernel's error and time beside PyTorch's, and writes similarity.png,
    similarity.csv and attention.png.
    """
    try:
        run(sentences or [], file, encoding, out, sentence, layer, head, dtype)
    except DemoError as error:
        typer.echo(f"tilewise demo: {error}", err=True)
        raise typer.Exit(2) from None


def run(
    arguments: list[str],
    file: Path | None,
    encoding: str,
    out: Path,
    sentence: int,
    layer: int,
    head: int,
    dtype: Dtype,
) -> None:
    """The demo itself. Raises DemoError for whatever the caller must change."""
    console, warnings = Console(highlight=False), Console(stderr=True, highlight=False)
    device, where = choose_device()

    # Everything that can be wrong with the request is looked at before any work is done.
    text = read_text(arguments, file, encoding)
    folder = model_folder()
    config = load_config(folder)
    check_choice("--sentence", sentence, len(text.sentences))
    check_choice("--layer", layer, config.layers)
    check_choice("--head", head, config.heads)
    check_writable(out)

    console.print(f"all-MiniLM-L6-v2 in {dtype.value} on {where}", markup=False)
    count = len(text.sentences)
    console.print(f"{count} sentence{'s' * (count > 1)} from {text.origin}", markup=False)
    if text.remark:
        warnings.print(text.remark, markup=False)
    pieces = split_into_pieces(folder, text.sentences, config.max_pieces)
    for number, cut in enumerate(pieces, 1):
        if cut.dropped:
            warnings.print(
                f"Sentence {number} is too long: the model reads {config.max_pieces} word pieces, "
                f"its last {cut.dropped} are dropped.",
                markup=False,
            )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        loading = progress.add_task("loading the model", total=1)
        weights = {name: weight.to(device) for name, weight in load_weights(folder).items()}
        encoder = build_encoder(config, weights, impl="portable").to(TORCH_DTYPES[dtype])
        progress.advance(loading)

        groups = [slice(i, i + BATCH) for i in range(0, len(pieces), BATCH)]
        inputs = [pad(pieces[group], device) for group in groups]
        attending = progress.add_task("attention layers", total=len(groups) * config.layers)
        reports = [LayerReport() for _ in range(config.layers)]
        queries_and_keys: dict[int, tuple[Tensor, Tensor]] = {}

        def seen(index: int, q: Tensor, k: Tensor) -> None:
            queries_and_keys[index] = q, k
            progress.advance(attending)

        ours, head_weights = [], torch.empty(0)
        with watch(encoder, reports, seen), torch.inference_mode():
            for group, (ids, lengths) in zip(groups, inputs, strict=True):
                ours.append(encoder(ids, lengths))
                if group.start < sentence <= group.stop:
                    row, pieces_here = sentence - 1 - group.start, len(pieces[sentence - 1].ids)
                    q, k = (t[row, head - 1, :pieces_here] for t in queries_and_keys[layer - 1])
                    head_weights = attention_weights(q, k, impl="portable")

        checking = progress.add_task("the same by PyTorch", total=len(groups))
        theirs = []
        for ids, lengths in inputs:
            theirs.append(torch_embeddings(config, weights, ids, lengths))
            progress.advance(checking)

        drawing = progress.add_task("drawing", total=3)
        alike = similarities(torch.cat(ours))
        with staged(out) as folder_for_now, catch_warnings(record=True) as font_warnings:
            simplefilter("always")
            write_pairs(folder_for_now / "similarity.csv", alike, text.sentences)
            progress.advance(drawing)
            draw_similarity(folder_for_now / "similarity.png", alike["cosine"], text.sentences)
            progress.advance(drawing)
            draw_attention(
                folder_for_now / "attention.png",
                head_weights,
                pieces[sentence - 1].words,
                f"Where head {head} of layer {layer} looks in sentence {sentence}",
            )
            progress.advance(drawing)

    console.print()
    print_sentences(console, text.sentences)
    console.print()
    print_similarities(console, alike, text.sentences, config.width)
    print_layers(console, reports, dtype.value, "on the GPU" if device == "cuda" else "interpreted")
    if device == "cpu":
        console.print("The interpreter's times say nothing about the kernel's speed on a GPU.", markup=False)
    same = F.cosine_similarity(torch.cat(ours), torch.cat(theirs)).min().item()
    console.print(f"smallest cosine to the embeddings of PyTorch's encoder in fp32: {same:.7f}", markup=False)
    console.print(f"wrote similarity.png, similarity.csv and attention.png to {out}", markup=False)
    console.print(
        "attention.png: weights read off the kernel itself, run with V = identity; what goes to [CLS] and "
        "[SEP] is drawn apart",
        markup=False,
    )
    if any("Glyph" in str(warning.message) for warning in font_warnings):
        warnings.print("Some characters are not in the pictures' font; boxes stand for them.", markup=False)
    if same < SAME[dtype]:
        warnings.print(f"The embeddings are wrong: at least {SAME[dtype]} was expected.", markup=False)
        raise typer.Exit(1)


def choose_device() -> tuple[str, str]:
    """The device to run on, and what to call it."""
    if INTERPRETED:
        return "cpu", "the CPU: the kernel runs in Triton's interpreter"
    if torch.cuda.is_available():
        return "cuda", f"{torch.cuda.get_device_name()}: the kernel runs compiled"
    raise DemoError("there is no GPU, and Triton's interpreter is off: set TRITON_INTERPRET=1")
