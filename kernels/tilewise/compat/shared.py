"""What the adapters share: windows as masks, layouts, and errors in the caller's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cached import cached_attention
from ..packed import packed_attention
from ..parts.bounds import UNLIMITED
from ..parts.masks.causal import Causal
from ..parts.masks.mask import Mask
from ..parts.masks.window import Window
from ..parts.shape import INTS

Tensor = torch.Tensor
Words = Mapping[str, str]  # an argument's name here, and the caller's
PAGES = ("pages", "page_size", "heads", "dim")


def check_layout(layout: tuple[str | int, ...], **tensors: Any) -> None:
    """Raise ValueError unless each has these dimensions; a number is the size that one must have."""
    wanted = f"[{', '.join(map(str, layout))}]"
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor, {wanted}")
        fits = x.dim() == len(layout)
        if not fits or any([type(n) is int and size != n for n, size in zip(layout, x.shape, strict=True)]):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be {wanted}")


def check_heads(q: Tensor, k: Tensor, axis: int, layout: tuple[str | int, ...]) -> None:
    """Raise ValueError unless the queries' heads are a multiple of the keys'."""
    heads, kv_heads = q.shape[axis], k.shape[axis]
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{heads} heads of queries must be a multiple of {kv_heads} of keys, and neither may be 0; the "
            f"layout is [{', '.join(map(str, layout))}]"
        )


def window_mask(window_size: Any, causal: bool = False) -> Mask | None:
    """(left, right) around the row's own position, the last query at the last key; -1 sets no limit, and
    causal takes what is right of it away."""
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not all([isinstance(size, int) and size >= -1 for size in window_size]):
        raise ValueError(f"{window_size=} must be (left, right), two ints: -1 for no limit, or from 0")
    left, right = [None if size == -1 or size >= UNLIMITED else size for size in window_size]
    if causal:
        right = 0
    if left is None:
        return None if right is None else Causal() if right == 0 else Window(None, right)
    return Window(left, right)


def check_integers(**tensors: Any) -> None:
    """Raise ValueError unless each is a tensor of integers with one dimension."""
    for name, given in tensors.items():
        if not isinstance(given, Tensor) or given.dtype not in INTS or given.dim() != 1:
            raise ValueError(
                f"{name}={given!r} must be a tensor of one dimension, torch.int32 or torch.int64"
            )


def in_words(words: Words, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What the function returns. Its ValueErrors name arguments as the caller does."""
    try:
        return function(*given, **options)
    except ValueError as error:
        name = re.compile(rf"\b({'|'.join(words)})\b")
        raise ValueError(name.sub(lambda found: words[found[0]], str(error))) from None


def packed(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Any, kv_offsets: Any, words: Words, **options: Any
) -> Any:
    """`packed_attention`, where one tensor as both offsets may stand for tensors with different numbers of
    rows: those behind the last sequence belong to none."""
    if kv_offsets is q_offsets and q.shape[0] != k.shape[0]:
        kv_offsets = kv_offsets[:]
    return in_words(words, packed_attention, q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, **options)


def paged(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Any, kv_lens: Any, pages: Any, words: Words, **options: Any
) -> Any:
    """`cached_attention` of packed queries over pages [pages, page_size, kv_heads, dim]. No gradient."""
    given = dict(q_offsets=q_offsets, kv_lens=kv_lens, pages=pages)
    return in_words(words, cached_attention, q, k, v, **given, **options)
