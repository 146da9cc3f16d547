"""Where a query stands among the keys, and how tensors are broadcast to the pairs of query and key."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Align = Literal["bottom_right", "top_left"] | int | Tensor


def shift(q_len: int, kv_len: int, align: Align | None) -> int | Tensor:
    """Key position of query 0: query i stands at key position i + shift.

    ``"bottom_right"`` and None put the last query at the last key (new tokens after a cache), ``"top_left"``
    the first query at the first key (PyTorch's ``is_causal=True``). An int, or an int tensor [B], is that key
    position itself. Raises ValueError for any other name.
    """
    if align is None or isinstance(align, (int, Tensor)):
        return kv_len - q_len if align is None else align
    if align == "bottom_right":
        return kv_len - q_len
    if align == "top_left":
        return 0
    raise ValueError(f"{align=} must be 'bottom_right' or 'top_left'")


def at(offset: int | Tensor, batch: Tensor) -> int | Tensor:
    """The shift of each sequence of ``batch``."""
    return lookup(offset.to(batch.device), batch) if isinstance(offset, Tensor) else offset


def lookup(table: Tensor, *index: Tensor) -> Tensor:
    """Read ``table[index]``, broadcasting the table: missing leading dimensions and dimensions of size 1
    stand for every index.

    table: at most ``len(index)`` dimensions; index: int64 tensors that broadcast together. The result has
    the broadcast shape of the indices. Raises ValueError for a table with more dimensions than indices.
    """
    if table.dim() > len(index):
        raise ValueError(f"{tuple(table.shape)=} has {table.dim()} dimensions, at most {len(index)} expected")
    table = table.reshape((1,) * (len(index) - table.dim()) + tuple(table.shape))
    return table[
        tuple(torch.zeros_like(i) if size == 1 else i for size, i in zip(table.shape, index, strict=True))
    ]


def expand(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor broadcast to the shape of the scores, or a ValueError that names it."""
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}.shape={tuple(tensor.shape)} must broadcast to {shape}") from None
