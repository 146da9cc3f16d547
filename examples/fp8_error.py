"""How far attention in fp8 is from float64, on queries, keys and values of two models at work.

    python examples/fp8_error.py                        # on a GPU the kernels; on a CPU plain PyTorch
    TRITON_INTERPRET=1 python examples/fp8_error.py     # the kernels, on a CPU: five minutes
    PYTHONPATH=kernels:reference python examples/fp8_error.py    # from a clone, nothing installed

The pretrained encoder of `tilewise demo` reads the demo's text; a GPT of `train_gpt`, trained for a few
seconds, reads a text that it has not seen. What their attention layers are given, in fp32, is quantized in
six ways. Beside tilewise stands fp8 attention as `tilewise_reference.fp8` defines it, which makes its numbers
itself. Plain PyTorch, which answers on a CPU, rounds q, k and v to fp8, but not the weights.

What the demo needs is needed here: `python bootstrap.py demo` installs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor, nn
from train_gpt.settings import Settings
from train_gpt.text import TEXT, load_corpus
from train_gpt.training import Run

import tilewise as tw
import tilewise_reference as reference
from tilewise.demo.encoder import build_encoder
from tilewise.demo.model import load_config, load_weights, model_folder, pad, split_into_pieces
from tilewise.demo.text import DemoError
from tilewise_reference import fp8

QKV = tuple[Tensor, Tensor, Tensor]  # of a layer, [batch, heads, length, head_dim] each
SCALES = ("tensor", "head", 64)  # what has one of its own; 64 rows of a head

# ---- What attention is given


def encoder_layers() -> list[QKV]:
    """Of all-MiniLM-L6-v2, whose head_dim is 32, reading the demo's sentences as one text."""
    folder = model_folder()
    config = load_config(folder)
    text = resources.files("tilewise.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    pieces = split_into_pieces(folder, [" ".join(text.splitlines())], config.max_pieces)
    return layers_of(build_encoder(config, load_weights(folder), "torch"), *pad(pieces, "cpu"))


def gpt_layers(steps: int = 60) -> list[QKV]:
    """Of a character-level GPT, whose head_dim is 64, after so many steps, reading what was held out."""
    settings = Settings(
        "tilewise", "cpu", "fp32", steps, batch=8, context=128, width=128, layers=2, heads=2, lr=3e-3,
        dropout=0.0, seed=0,
    )  # fmt: skip
    corpus = load_corpus(TEXT, settings.context)
    run = Run("tilewise", settings, len(corpus.vocabulary), "torch")
    for _ in range(steps):
        run.step(corpus)
    return layers_of(run.model, corpus.tail[None, : settings.context])


def layers_of(model: nn.Module, *inputs: Tensor) -> list[QKV]:
    found: list[QKV] = []
    cores = [module for module in model.modules() if isinstance(module, tw.nn.AttentionCore)]
    hooks = [core.register_forward_pre_hook(lambda _, qkv: found.append(qkv)) for core in cores]
    with torch.no_grad():
        model.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return found


# ---- Attention


def by_tilewise(q: Tensor, k: Tensor, v: Tensor, per: str | int, rotate: bool, causal: bool) -> Tensor:
    q, k, v, scales = tw.quantize(q, k, v, per=per, rotate=rotate)
    return tw.attention(q, k, v, scales=scales, mask=tw.Causal() if causal else None)


def by_reference(q: Tensor, k: Tensor, v: Tensor, per: str | int, rotate: bool, causal: bool) -> Tensor:
    made = [fp8.quantize(x, per, rotate and x is not v) for x in (q, k, v)]
    numbers = [each.x8 for each in made]
    scales = [of_rows(each.scale, per)[:, :, : each.x8.shape[2]] for each in made]
    return fp8.fp8_attention(*numbers, *scales, q.dtype, mask=mask_of(q, causal))[0]


def of_rows(scale: Tensor, per: str | int) -> Tensor:
    """A scale for each row, or one for all rows of a head, [batch, heads, rows or 1, 1]."""
    return scale.repeat_interleave(per, 2)[..., None] if isinstance(per, int) else scale[..., None, None]


def mask_of(q: Tensor, causal: bool) -> reference.masks.MaskFn | None:
    return reference.masks.causal(q.shape[2], q.shape[2]) if causal else None


# ---- Errors


class Error(NamedTuple):
    """‖out - exact‖ / ‖exact‖ over all layers, and the largest |out - exact|."""

    relative: float
    largest: float


class Row(NamedTuple):
    scales: str
    rotated: str
    tilewise: Error
    reference: Error


def error(outs: list[Tensor], exact: list[Tensor]) -> Error:
    out, want = (torch.cat([x.double().flatten() for x in each]) for each in (outs, exact))
    return Error(((out - want).norm() / want.norm()).item(), (out - want).abs().max().item())


def rows(layers: list[QKV], causal: bool, scales: Sequence[str | int] = SCALES) -> Iterator[Row]:
    mask = mask_of(layers[0][0], causal)
    exact = [reference.attention(*qkv, mask=mask, dtype=torch.float64) for qkv in layers]
    for per in scales:
        for rotate in (False, True):
            ours = [by_tilewise(*qkv, per, rotate, causal) for qkv in layers]
            plain = [by_reference(*qkv, per, rotate, causal) for qkv in layers]
            name = f"{per} rows" if isinstance(per, int) else per
            yield Row(name, "yes" if rotate else "no", error(ours, exact), error(plain, exact))
    in_bf16 = [[x.bfloat16() for x in qkv] for qkv in layers]
    ours = [tw.attention(*qkv, mask=tw.Causal() if causal else None) for qkv in in_bf16]
    plain = [reference.yardstick.pytorch_attention(*qkv, mask=mask)[0] for qkv in in_bf16]
    yield Row("bf16, no fp8", "", error(ours, exact), error(plain, exact))


def show(title: str, layers: list[QKV], causal: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, length, dim = layers[0][0].shape[1:]
    print(f"\n{title}: {len(layers)} layers, {heads} heads, {length} tokens, head_dim {dim}, on {device}\n")
    print("| a scale for each | rotated | tilewise: relative | plain fp8 | tilewise: largest | plain fp8 |")
    print("|---|---|---|---|---|---|")
    for scales, rotated, ours, plain in rows([tuple(x.to(device) for x in qkv) for qkv in layers], causal):
        numbers = f"{ours.relative:.2%} | {plain.relative:.2%} | {ours.largest:.4f} | {plain.largest:.4f}"
        print(f"| {scales} | {rotated} | {numbers} |", flush=True)


if __name__ == "__main__":
    try:
        show("The encoder", encoder_layers(), causal=False)
    except DemoError as problem:
        sys.exit(f"fp8_error: {problem}")
    show("The GPT, causal", gpt_layers(), causal=True)
