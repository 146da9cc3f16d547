"""How do programs share the rows and keys of a cache? A tile of rows has those of all heads of a group, and
the keys of a sequence may be split over programs: `own_group` and `keys_of_split` of walk.py, on the host.
"""

from __future__ import annotations

import torch

from ...kernels.call import Split
from ...kernels.tile import Tile
from ...parts.shape import ceil_div
from .coverage import NOTHING, Coverage, Rows, walk_over_keys
from .parts import Part, Parts


def grouped(part: Part) -> Part:
    """The part as the forward sees it: a head for each head of keys, with the rows of all heads of its group,
    those of a query one behind the other."""
    shape, rows = part.shape, part.rows

    def beside(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 1:
            return x.repeat_interleave(shape.group, 2)
        return x.unflatten(1, (shape.kv_heads, shape.group)).transpose(2, 3).flatten(2)

    alone = shape._replace(q_heads=shape.kv_heads, q_len=shape.q_len * shape.group)
    return Part(alone, Rows(beside(rows.lo), beside(rows.hi), beside(rows.whole), rows.unknown))


def split_of(part: Part, split: Split | None, tile_kv: int) -> tuple[int, int]:
    """The keys of a split of these sequences, and how many of their splits have any."""
    kv_len = part.shape.kv_len
    if split is None or kv_len == 0:
        return kv_len, min(1, kv_len)
    size = split.size or ceil_div(ceil_div(kv_len, split.programs), tile_kv) * tile_kv
    return size, ceil_div(kv_len, size)


def split_walk(parts: Parts, split: Split | None, tile: Tile) -> Coverage:
    """The tiles that the forward over a cache visits: splits that are no multiple of a tile share some."""
    found = NOTHING
    for part in parts:
        together = grouped(part)
        shape, rows = together.shape, together.rows
        if 0 in shape.scores:
            continue
        size, count = split_of(part, split, tile.tile_kv)
        first = torch.arange(count, device="cpu")[:, None, None, None] * size
        lo, hi = torch.maximum(rows.lo, first), torch.minimum(rows.hi, first + size)
        whole = rows.whole.expand(lo.shape)
        if split is not None and split.size:  # walked in order, so that every tile asks the mask
            whole = torch.zeros_like(whole)
        cut = Rows(lo.flatten(0, 1), hi.flatten(0, 1), whole.flatten(0, 1))
        each = walk_over_keys(cut, shape._replace(batch=count * shape.batch), tile.tile_q, tile.tile_kv)
        ends = (first[:, 0, 0, 0] + size).clamp(max=shape.kv_len)
        of_keys = int((-(-ends // tile.tile_kv) - first[:, 0, 0, 0] // tile.tile_kv).sum())
        total = of_keys * ceil_div(shape.q_len, tile.tile_q) * shape.batch * shape.q_heads
        found += Coverage(total, total - each.visited, each.masked, each.full)
    return found


def busy_programs(parts: Parts, split: Split | None, tile: Tile) -> int:
    """The programs that have rows and keys; of a sequence without keys those that write its zeros."""
    busy = 0
    for part in parts:
        shape = grouped(part).shape
        of_rows = shape.batch * shape.q_heads * ceil_div(shape.q_len, tile.tile_q)
        busy += of_rows * max(1, split_of(part, split, tile.tile_kv)[1])
    return busy
