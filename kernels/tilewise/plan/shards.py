"""How a call of DTensors is cut over a mesh of devices: along batch and heads, never along a sequence.

q, k and v say where: a dimension of the mesh over which one of them is sharded along batch (heads) is a
dimension over which the call is. Query heads are cut as PyTorch cuts them, in chunks, by one dimension of
the mesh after the other. Keys and values follow: each device needs the heads that its query heads attend
with. Where chunks of key heads are just these, they stay sharded; where heads are fewer than devices, or
chunks do not meet, each device has more of them and takes out its own.

Numbers alone, and the same on every rank; `agreed` alone sends something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..parts.dtensors import dim_of
from ..parts.masks.block_causal import BlockCausal
from ..parts.masks.causal import Causal
from ..parts.masks.neighborhood import Neighborhood
from ..parts.masks.window import Window
from ..parts.scores.softcap import Softcap

# The same for every sequence and head, where they hold no tensor.
ALIKE = (Causal, Window, BlockCausal, Neighborhood, Softcap)
BATCH, HEADS = 0, 1  # dimensions of q, k and v that a mesh may cut
Range = tuple[int, int]  # from the first to before the last


def agreed(seed: torch.Tensor, mesh: Any) -> torch.Tensor:
    """One number for all ranks of a mesh, that each has drawn one for: the largest."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    drawn = DTensor.from_local(seed, mesh, [Partial("max")] * mesh.ndim, run_check=False)
    return drawn.redistribute(placements=[Replicate()] * mesh.ndim).to_local()


class Shards(NamedTuple):
    """axes: for each dimension of the mesh, BATCH or HEADS where it cuts the call, None where its devices all
    compute the same. kept: along how many of those that cut heads, the first ones, k and v are sharded."""

    mesh: Any
    axes: tuple[int | None, ...]
    kept: int

    def dims(self, axis: int) -> tuple[int, ...]:
        """The dimensions of the mesh that cut along this axis."""
        return tuple([dim for dim, cut in enumerate(self.axes) if cut == axis])

    @property
    def kv_axes(self) -> tuple[int | None, ...]:
        """The axes of k and v."""
        whole = self.dims(HEADS)[self.kept :]
        return tuple([None if dim in whole else axis for dim, axis in enumerate(self.axes)])

    def range(self, axis: int, size: int, kept: int | None = None) -> Range:
        """What this rank has of so many sequences or heads; kept: cut by the first dimensions alone."""
        coordinate = self.mesh.get_coordinate()
        dims = self.dims(axis)[:kept]
        return chunk(size, [(self.mesh.size(dim), coordinate[dim]) for dim in dims])


def shards_of(q: Any, k: Any, v: Any) -> Shards:
    """q, k and v [batch, heads, length, dim] on one mesh, sharded along batch and heads alone. Where a
    dimension of the mesh cuts one of them along batch and another along heads, q decides, then k."""
    mesh = q.device_mesh
    axes: list[int | None] = []
    for placements in zip(q.placements, k.placements, v.placements, strict=True):
        given = [dim for dim in map(dim_of, placements) if dim is not None]
        axes.append(given[0] if given else None)
    counts = tuple([mesh.size(dim) for dim, axis in enumerate(axes) if axis == HEADS])
    return Shards(mesh, tuple(axes), kept_dims(q.shape[1], k.shape[1], counts))


def is_cut(q: Any, k: Any, v: Any) -> bool:
    """Whether some rank answers less than all."""
    shards = shards_of(q, k, v)
    return any([axis is not None and shards.mesh.size(dim) > 1 for dim, axis in enumerate(shards.axes)])


def asks_where(request: Any) -> bool:
    """Whether something in a request has numbers of its own for a sequence or a head."""
    leaves = [leaf for part in request.plugs for leaf in part.leaves()]
    alike = [type(leaf) in ALIKE and not leaf.tensors() for leaf in leaves]
    return request.dropout is not None or not all(alike)


def chunk(size: int, cuts: Sequence[tuple[int, int]]) -> Range:
    """What is left of `size` by cutting it in `count` chunks and taking one, again and again, each as large
    as the first but for the last ones (as `torch.chunk`, with empty ones behind)."""
    start, stop = 0, size
    for count, index in cuts:
        each = -(-(stop - start) // count)
        start, stop = min(start + index * each, stop), min(start + (index + 1) * each, stop)
    return start, stop


def chunks(size: int, counts: tuple[int, ...]) -> tuple[Range, ...]:
    """All of them."""
    found: list[Range] = [(0, size)]
    for count in counts:
        found = [
            (start + first, start + last)
            for start, stop in found
            for first, last in [chunk(stop - start, [(count, index)]) for index in range(count)]
        ]
    return tuple(found)


def needed(heads: Range, group: int) -> Range:
    """The key heads that these query heads attend with."""
    start, stop = heads
    return (start // group, -(-stop // group)) if start < stop else (0, 0)


def kept_dims(q_heads: int, kv_heads: int, counts: tuple[int, ...]) -> int:
    """By how many of these counts, one after the other, key heads can be cut so that every chunk has all that
    the query heads of its ranks need."""
    group = q_heads // kv_heads
    if kv_heads % math.prod(counts) == 0:
        return len(counts)
    for kept in range(len(counts), 0, -1):
        per = math.prod(counts[kept:])
        have = chunks(kv_heads, counts[:kept])
        want = [needed(heads, group) for heads in chunks(q_heads, counts)]
        if all(
            [a == b or (have[i // per][0] <= a and b <= have[i // per][1]) for i, (a, b) in enumerate(want)]
        ):
            return kept
    return 0


def heads_taken(heads: Range, group: int, first: int) -> list[int]:
    """Which of a rank's key heads, the first of which is number `first`, its query heads attend with, so that
    equally many query heads share each: one may be there several times."""
    start, stop = heads
    low, high = needed(heads, group)
    if high - low <= 1:
        return [low - first] * (high - low)
    step = math.gcd(start, stop, group)
    return [head // group - first for head in range(start, stop, step)]
