"""A request as tensors, numbers and one string: what PyTorch's library ops can take as arguments, and back.

Masks and scores are objects that hold jit functions, which no op schema knows. Here an object becomes words

    p:tilewise.parts.masks.causal:Causal s:bottom_right        a class, then its FIELDS in order
    p:tilewise.parts.masks.padding:Padding s:kv_lens T s:right    T, I, F: the next tensor, int, float
    p:tilewise.parts.masks.user:UserMask f:my:keep (1 I N         a function; a tuple, its length first; None
    p:tilewise.parts.masks.algebra:Not (1 p:...                   a mask that is made of masks

joined by line breaks. Tensors stay tensors, so that autograd, tracing and devices see them; numbers stay
numbers, so that a length that changes does not compile a new graph. What the names of functions and classes
stand for is in a registry: names.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..parts.dropout import Dropout
from ..parts.fp8 import Scales
from ..parts.place import Place
from ..parts.plug import Plug
from ..parts.shape import Cache, Packing, Pages
from ..parts.similarity import Cosine
from ..plan.implementation import implementation
from ..plan.request import Request
from .names import registered, registered_name

ANY_ORDER = "any order"  # the first word where deterministic is False, and nowhere else


DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Encoded(NamedTuple):
    """What stands for everything in a request but q, k and v."""

    tensors: list[torch.Tensor]
    ints: list[int]
    floats: list[float]
    spec: str


def name_of(thing: Any) -> str:
    """`registered_name`, wherever this runs. Only who compiles pays for importing Dynamo."""
    if torch.compiler.is_dynamo_compiling():
        from . import traced_names

        name: str = traced_names.registered_name(thing)
        return name
    return registered_name(thing)


def traced_name(value: Any) -> str:
    """That of a jit function in code that Dynamo traces; "" for anything else."""
    from . import traced_names

    name: str = traced_names.traced_name(value)
    return name


def encode(request: Request) -> Encoded:
    """The request in words. Its tensors come in the order of `request.other_tensors`."""
    encoded = Encoded([], [], [], "")
    words: list[str] = [] if request.deterministic else [ANY_ORDER]
    similarity: Any = request.similarity
    temperature = None
    if isinstance(similarity, Cosine):
        similarity, temperature = "cosine with a temperature", similarity.temperature
    seed, p = (None, None) if request.dropout is None else (request.dropout.seed, request.dropout.p)
    packing = None if request.packing is None else tuple(request.packing)
    cache = None if request.cache is None else as_tuples(request.cache)
    place = None if request.place is None else tuple(request.place)
    scales = None if request.scales is None else (*request.scales[:4], DTYPE_NAMES[request.scales.dtype])
    given = (
        request.scale, temperature, similarity, request.sink, seed, packing, cache, p, request.impl, place,
        scales,
    )  # fmt: skip
    for value in given:
        _put(value, encoded, words)
    for parts in (request.masks, request.scores):
        words.append(f"({len(parts)}")
        for part in parts:
            _put_part(part, encoded, words)
    if implementation(request) == "torch":  # nobody else asks a user's function for its twin
        for leaf in leaves_of(request.plugs):
            _put(getattr(leaf, "_twin", None), encoded, words)
    return encoded._replace(spec="\n".join(words))


def leaves_of(parts: Iterable[Plug]) -> list[Plug]:
    """Those that are made of no others, in order."""
    return [leaf for part in parts for leaf in part.leaves()]


def _put_part(part: Plug, encoded: Encoded, words: list[str]) -> None:
    words.append(f"p:{name_of(type(part))}")
    for name in part.FIELDS:
        _put(getattr(part, name), encoded, words)


def _put(value: Any, encoded: Encoded, words: list[str]) -> None:
    if value is None:
        words.append("N")
    elif torch.compiler.is_dynamo_compiling() and (name := traced_name(value)):
        words.append(f"f:{name}")
    elif isinstance(value, torch.Tensor):
        encoded.tensors.append(value)
        words.append("T")
    elif isinstance(value, bool):
        words.append(f"b:{int(value)}")
    elif isinstance(value, int):
        encoded.ints.append(value)
        words.append("I")
    elif isinstance(value, float):
        encoded.floats.append(value)
        words.append("F")
    elif isinstance(value, str):
        words.append(f"s:{value}")
    elif isinstance(value, tuple):
        words.append(f"({len(value)}")
        for each in value:
            _put(each, encoded, words)
    elif isinstance(value, Plug):
        _put_part(value, encoded, words)
    else:
        words.append(f"f:{name_of(value)}")


def as_tuples(cache: Cache) -> tuple[Any, ...]:
    kv_lens, pages, split_size = cache
    return kv_lens, None if pages is None else tuple(pages), split_size


def from_tuples(given: tuple[Any, ...]) -> Cache:
    kv_lens, pages, split_size = given
    return Cache(kv_lens, None if pages is None else Pages(*pages), split_size)


def as_scales(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int | None, dtype_name: str) -> Scales:
    return Scales(q, k, v, rows, getattr(torch, dtype_name))


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, encoded: Encoded) -> Request:
    """The request that `encode` was given; with the twins of the user's functions where plain PyTorch answers
    it."""
    said = encoded.spec.split("\n")
    deterministic = said[0] != ANY_ORDER
    words = iter(said if deterministic else said[1:])
    tensors, ints, floats = iter(encoded.tensors), iter(encoded.ints), iter(encoded.floats)
    take = lambda: _take(words, tensors, ints, floats)  # noqa: E731

    scale, temperature, similarity, sink, seed, packing, cache, p, impl, place, scales = (
        take() for _ in range(11)
    )
    masks, scores = take(), take()
    for part, word in zip(leaves_of((*masks, *scores)), words, strict=False):
        if word != "N":
            part._twin = registered(word[2:])  # type: ignore[attr-defined]
    return Request(
        q, k, v, masks, scores, scale,
        Cosine(temperature) if similarity == "cosine with a temperature" else similarity,
        sink, impl, None if seed is None else Dropout(p, seed),
        packing=None if packing is None else Packing(*packing),
        cache=None if cache is None else from_tuples(cache),
        deterministic=deterministic,
        place=None if place is None else Place(*place),
        scales=None if scales is None else as_scales(*scales),
    )  # fmt: skip


def _take(
    words: Iterator[str], tensors: Iterator[torch.Tensor], ints: Iterator[int], floats: Iterator[float]
) -> Any:
    word = next(words)
    if word in ("N", "T", "I", "F"):
        return None if word == "N" else next({"T": tensors, "I": ints, "F": floats}[word])
    if word[0] == "(":
        return tuple([_take(words, tensors, ints, floats) for _ in range(int(word[1:]))])
    kind, text = word[0], word[2:]
    if kind == "p":
        cls = registered(text)
        part = object.__new__(cls)
        for name in cls.FIELDS:
            setattr(part, name, _take(words, tensors, ints, floats))
        return part
    return text if kind == "s" else text == "1" if kind == "b" else registered(text)
