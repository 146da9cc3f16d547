"""Before anything is sent, the ranks compare what they were given: what differs is an error on all of them,
and so is the error of one.

    with agreed(host_group(mesh), "name_of_the_call") as given:
        given["order"] = word(order)          # what must be the same on all ranks, in words
        check_the_arguments_of_this_rank()    # whose error is then everybody's

Every rank sends 40 bytes, a digest of its words; only where the digests differ are the words themselves
sent, to be set side by side. All of it is the hosts' talk, over gloo (`hosts.host_group`): no GPU is waited
for, but where a tensor's contents must agree and have not been read yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import string_at
from hashlib import blake2b
from inspect import signature
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..parts.masks.mask import Mask
from ..parts.plug import Plug
from .faults import in_words
from .hosts import Hosts

Tensor = torch.Tensor
Words = dict[str, str]

DIGEST = 32  # bytes; 8 more say how long the words are
FAILED = ""  # the name, which no argument has, of a rank's own error
KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError)}  # a caller's mistakes


@contextmanager
def agreed(hosts: Hosts, call: str) -> Iterator[Words]:
    """Takes the words of this rank's arguments; when the body ends, compares them with the other ranks'.

    hosts: all of them must come here, in the same order of calls
    call:  what errors name

    Raises, on every rank: ValueError for words that differ, with each argument, its values and the ranks that
    have them. If the body raised on some ranks: there, what it raised; on the others the same kind of error
    (RuntimeError, if it is no mistake of arguments), with those ranks and their errors. RuntimeError, within
    the time-out of the group, if a rank died or did not come.
    """
    given: Words = {}
    own: Exception | None = None
    try:
        yield given
    except Exception as error:
        own = error
    words = given if own is None else {FAILED: f"{type(own).__name__}: {own}"}
    try:
        everyone = compared(hosts, {"call": call, **words}, call)
    except RuntimeError as unanswered:
        if own is not None:
            raise own from unanswered
        raise
    if own is not None:
        raise own
    if everyone is not None:
        raise disagreement(call, everyone)


def compared(hosts: Hosts, words: Words, call: str) -> list[Words] | None:
    """The words of every rank; None if they are all the same."""
    data = json.dumps(words, sort_keys=True).encode()
    head = blake2b(data, digest_size=DIGEST).digest() + len(data).to_bytes(8, "little")
    what = f"{call}, comparing what the ranks were given"
    heads = hosts.gather(head, what)
    if all(each == head for each in heads):
        return None
    longest = max(int.from_bytes(each[DIGEST:], "little") for each in heads)
    texts = hosts.gather(data.ljust(longest), what)
    return [json.loads(text) for text in texts]


def disagreement(call: str, everyone: list[Words]) -> Exception:
    """The error of a rank that has none of its own."""
    failed = {rank: words[FAILED] for rank, words in enumerate(everyone) if FAILED in words}
    if failed:
        kinds = {text.partition(":")[0] for text in failed.values()}
        kind = KINDS.get(kinds.pop(), RuntimeError) if len(kinds) == 1 else RuntimeError
        told = by_value(failed)
        return kind(
            f"{call}: nothing is wrong on this rank, but " + "; ".join(f"{who}: {text}" for text, who in told)
        )
    names = list(dict.fromkeys(name for words in everyone for name in words))
    lines = []
    for name in names:
        told = by_value({rank: words.get(name, "not given") for rank, words in enumerate(everyone)})
        if len(told) > 1:
            lines.append(f"{name}: " + "; ".join(f"{text} on {who}" for text, who in told))
    return ValueError(f"{call}: all ranks must be given the same\n  " + "\n  ".join(lines))


def by_value(texts: dict[int, str]) -> list[tuple[str, str]]:
    """Each text, and "rank 3" or "ranks 0-2, 5" that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    return [(text, f"rank{'s' if len(those) > 1 else ''} {in_words(those)}") for text, those in ranks.items()]


# ---- What a rank was given, in words


def word(value: Any, *, contents: bool = False) -> str:
    """An argument in words that are equal if the arguments are: tensors, also those that a mask or a score
    was made from, by dtype and shape; with `contents` by their numbers too, which the host must read: for
    masks, which it reads to plan with anyway, and seeds."""
    if isinstance(value, Tensor):
        text = f"{value.dtype}{list(value.shape)}"
        return f"{text} (digest {digest(value)})" if contents else text
    if isinstance(value, Mask) and value.parts() != (value,):
        value = value.parts()
    if isinstance(value, Plug):
        tensors = dict.fromkeys(word(x, contents=contents) for x in own_tensors(value))
        return f"{value!r} of {', '.join(tensors)}" if tensors else repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(word(each, contents=contents) for each in value)})"
    return repr(value)


def own_tensors(part: Plug) -> list[Tensor]:
    """The tensors that a mask or score was made from, without what it has worked out of them."""
    tensors = part.tensors()
    given = [part.given(name) for name in signature(type(part)).parameters]
    own = [x for x in tensors.values() if any(x is each for each in given)]
    return own or list(tensors.values())


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits, the same for the same dtype, shape and numbers (bits). The host reads the
    tensor, and waits for the GPU, once: not again until it is changed in place."""
    is_tracked = not tensor.is_inference()
    stamp = (tensor._version, tensor.data_ptr()) if is_tracked else None
    if is_tracked and (known := _read.get(tensor)) is not None and known[0] == stamp:
        return str(known[1])
    plain = tensor.detach().cpu().contiguous()
    state = blake2b(f"{plain.dtype}{list(plain.shape)}".encode(), digest_size=8)
    if plain.numel():
        state.update(string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
    found = state.hexdigest()
    if is_tracked:
        _read[tensor] = stamp, found
    return found
