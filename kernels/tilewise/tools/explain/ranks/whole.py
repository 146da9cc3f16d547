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

AT_ONCE = 1 << 22  # rows that are counted together, of all heads that differ


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

    def times(self, shape: Shape, chunks: torch.Tensor, starts: torch.Tensor) -> Times:
        """Of calls of this shape, one for each of `chunks` of shape.q_len rows of queries, against the
        shape.kv_len keys from that of `starts` on."""
        rows, work = self.rows, self.part(shape)
        batch, heads = rows.repeats
        found = []
        for some in torch.arange(len(chunks), device="cpu").split(
            max(1, AT_ONCE // max(1, batch * heads * shape.q_len))
        ):
            start = starts[some, None, None, None]

            def cut(x: torch.Tensor, some: torch.Tensor = some) -> torch.Tensor:
                """[batch, heads, rows] -> [pieces, batch, heads, rows of a piece]"""
                return x.unflatten(2, (-1, shape.q_len))[:, :, chunks[some]].permute(2, 0, 1, 3)

            lo, hi = ((cut(x) - start).clamp(0, shape.kv_len) for x in (rows.lo, rows.hi))
            seen = Rows(*(x.flatten(0, 1) for x in (lo, hi, cut(rows.whole))))
            found.append(times_of(work, Pieces(shape, seen, len(some))))
        return joined(found)


def trained(part: Request) -> Iterator[TrainedParameter]:
    """The parameters of scores that get a gradient from a part of a call: of each what the part reads."""
    assert part.place is not None
    for slot, modifier, parameter in parameter_slots(part):
        name, tensor = part.other_tensors[slot]
        if modifier >= len(part.similarity_scores.scores):
            parameter = place_parameter(parameter, part.place, part.shape)
        if tensor.requires_grad and tensor.numel():
            yield as_trained(name, parameter, tensor, part.shape)
