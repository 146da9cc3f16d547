"""One call of the kernels as a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from ...kernels.tile import Tile
from ...parts.masks.causal import Causal
from ...parts.numerics import INTERPRETED
from ...parts.shape import ceil_div
from ...parts.similarity import Cosine
from ...plan.bind import bind
from ...plan.checks import check
from ...plan.request import Request, cached_request
from ...version import __version__
from .compare import compare
from .glossary import glossary
from .hopper import watch_hopper, why_not_hopper
from .recording import Arrays, CallShown, Pass, Recording, TooLarge
from .shown import Shown, key_rows, query_rows, shown_of
from .source import tokens
from .watched import Forward, watch_backward, watch_forward

Tensor = torch.Tensor
TILE = Tile(16, 16)  # the smallest there is: a page has room for few numbers
NEW_ROWS = 4  # of the decoding that follows a call whose queries are its keys' rows
MOST_TEXT = 4_400_000  # bytes, beside those of the page itself
MOST_KEYS = 512  # of a row: weights are read off the kernel as values, which are no wider


@dataclass(frozen=True)
class Asked:
    """What to watch. words: of the rows of queries and of keys shown; None: their numbers."""

    request: Request
    title: str
    command: str
    batch: int = 0
    head: int = 0
    tile: Tile = TILE
    words: tuple[list[str], list[str]] | None = None


def record(asked: Asked, progress: Callable[[str], None] = lambda what: None) -> Recording:
    """Run the kernels of a call, and what the page compares it with. progress: told of each part.

    Raises ValueError where the call cannot be watched, naming the argument, and `TooLarge` (a ValueError)
    where it has more numbers than a page can hold.
    """
    request = asked.request
    if not INTERPRETED:
        raise RuntimeError("kernels are watched in Triton's interpreter: set TRITON_INTERPRET=1")
    check(request)
    if request.q.device.type != "cpu":
        raise ValueError(f"q.device={request.q.device}: the interpreter works on the CPU; give tensors there")
    if request.q.dtype == torch.float64:
        raise ValueError("q.dtype=torch.float64: no kernel computes it; give float32, float16 or bfloat16")
    shown = shown_of(request, asked.batch, asked.head)
    if max(shown.lengths) > MOST_KEYS:
        raise TooLarge(too_large(shown, asked.tile))
    arrays, omitted = Arrays(), dict[str, str]()
    try:
        with torch.no_grad():  # a script's bias may be one that is trained
            found = record_shown(asked, shown, arrays, omitted, progress)
        if len(found.to_json()) > MOST_TEXT:
            raise TooLarge
    except TooLarge:
        raise TooLarge(too_large(shown, asked.tile)) from None
    return found


def too_large(shown: Shown, tile: Tile) -> str:
    rows, keys = shown.lengths
    return (
        f"a page of 5 MB can hold no call of {rows} rows and {keys} keys with head_dim={shown.head_dim} and "
        f"value_dim={shown.value_dim} in tiles of {tile.tile_q} x {tile.tile_kv}: give fewer rows, such as a "
        "shorter text"
    )


def record_shown(
    asked: Asked, shown: Shown, arrays: Arrays, omitted: dict[str, str], progress: Callable[[str], None]
) -> Recording:
    request, tile = asked.request, asked.tile
    words = asked.words or numbered(shown)

    progress("the forward")
    forward = watch_forward(request, shown, tile, arrays)
    passes, files = list(forward.passes), set(forward.files)
    tensors = {
        "q": arrays.add(numbers(query_rows(request.q, shown))),
        "k": arrays.add(numbers(key_rows(request.k, shown, request))),
        "v": arrays.add(numbers(key_rows(request.v, shown, request))),
        "out": arrays.add(numbers(query_rows(forward.out, shown))),
        "lse": arrays.add(numbers(query_rows(forward.lse, shown))),
    }
    if request.cache is not None:
        omitted["backward"] = "a cache has no backward"
        name_rows(passes, request, forward, shown, words, arrays)
    else:
        progress("the backward")
        do = forward.out.clone()  # of the loss ½ Σ O²
        backward = watch_backward(request, forward, do, shown, tile, arrays)
        passes += backward.passes
        files |= backward.files
        dq, dk, dv = backward.grads
        tensors |= {
            "dout": arrays.add(numbers(query_rows(do, shown))),
            "dq": arrays.add(numbers(query_rows(dq, shown))),
            "dk": arrays.add(numbers(key_rows(dk, shown, request))),
            "dv": arrays.add(numbers(key_rows(dv, shown, request))),
        }
    if request.cache is None and is_decodable(request):
        progress("decoding, with split keys")
        found, sources = decoding(request, shown, tile, arrays, words)
        passes += found
        files |= sources
    elif request.cache is None:
        omitted["splits"] = "a step of decoding is shown after a call over a whole text, under Causal() alone"
    reason = why_not_hopper(request)
    if reason is None:
        progress("Hopper's forward, in the emulator")
        found_pass, sources = watch_hopper(request, shown, arrays)
        passes.append(found_pass)
        files |= sources
    else:
        omitted["hopper"] = reason
    progress("comparisons")
    compared = compare(request, shown, tile, forward.passes[0], arrays, omitted)
    return Recording(
        title=asked.title,
        made=dict(
            tilewise=__version__, triton=triton.__version__, torch=torch.__version__, command=asked.command
        ),
        call=call_shown(request, shown),
        words={"queries": words[0], "keys": words[1]},
        arrays=arrays,
        tensors=tensors,
        passes=passes,
        sources={file: tokens(file) for file in sorted(files)},
        glossary=glossary(),
        compare=compared,
        omitted=omitted,
    )


def numbers(x: Tensor) -> np.ndarray[Any, Any]:
    return x.float().numpy()


def numbered(shown: Shown) -> tuple[list[str], list[str]]:
    """Names for rows without words."""
    return of_heads(map(str, range(shown.q_len)), shown), [str(key) for key in range(shown.kv_len)]


def of_heads(rows: Iterable[str], shown: Shown) -> list[str]:
    """The names of what is shown, where each row is there for several heads."""
    if len(shown.heads) == 1:
        return list(rows)
    return [f"{row}, head {head}" for row in rows for head in shown.heads]


def call_shown(request: Request, shown: Shown) -> CallShown:
    unit = bind(request).unit
    similarity = "cosine" if isinstance(request.similarity, Cosine) else request.similarity
    mask = " & ".join(map(repr, request.masks))
    score = ", ".join(map(repr, request.scores))
    given = [f"mask={mask}"] * bool(mask) + [f"score={score}"] * bool(score)
    if similarity != "scaled_dot":
        given.append(f"similarity={similarity!r}")
    if request.scale is not None:
        given.append("scale=scale" if isinstance(request.scale, Tensor) else f"scale={request.scale}")
    if request.sink is not None:
        given.append("sink=sink")
    if request.dropout is not None:
        given.append(f"dropout_p={request.dropout.p}")
    name = "cached_attention" if request.cache is not None else "attention"
    name = "packed_attention" if request.packing is not None and request.cache is None else name
    return CallShown(
        text=f"tw.{name}({', '.join(['q', 'k', 'v', *given])})",
        q=list(request.q.shape),
        k=list(request.k.shape),
        v=list(request.v.shape),
        dtype=str(request.q.dtype).removeprefix("torch."),
        mask=mask,
        score=score,
        similarity=similarity,
        scale=None if unit is None else float(unit),
        batch=shown.batch,
        head=shown.head,
    )


def is_decodable(request: Request) -> bool:
    """Whether the call is one over a whole text, of which the last rows may be asked again."""
    masks = request.masks
    return (
        request.packing is None
        and request.shape.q_len == request.shape.kv_len > 2 * TILE.tile_kv
        and not request.scores
        and request.sink is None
        and request.dropout is None
        and len(masks) == 1
        and type(masks[0]) is Causal
    )


def decoding(
    request: Request, shown: Shown, tile: Tile, arrays: Arrays, words: tuple[list[str], list[str]]
) -> tuple[list[Pass], set[str]]:
    """The last rows of the call once more, as a step over a cache of its keys, split in two."""
    count = min(NEW_ROWS, shown.q_len)
    half = ceil_div(shown.kv_len, 2)
    step = cached_request(
        request.q[:, :, -count:], request.k, request.v, mask=Causal(), scale=request.scale,
        similarity=request.similarity, kv_lens=torch.full((request.shape.batch,), shown.kv_len),
        split_size=ceil_div(half, tile.tile_kv) * tile.tile_kv,
    )  # fmt: skip
    few = shown_of(step, shown.batch, shown.head)
    forward = watch_forward(step, few, tile, arrays)
    rows = of_heads(words[0][-count:], few)
    name_rows(forward.passes, step, forward, few, (rows, words[1]), arrays)
    return forward.passes, forward.files


def name_rows(
    passes: list[Pass], request: Request, forward: Forward, shown: Shown, words: tuple[list[str], list[str]],
    arrays: Arrays,
) -> None:  # fmt: skip
    """Give passes over a cache words and tensors of their own. The merge has its rows by heads."""
    tensors = dict(q=request.q, out=forward.out, lse=forward.lse)
    own = {name: query_rows(x, shown) for name, x in tensors.items()}
    places = torch.arange(len(words[0]))
    for each in passes:
        order = shown.by_heads(places) if each.name == "combine" else places
        each.words = {"queries": [words[0][place] for place in order.tolist()], "keys": words[1]}
        each.tensors = {name: arrays.add(numbers(x[order])) for name, x in own.items()}
