"""Which dense calls is a call made of? One; or, of packed sequences or of a cache, one for each pair of
lengths that sequences have.

No tile holds rows or keys of two sequences, so what the kernels visit in a packed call is the sum of what
they visit in each sequence alone; and sequences that are equally long are a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...parts.bounds import Bounds
from ...parts.masks.mask import Mask
from ...parts.shape import Packing, Shape, ceil_div
from ...pytorch.pieces import offset_errors
from .coverage import NOTHING, Coverage, Rows, has_contents, interval_by, rows_of


@dataclass(frozen=True)
class Part:
    """A dense call, and what the masks say of its rows. sequences: the numbers in the packed call of those
    that are its batch, int64 on the CPU; None: the call is dense itself."""

    shape: Shape
    rows: Rows
    sequences: torch.Tensor | None = None

    def along(self, x: torch.Tensor, axes: str, missing: Any = 0) -> torch.Tensor:
        """A tensor that a mask reads, as this dense call would have it. axes: what its last dimensions lie
        along, of "b" (batch), "h" (heads), "q" and "k"; any of them may be 1. Beyond the tensor's end stands
        `missing`."""
        if self.sequences is None:
            return x
        x = x[(None,) * (len(axes) - x.dim())]
        for axis, name in enumerate(axes):
            if x.shape[axis] == 1 or name == "h":
                continue
            if name == "b":
                x = x.index_select(axis, self.sequences.to(x.device))
            else:
                x = fitted(x, axis, self.shape.q_len if name == "q" else self.shape.kv_len, missing)
        return x


class Parts:
    """The dense calls of a call. What is counted in them is counted once."""

    def __init__(self, parts: Iterable[Part], assumed: bool = False) -> None:
        self.parts = tuple(parts)
        self.assumed = assumed  # offsets have no contents here, and equal lengths stand in
        self._counted: dict[Any, Any] = {}

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def covered(self, walk: Callable[..., Coverage], *tile: int) -> Coverage:
        """The tiles of all parts; `walk` is one of coverage.py."""
        return self.total(walk, NOTHING, *tile)

    def counted(self, count: Callable[[Rows, Shape], int]) -> int:
        """The pairs or keys of all parts; `count` is one of coverage.py."""
        return self.total(count, 0)

    def total(self, count: Callable[..., Any], start: Any, *tile: int) -> Any:
        key = count, *tile
        if key not in self._counted:
            self._counted[key] = sum((count(part.rows, part.shape, *tile) for part in self.parts), start)
        return self._counted[key]

    @property
    def pairs(self) -> int:
        """Of query and key, in all batches and heads."""
        return sum(math.prod(part.shape.scores) for part in self.parts)

    def tiles_of_rows(self, tile_q: int) -> int:
        """How many tiles a head's rows fill."""
        return sum(part.shape.batch * ceil_div(part.shape.q_len, tile_q) for part in self.parts)

    def tiles_of_keys(self, tile_kv: int) -> int:
        return sum(part.shape.batch * ceil_div(part.shape.kv_len, tile_kv) for part in self.parts)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known of masks, so that tiles are counted that they leave out."""
        return tuple(dict.fromkeys(reason for part in self.parts for reason in part.rows.unknown))

    def with_masks(self, masks: Iterable[Mask], shape: Shape) -> Parts:
        """The same calls under other masks; shape: of the whole call."""
        masks = tuple(masks)
        return Parts((masked(part, masks, shape) for part in self.parts), self.assumed)

    def within(self, bounds: Iterable[Bounds], whole: bool) -> Parts:
        """The same calls, their rows cut to those bounds, one a part; whole: every key in these counts."""
        cut = zip(self.parts, bounds, strict=True)
        return Parts(
            (replace(part, rows=intersected(part.rows, each, whole)) for part, each in cut), self.assumed
        )


def parts_of(masks: Iterable[Mask], shape: Shape) -> Parts:
    """The dense calls of a call of this shape. Raises ValueError for offsets that decrease or lead out of the
    tensors."""
    masks = tuple(masks)
    if shape.is_dense:
        return Parts([Part(shape, rows_of(masks, shape))])
    lengths, assumed = lengths_of(shape)
    pairs, which = lengths.unique(dim=0, return_inverse=True)
    found = []
    for i, (q_len, kv_len) in enumerate(pairs.tolist()):
        sequences = (which == i).nonzero()[:, 0]
        alone = shape._replace(batch=len(sequences), q_len=q_len, kv_len=kv_len, packing=None, cache=None)
        found.append(masked(Part(alone, rows_of((), alone), sequences), masks, shape))
    return Parts(found, assumed)


def lengths_of(shape: Shape) -> tuple[torch.Tensor, bool]:
    """q_len and kv_len of each sequence, [batch, 2] on the CPU, and whether those of packed ones are assumed.
    Of a cache whose lengths have no contents each sequence fills its part."""
    if shape.cache is None:
        assert shape.packing is not None
        return packed_lengths(shape.packing, shape)
    kv_lens = torch.full((shape.batch,), shape.kv_len, device="cpu")
    if has_contents(shape.cache.kv_lens):
        kv_lens = shape.cache.kv_lens.to("cpu", torch.int64).clamp(0, shape.kv_len)
    if shape.packing is None:
        return torch.stack([torch.full_like(kv_lens, shape.q_len), kv_lens], 1), False
    lengths, assumed = packed_lengths(
        Packing(shape.packing.q_offsets, None), shape._replace(kv_len=shape.q_len)
    )
    return torch.stack([lengths[:, 0], kv_lens], 1), assumed


def packed_lengths(packing: Packing, shape: Shape) -> tuple[torch.Tensor, bool]:
    of_keys = packing.q_offsets if packing.kv_offsets is None else packing.kv_offsets
    if not (has_contents(packing.q_offsets) and has_contents(of_keys)):
        index = torch.arange(shape.batch, device="cpu")
        equal = [rows // shape.batch + (index < rows % shape.batch) for rows in (shape.q_len, shape.kv_len)]
        return torch.stack(equal, 1), True
    if errors := offset_errors(packing, shape.q_len, shape.kv_len):
        raise ValueError("; ".join(errors))
    known = [offsets.to("cpu", torch.int64).diff() for offsets in (packing.q_offsets, of_keys)]
    return torch.stack(known, 1), False


def masked(part: Part, masks: tuple[Mask, ...], shape: Shape) -> Part:
    """The part under these masks of the whole call, whose shape is given."""
    if part.sequences is None:
        return replace(part, rows=rows_of(masks, shape))

    def bounds(mask: Mask) -> Bounds | None:
        found = mask.bounds(part.shape._replace(batch=shape.batch))
        if found is None:
            return None
        # A row beyond the mask's tensors sees no key.
        reached = torch.arange(part.shape.q_len, device="cpu") < mask.extents(shape)[0]
        lo, hi, whole = (part.along(x, "bhq") for x in found)
        return Bounds(lo, torch.where(reached, hi, 0), whole)

    def of_sequences(mask: Mask, alone: Shape) -> Bounds | str | None:
        return interval_by(mask, mask.bind(shape), alone, lambda: bounds(mask), part.sequences)

    return replace(part, rows=rows_of(masks, part.shape, of_sequences))


def fitted(x: torch.Tensor, axis: int, length: int, missing: Any) -> torch.Tensor:
    """x cut to a length along an axis, or filled up."""
    lacking = length - x.shape[axis]
    if lacking <= 0:
        return x.narrow(axis, 0, length)
    sizes = [lacking if i == axis else size for i, size in enumerate(x.shape)]
    return torch.cat([x, x.new_full(sizes, missing)], axis)


def intersected(rows: Rows, bounds: Bounds, whole: bool) -> Rows:
    lo, hi = torch.maximum(rows.lo, bounds.lo), torch.minimum(rows.hi, bounds.hi)
    lo, hi, all_whole = torch.broadcast_tensors(lo, hi, rows.whole & whole)
    return Rows(lo, hi, all_whole, rows.unknown)
