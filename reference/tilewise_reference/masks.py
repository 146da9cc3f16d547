"""Which pairs count: every mask written as the plain statement of what it means.

Each function returns ``mask(batch, head, q_idx, kv_idx) -> bool``, true where the query may attend to the
key. The four arguments are int64 index tensors that broadcast together; ``attention`` passes the shapes
[B,1,1,1], [1,Hq,1,1], [1,1,Nq,1] and [1,1,1,Nk].

``align`` says where the queries stand among the keys: query i is at key position i + kv_len - q_len
(``"bottom_right"``), at i (``"top_left"``) or at i + align (an int, or an int tensor [B]).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from .positions import Align, at, lookup, shift

MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(q_len: int, kv_len: int, align: Align | None = "bottom_right") -> MaskFn:
    """A query sees the key at its own position and every key before it."""
    offset = shift(q_len, kv_len, align)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx + at(offset, batch)

    return mask


def window(
    left: int | None, right: int | None, q_len: int, kv_len: int, align: Align | None = "bottom_right"
) -> MaskFn:
    """A query sees ``left`` keys before its own position, that position, and ``right`` keys after it.

    ``None`` sets no limit on that side: ``window(None, 0)`` is causal. Sliding windows of this kind are
    described in Longformer (Beltagy et al. 2020, arXiv 2004.05150). Raises ValueError for a negative count.
    """
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"{left=} and {right=} must be None or at least 0")
    offset = shift(q_len, kv_len, align)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = q_idx + at(offset, batch)
        distance = kv_idx - position  # negative before the query's position, positive after it
        keep = torch.ones_like(distance, dtype=torch.bool)
        if left is not None:
            keep = keep & (distance >= -left)
        if right is not None:
            keep = keep & (distance <= right)
        return keep

    return mask


def prefix(lengths: int | Tensor, q_len: int, kv_len: int, align: Align | None = "bottom_right") -> MaskFn:
    """Every query sees the first ``lengths`` keys; the rest are causal (prefix language model, Raffel et
    al. 2019, arXiv 1910.10683).

    lengths: an int, or an int tensor [B] with one length per batch element.
    """
    offset = shift(q_len, kv_len, align)
    table = torch.as_tensor(lengths)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < lookup(table.to(batch.device), batch)) | (kv_idx <= q_idx + at(offset, batch))

    return mask


def documents(q_ids: Tensor, kv_ids: Tensor | None = None) -> MaskFn:
    """A query sees the keys of its own document: those whose id equals its id.

    q_ids: int tensor [Nq] or [B, Nq]; kv_ids: [Nk] or [B, Nk], ``q_ids`` when None (self-attention).
    """
    keys = q_ids if kv_ids is None else kv_ids

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(q_ids, batch, q_idx) == lookup(keys, batch, kv_idx)

    return mask


def padding(kv_lens: int | Tensor, kv_len: int, side: Literal["right", "left"] = "right") -> MaskFn:
    """Only ``kv_lens`` of the ``kv_len`` keys are real: the first ones when the padding is on the
    ``"right"``, the last ones when it is on the ``"left"``.

    kv_lens: an int, or an int tensor [B]. Raises ValueError for any other side.
    """
    if side not in ("right", "left"):
        raise ValueError(f"{side=} must be 'right' or 'left'")
    table = torch.as_tensor(kv_lens)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        real = lookup(table.to(batch.device), batch)
        return kv_idx < real if side == "right" else kv_idx >= kv_len - real

    return mask


def block_causal(
    block: int,
    window: int | None,
    q_len: int,
    kv_len: int,
    align: Align | None = "bottom_right",
) -> MaskFn:
    """Keys stand in blocks of ``block``, and a query sees its own block and all before it; with a ``window``
    its own block and the ``window - 1`` before it. Where a block is a frame of a video, frames are causal and
    tokens inside one see each other (Yin et al. 2024, arXiv 2412.07772). Raises ValueError for counts below
    1.
    """
    if block < 1 or (window is not None and window < 1):
        raise ValueError(f"{block=} must be at least 1, and {window=} None or at least 1")
    offset = shift(q_len, kv_len, align)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own, other = (q_idx + at(offset, batch)) // block, kv_idx // block
        keep = other <= own
        return keep if window is None else keep & (own - other < window)

    return mask


def neighborhood(
    shape: Sequence[int],
    size: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    q_len: int,
    kv_len: int,
    align: Align | None = "bottom_right",
) -> MaskFn:
    """Keys are the points of a grid of this ``shape``, the last axis running fastest, and a query stands at
    one of them: it sees the points that are near along every axis.

    Along an axis of ``length`` points, those with the same remainder by ``dilation`` form a group; a point is
    the i-th of its group, which has n. It sees ``size`` of the group that stand together, from i - size // 2
    on, but none before the first or behind the last: near a border the window is moved inside. Along a
    ``causal`` axis it sees itself and those of the size - 1 before it that there are. Neighborhood attention
    (Hassani et al. 2022, arXiv 2204.07143), dilated (Hassani and Shi 2022, arXiv 2209.15001), causal (Hassani
    et al. 2024, arXiv 2403.04690).
    """
    offset = shift(q_len, kv_len, align)
    points = math.prod(shape)

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = q_idx + at(offset, batch)
        keep = (position >= 0) & (position < points) & (kv_idx < points)
        stride = points
        for length, count, step, is_causal in zip(shape, size, dilation, causal, strict=True):
            stride //= length
            x, y = position // stride % length, kv_idx // stride % length
            i, j = x // step, y // step
            members = (length - x % step + step - 1) // step
            first = (i - (count - 1 if is_causal else count // 2)).clamp(min=0)
            first = torch.minimum(first, members - count)
            last = i if is_causal else first + count - 1
            keep = keep & (x % step == y % step) & (first <= j) & (j <= last)
        return keep

    return mask


def any_of(*masks: MaskFn) -> MaskFn:
    """The pairs that at least one of these masks keeps."""

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return reduce(operator.or_, [each(batch, head, q_idx, kv_idx) for each in masks])

    return mask


def all_of(*masks: MaskFn) -> MaskFn:
    """The pairs that every one of these masks keeps."""

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return reduce(operator.and_, [each(batch, head, q_idx, kv_idx) for each in masks])

    return mask


def negated(mask: MaskFn) -> MaskFn:
    """The pairs that a mask does not keep."""
    return lambda batch, head, q_idx, kv_idx: ~mask(batch, head, q_idx, kv_idx)


def intervals(start: Tensor, end: Tensor) -> MaskFn:
    """Query i sees the keys ``start[i] <= kv_idx < end[i]``; none where ``end <= start``.

    start, end: int tensors broadcastable to [B, Hq, Nq].
    """

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (lookup(start, batch, head, q_idx) <= kv_idx) & (kv_idx < lookup(end, batch, head, q_idx))

    return mask


def blocks(pattern: Tensor, block: tuple[int, int]) -> MaskFn:
    """Pairs count in whole blocks of ``block`` = (rows, keys): those of the blocks that are true.

    pattern: bool tensor broadcastable to [B, Hq, ceil(Nq / rows), ceil(Nk / keys)]. Patterns of this kind:
    block-sparse FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.3), BigBird (Zaheer et al. 2020,
    arXiv 2007.14062).
    """

    def mask(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(pattern, batch, head, q_idx // block[0], kv_idx // block[1])

    return mask
