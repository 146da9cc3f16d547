"""RelativePosition: a learned number for each bucket of distances."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise_reference.scores as dense

from ..aligned import Aligned, check_align
from ..numerics import widen
from ..sequences import row_shift
from ..shape import PARAMETERS, Align, Shape, check_dtype
from .score import BoundScore, Parameter, Score, Twin


@triton.jit
def at_distance(batch, head, q_idx, kv_idx, args):
    """What a table holds for each pair; table_ptr: [q_heads, 2 · max_distance + 1], by key position - query
    position."""
    table_ptr, max_distance, shift_args = args
    distance = kv_idx - q_idx - row_shift(batch, shift_args)
    distance = tl.minimum(tl.maximum(distance, -max_distance), max_distance)
    row_ptr = table_ptr + head.to(tl.int64) * (2 * max_distance + 1) + max_distance
    return widen(tl.load(row_ptr + distance))


@triton.jit
def relative_score(s, batch, head, q_idx, kv_idx, args):
    return s + at_distance(batch, head, q_idx, kv_idx, args)


class RelativePosition(Aligned, Score):
    """s becomes s + table[head, bucket(key position - query position)], with the buckets of T5
    (arXiv 1910.10683): one a distance when near, logarithmic up to max_distance, one for all beyond.

    table: tensor [q_heads, buckets] (T5 checkpoints store its transpose). bidirectional: half of the buckets
    serve keys after the query; else those share the bucket of distance 0. `align` as in `Causal`.
    """

    FIELDS = ("table", "max_distance", "bidirectional", "align", "buckets")

    def __init__(
        self,
        table: torch.Tensor,
        max_distance: int = 128,
        bidirectional: bool = True,
        align: Align = None,
    ) -> None:
        check_align(align)
        check_dtype("table", table, PARAMETERS)
        if table.dim() != 2:
            raise ValueError(f"table.shape={tuple(table.shape)} must be [q_heads, buckets]")
        self.table, self.max_distance = table, max_distance
        self.bidirectional, self.align = bidirectional, align
        # Beyond max_distance the bucket stays the same, so one bucket a distance up to it says everything.
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = dense.t5_bucket(distances, table.shape[1], max_distance, bidirectional)
        self.buckets = buckets.to(table.device, torch.int32)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"table": self.table, **super().tensors(), "buckets": self.buckets}

    def misfits(self, shape: Shape) -> list[str]:
        found = super().misfits(shape)
        if self.table.shape[0] != shape.q_heads:
            given = tuple(self.table.shape)
            found.append(f"table.shape={given} must be [{shape.q_heads}, buckets], a row a query head")
        return found

    def bind(self, shape: Shape) -> BoundScore:
        by_distance = self.table.index_select(1, self.buckets).contiguous()
        return BoundScore(relative_score, (by_distance, self.max_distance, shape.shift_args(self.align)))

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        return {"table": Parameter(None, buckets=self.buckets, shift_args=shape.shift_args(self.align))}

    def twin(self, shape: Shape) -> Twin:
        return dense.relative_position(
            self.table, shape.q_len, shape.kv_len, self.max_distance, self.bidirectional, self.align
        )
