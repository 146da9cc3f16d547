"""The call that the ranks share, and what any part of it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ....parts.masks.mask import Mask
from ....parts.place import Place, place_parameter
from ....parts.shape import Shape
from ....plan.passes import parameter_slots
from ....plan.request import Request
from ...chips import Chip
from ..as_workload import as_trained, computed_tensors, tile_choices, walks_of
from ..coverage import Rows, has_contents
from ..workload import Extra, TrainedParameter, Workload
from .pieces import Pieces, Times, joined, times_of

Tensor = torch.Tensor
AT_ONCE = 1 << 22  # rows that are counted together, of all heads that differ
# Bytes that PyTorch moves for a number in fp32: of total + (piece - total) · weight, and of a sum.
JOINED, ADDED = 12, 12


@dataclass(frozen=True)
class Whole:
    """request: that of the whole call. work: what one device would have to do. on_its_gpu: as in
    `as_workload`. heads: of which heads of
    q it is, first and last + 1, where masks tell heads apart; None: of all."""

    request: Request
    work: Workload
    chip: Chip
    on_its_gpu: bool
    heads: tuple[int, int] | None = None

    @property
    def shape(self) -> Shape:
        return self.work.shape

    @property
    def rows(self) -> Rows:
        """What masks say of the rows of the whole sequence."""
        (part,) = self.work.parts
        lo, hi, whole = part.rows.lo, part.rows.hi, part.rows.whole
        if part.rows.repeats[1] > 1 and self.heads is not None:
            lo, hi, whole = (x[:, slice(*self.heads)] for x in (lo, hi, whole))
        return Rows(lo, hi, whole, part.rows.unknown)

    @property
    def readable_masks(self) -> tuple[Mask, ...]:
        """Those whose tensors have contents here; of the others nothing is known."""
        masks = self.request.masks
        return tuple(mask for mask in masks if all(map(has_contents, mask.tensors().values())))

    def unmasked(self) -> Whole:
        """The call without its masks: every pair counts."""
        parts = self.work.parts.with_masks((), self.shape)
        return replace(self, request=replace(self.request, masks=()), work=replace(self.work, parts=parts))

    def part(self, shape: Shape) -> Workload:
        """The workload of a part of this shape, but for what it sees: masks and scores are those of the whole
        call, read where the part lies."""
        sizes = (shape.batch, shape.q_heads, shape.q_len), (shape.batch, shape.kv_heads, shape.kv_len)
        q, k, v = (
            torch.empty(*lead, dim, dtype=self.request.q.dtype, device="meta")
            for lead, dim in zip(
                (sizes[0], sizes[1], sizes[1]), (shape.head_dim, shape.head_dim, shape.value_dim), strict=True
            )
        )
        part = replace(self.request, q=q, k=k, v=v, place=Place(*self.shape[:5]))
        computed = tuple(computed_tensors(part))
        names = {x.name for x in self.work.computed}
        return replace(
            self.work,
            shape=shape,
            choose=tile_choices(self.request.q, shape, self.chip, self.on_its_gpu),
            return_lse=True,
            extras=(
                *(x for x in self.work.extras if x.name not in names),
                *(Extra(x.name, x.bytes, False) for x in computed),
            ),
            parameters=tuple(trained(part)) if self.work.parameters else (),
            computed=computed,
            walks=walks_of(part, self.chip, self.on_its_gpu),
        )

    def times(self, shape: Shape, first_rows: Tensor, first_keys: Tensor, joined_to: bool = True) -> Times:
        """Of calls of this shape, one from each of these rows and keys of the sequence on. joined_to: what
        they give is added to what the rank has of other keys."""
        rows, work = self.rows, self.part(shape)
        some = max(1, AT_ONCE // max(1, rows.repeats[0] * rows.repeats[1] * shape.q_len))
        found = []
        for row, key in zip(first_rows.split(some), first_keys.split(some), strict=True):
            at = row[:, None] + torch.arange(shape.q_len, device="cpu")
            # [batch, heads, pieces, rows] -> [pieces, batch, heads, rows]
            lo, hi, whole = (x[:, :, at].permute(2, 0, 1, 3) for x in (rows.lo, rows.hi, rows.whole))
            lo, hi = ((x - key[:, None, None, None]).clamp(0, shape.kv_len) for x in (lo, hi))
            seen = Rows(lo.flatten(0, 1), hi.flatten(0, 1), whole.flatten(0, 1))
            found.append(times_of(work, Pieces(shape, seen, len(row))))
        times = joined(found)
        if not joined_to:
            return times
        forward, backward = self.joining(shape)
        return replace(times, forward=times.forward + forward, backward=times.backward + backward)

    def joining(self, shape: Shape) -> tuple[float, float]:
        """Seconds in which the results of a call of this shape are added to others, by memory alone: out, and
        in the backward the gradients of q, k and v, all in fp32."""
        queries, keys = (
            shape.batch * heads * rows
            for heads, rows in ((shape.q_heads, shape.q_len), (shape.kv_heads, shape.kv_len))
        )
        gradients = queries * shape.head_dim + keys * (shape.head_dim + shape.value_dim)
        moved = queries * shape.value_dim * JOINED, gradients * ADDED
        return moved[0] / self.chip.memory_bytes, moved[1] / self.chip.memory_bytes


def trained(part: Request) -> Iterator[TrainedParameter]:
    """The parameters of scores that get a gradient from a part of a call: of each what the part reads."""
    assert part.place is not None
    for slot, modifier, parameter in parameter_slots(part):
        name, tensor = part.other_tensors[slot]
        if modifier >= len(part.similarity_scores.scores):
            parameter = place_parameter(parameter, part.place, part.shape)
        if tensor.requires_grad and tensor.numel():
            yield as_trained(name, parameter, tensor, part.shape)
