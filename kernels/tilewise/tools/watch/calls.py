"""Which call to watch: of a text, of the article's model, of a named case, or of a script."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tilewise_reference.cases import find_case

from ... import api
from ...demo.dtypes import TORCH_DTYPES, Dtype
from ...demo.encoder import build_encoder
from ...demo.model import load_config, load_weights, model_folder, split_into_pieces
from ...demo.text import Text, check_choice, read_text
from ...kernels.tile import Tile
from ...nn import AttentionCore
from ...parts.masks.mask import Mask
from ...plan.request import Request, make_request, request_of
from ..inputs import case_inputs
from ..shrink import shrunk
from .record import Asked

LINES = 6  # of the text that ships with the demo
LENGTH = 64  # that cases shrink to


def of_text(
    sentences: Sequence[str], file: Path | None, encoding: str, layer: int, head: int, mask: Mask | None,
    dtype: Dtype, tile: Tile, command: str,
) -> Asked:  # fmt: skip
    """One head of the demo's pretrained encoder, reading all sentences as one text.

    layer and head count from 1. Raises DemoError where there is no text or no model, and for a layer or a
    head that the encoder has not.
    """
    text = read_text(list(sentences), file, encoding) if sentences or file else own_text()
    folder = model_folder()
    config = load_config(folder)
    check_choice("--layer", layer, config.layers)
    check_choice("--head", head, config.heads)
    whole = " ".join(text.sentences)
    (pieces,) = split_into_pieces(folder, [whole], config.max_pieces)
    if pieces.dropped:
        raise ValueError(
            f"the text has {len(pieces.ids) + pieces.dropped} word pieces, and the encoder reads "
            f"{config.max_pieces}: give a shorter one"
        )
    encoder = build_encoder(config, load_weights(folder), impl="torch")
    q, k, v = inputs_of_layer(encoder, layer, torch.tensor([pieces.ids]))
    own = slice(head - 1, head)
    q, k, v = (x[:, own].to(TORCH_DTYPES[dtype]).contiguous() for x in (q, k, v))
    return Asked(
        make_request(q, k, v, mask=mask), f"{shortened(whole)} — layer {layer}, head {head}", command,
        tile=tile, words=(pieces.words, pieces.words),
    )  # fmt: skip


def own_text() -> Text:
    """The beginning of the text that ships with the demo."""
    text = read_text([], None, "utf-8")
    return text._replace(sentences=text.sentences[:LINES])


def inputs_of_layer(encoder: nn.Module, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel of a layer is called with: q, k and v, [1, heads, length, head_dim]."""
    cores = [module for module in encoder.modules() if isinstance(module, AttentionCore)]
    found: list[Tensor] = []
    hook = cores[layer - 1].register_forward_pre_hook(lambda core, inputs: found.extend(inputs))
    with torch.inference_mode():
        encoder(ids, torch.tensor([ids.shape[1]]))
    hook.remove()
    q, k, v = (x.clone() for x in found)
    return q, k, v


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: text.rindex(" ", 0, most)] + " …"


def of_article(mask: Mask | None, dtype: Dtype, tile: Tile, command: str) -> Asked:
    """The article's model: a sequence of 10 vectors of 512 numbers, and three `Linear(512, 256)`."""
    torch.manual_seed(0)
    x = torch.randn(10, 512)
    with torch.no_grad():
        q, k, v = (nn.Linear(512, 256)(x)[None, None].to(TORCH_DTYPES[dtype]) for _ in range(3))
    words = [f"x{number}" for number in range(1, 11)]
    return Asked(
        make_request(q, k, v, mask=mask), "The article's model: x [10, 512], Linear(512, 256)", command,
        tile=tile, words=(words, words),
    )  # fmt: skip


def of_case(name: str, batch: int, head: int, tile: Tile, command: str) -> Asked:
    """A named case, shortened so that a page can hold it: its dimensions, dtype and features stay."""
    case = shrunk(find_case(name), batch=2, kv_heads=2, group=2, length=LENGTH, suffix=" (shortened)")
    inputs = case_inputs(case, "cpu")
    request = request_of(inputs.q, inputs.k, inputs.v, **inputs.arguments)
    return one_of(request, f"{case.name}: {case.provenance}", command, batch, head, tile)


def one_of(request: Request, title: str, command: str, batch: int, head: int, tile: Tile) -> Asked:
    """One sequence and head of a call, which count from 1. Raises DemoError for one that is not there."""
    check_choice("--batch", batch, request.shape.batch)
    check_choice("--head", head, request.shape.q_heads)
    return Asked(request, title, command, batch - 1, head - 1, tile)


class _Found(BaseException):
    """Ends a script at the call that is asked for; no `except Exception` of the script's catches it."""

    def __init__(self, request: Request) -> None:
        self.request = request


def of_script(
    path: Path, arguments: Sequence[str], call: int, batch: int, head: int, tile: Tile, command: str
) -> Asked:
    """A call that a script makes, the first being 1. The script runs up to it.

    Raises ValueError where it ends before, or is not there. Its own errors are raised as they are.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    count = 0

    def watch(request: Request) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise _Found(request)

    before, api.watchers[:] = sys.argv, [*api.watchers, watch]
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.resolve().parent)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except _Found as found:
        request = detached(found.request)
    else:
        raise ValueError(
            f"{path} called tilewise {count} time{'s' * (count != 1)}, and --call {call} was asked for"
        )
    finally:
        api.watchers.remove(watch)
        sys.argv = before
        sys.path.remove(str(path.resolve().parent))
    return one_of(request, f"{path.name}, call {call}", command, batch, head, tile)


def detached(request: Request) -> Request:
    """The request without its graph, so that nothing of the script's is trained."""
    q, k, v = (x.detach() for x in (request.q, request.k, request.v))
    return replace(request, q=q, k=k, v=v)
