"""How many bytes does each method move? What `exchange` counts in a run, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....distributed.heads import key_heads
from ....parts.shape import Shape, computed_in
from .whole import Whole


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a call of this shape moves, in tensors of this dtype."""

    shape: Shape
    dtype: torch.dtype

    @staticmethod
    def of(whole: Whole) -> Sizes:
        return Sizes(whole.shape, whole.request.q.dtype)

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    @property
    def sums(self) -> int:
        """Bytes of a number of a sum that several ranks add to."""
        return computed_in(self.dtype).itemsize

    def keys(self, rows: int, element_bytes: int, kv_heads: int | None = None) -> int:
        """Of so many rows of k and v, or of their gradients."""
        heads = self.shape.kv_heads if kv_heads is None else kv_heads
        return self.shape.batch * heads * rows * (self.shape.head_dim + self.shape.value_dim) * element_bytes

    def queries(self, rows: int, dim: int, heads: int) -> int:
        """Of so many rows of q, out or a gradient of one, of so many heads."""
        return self.shape.batch * heads * rows * dim * self.element

    def statistics(self, rows: int, heads: int) -> int:
        """Of a number for each of so many rows, as lse is."""
        return self.shape.batch * heads * rows * self.sums


def heads_of_rank(shape: Shape, ranks: int) -> tuple[int, int]:
    """The heads of q and of k that a rank has where heads are divided; some of k may be on several ranks."""
    of_keys = key_heads(shape.q_heads, shape.kv_heads, ranks)
    return shape.q_heads // ranks, len(of_keys[0])


def why_not_heads(shape: Shape, ranks: int) -> str:
    """Why heads cannot be divided over so many ranks; empty if they can."""
    if shape.q_heads % ranks == 0:
        return ""
    return f"q has {shape.q_heads} heads, which {ranks} ranks cannot share evenly"


def by_ring(needed: torch.Tensor, chunk: int) -> torch.Tensor:
    """Bytes that travel from the rank of keys to that of queries, int64 [ranks of queries, ranks of keys].
    needed: how many chunks, as `Chunks.needed` gives them; chunk: the bytes of one."""
    return others(needed) * chunk


def others(needed: torch.Tensor) -> torch.Tensor:
    """Without the chunks that a rank has itself."""
    return needed - torch.diag(needed.diagonal())
