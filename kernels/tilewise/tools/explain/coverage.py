"""Which tiles does a call visit, and in how many of them is a mask asked? The kernels' own arithmetic
(`intervals.py`), on the host, for all tiles at once.

Nothing here grows with q_len · kv_len: the largest tensors have a number for each row of each head, and
where no mask tells heads apart, for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

from ...kernels.call import on_device_of
from ...parts.bounds import FIRST_KEY, Bounds
from ...parts.masks.mask import BoundMask, Mask
from ...parts.numerics import INTERPRETED
from ...parts.shape import Shape, ceil_div


@dataclass(frozen=True)
class Coverage:
    """Tiles of query-key pairs of all batches and heads: all there are; those that are never visited; those
    visited in which a mask is asked; those visited in which every pair counts."""

    total: int
    skipped: int
    masked: int
    full: int

    @property
    def visited(self) -> int:
        return self.masked + self.full

    @property
    def skipped_share(self) -> float:
        return self.skipped / self.total if self.total else 0.0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.total + other.total,
            self.skipped + other.skipped,
            self.masked + other.masked,
            self.full + other.full,
        )


NOTHING = Coverage(0, 0, 0, 0)


@dataclass(frozen=True)
class Rows:
    """What all masks together say of the rows, [batch or 1, q_heads or 1, q_len]: `intersect_intervals`.

    unknown: why each mask whose interval could not be evaluated counts as if it had none, and which others
    leave out tiles inside their intervals: the tiles counted as visited are those at most, and as full those
    at least.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    whole: torch.Tensor
    unknown: tuple[str, ...] = ()

    @property
    def repeats(self) -> tuple[int, int]:
        """The sizes of the first two dimensions."""
        return self.lo.shape[0], self.lo.shape[1]


def has_contents(tensor: torch.Tensor) -> bool:
    """Whether there are numbers behind a tensor, not a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


# A mask's interval in a call of that shape; None if it has none; or why it cannot be evaluated here.
Interval = Callable[[Mask, Shape], "Bounds | str | None"]


def interval_of(mask: Mask, shape: Shape) -> Bounds | str | None:
    """The interval of a mask in a dense call."""
    return interval_by(mask, mask.bind(shape), shape, lambda: mask.bounds(shape))


def interval_by(
    mask: Mask,
    bound: BoundMask,
    shape: Shape,
    bounds: Callable[[], Bounds | None],
    sequences: torch.Tensor | None = None,
) -> Bounds | str | None:
    """The same by `bounds`, or where that is None by the device function; sequences: which of a packed call
    the batch of `shape` is."""
    name, tensors = type(mask).__name__, list(mask.tensors().values())
    if bound.interval is None:
        return None
    if not all(has_contents(x) for x in tensors):
        return f"{name}: its tensors have no contents here"
    found = bounds()
    if found is not None:
        return found
    device = tensors[0].device if tensors else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if INTERPRETED or device.type == "cuda":
        return evaluate(bound, shape, torch.device("cpu") if INTERPRETED else device, sequences)
    return f"{name}: its interval is a kernel's function, which cannot run here without TRITON_INTERPRET=1"


def rows_of(masks: Iterable[Mask], shape: Shape, interval: Interval = interval_of) -> Rows:
    """lo ≥ 0, hi ≤ kv_len and whole of every row; hi ≤ lo where a row sees no key."""
    lo, hi = FIRST_KEY.expand(1, 1, shape.q_len), FIRST_KEY.expand(1, 1, shape.q_len) + shape.kv_len
    whole = torch.ones(1, 1, shape.q_len, dtype=torch.bool, device="cpu")
    unknown = []
    for mask in masks:
        found = interval(mask, shape)
        if isinstance(found, Bounds):
            lo, hi = torch.maximum(lo, found.lo), torch.minimum(hi, found.hi)
            whole = whole & found.whole
            if mask.has_holes:
                unknown.append(f"{type(mask).__name__}: the device lists the tiles that it leaves out")
        else:
            whole = torch.zeros_like(whole)
            if found is not None:
                unknown.append(found)
    sizes = torch.broadcast_shapes(lo.shape, hi.shape, whole.shape)
    return Rows(lo.expand(sizes), hi.expand(sizes), whole.expand(sizes), tuple(unknown))


@triton.jit
def interval_kernel(  # type: ignore[no-untyped-def]
    found_ptr, sequences_ptr, q_heads, q_len, args, INTERVAL: tl.constexpr, TILE_Q: tl.constexpr
):
    """lo, hi and whole of a tile of rows, found [batch, q_heads, 3, q_len]. sequences [batch]: those that are
    asked about; None: 0, 1, ..."""
    q_tiles = tl.cdiv(q_len, TILE_Q)
    program = tl.program_id(0)
    head, batch = program // q_tiles % q_heads, program // q_tiles // q_heads
    q_idx = program % q_tiles * TILE_Q + tl.arange(0, TILE_Q)
    row = tl.minimum(q_idx, q_len - 1)
    sequence = batch
    if sequences_ptr is not None:
        sequence = tl.load(sequences_ptr + batch)
    lo, hi, whole = INTERVAL(row, sequence, head, args)
    found_ptr += (batch.to(tl.int64) * q_heads + head) * 3 * q_len
    zeros, valid = row * 0, q_idx < q_len
    tl.store(found_ptr + q_idx, zeros + lo, mask=valid)
    tl.store(found_ptr + q_len + q_idx, zeros + hi, mask=valid)
    tl.store(found_ptr + 2 * q_len + q_idx, zeros + whole.to(tl.int32), mask=valid)


def evaluate(
    bound: BoundMask, shape: Shape, device: torch.device, sequences: torch.Tensor | None = None
) -> Bounds:
    """The interval of every row, asked of its device function. sequences: those of a packed call, which
    `bound` is bound to, that the batch of `shape` is."""
    found = torch.zeros(shape.batch, shape.q_heads, 3, shape.q_len, dtype=torch.int32, device=device)
    if found.numel():
        grid = (ceil_div(shape.q_len, 128) * shape.q_heads * shape.batch,)
        with on_device_of(found):
            interval_kernel[grid](
                found,
                None if sequences is None else sequences.to(device, torch.int32),
                shape.q_heads,
                shape.q_len,
                bound.args,
                INTERVAL=bound.interval,
                TILE_Q=128,
                enable_fp_fusion=True,
            )
    lo, hi, whole = found.to("cpu", torch.int64).unbind(2)
    return Bounds(lo, hi, whole != 0)


# ---- Tiles of rows, and what they visit


def by_tile(rows: torch.Tensor, tile_q: int) -> torch.Tensor:
    """[batch, q_heads, q_len] as [batch, q_heads, q_tiles, tile_q]; behind the last row stands its like."""
    *lead, q_len = rows.shape
    missing = ceil_div(q_len, tile_q) * tile_q - q_len
    filled = torch.cat([rows, rows[..., -1:].expand(*lead, missing)], -1) if missing else rows
    return filled.reshape(*lead, -1, tile_q)


@dataclass(frozen=True)
class Ranges:
    """The keys start..stop that each tile of rows visits, and those full_start..full_stop that all its rows
    see: `store_range` without its exception for the last tile. [batch or 1, q_heads or 1, q_tiles]."""

    start: torch.Tensor
    stop: torch.Tensor
    full_start: torch.Tensor
    full_stop: torch.Tensor


def ranges_of(rows: Rows, shape: Shape, tile_q: int) -> Ranges:
    lo, hi, whole = (by_tile(x, tile_q) for x in (rows.lo, rows.hi, rows.whole))
    sees = lo < hi
    return Ranges(
        start=torch.where(sees, lo, shape.kv_len).amin(3),
        stop=torch.where(sees, hi, 0).amax(3),
        full_start=lo.amax(3),
        full_stop=torch.where(whole, hi, 0).amin(3),
    )


@dataclass(frozen=True)
class KeyTiles:
    """`kv_range`: the tiles of keys first..last that each tile of rows visits, of which full_first..full_last
    need no mask; without any such tile, full_first = full_last = last. [batch or 1, q_heads or 1, q_tiles]
    """

    first: torch.Tensor
    full_first: torch.Tensor
    full_last: torch.Tensor
    last: torch.Tensor

    def states(self, kv_tiles: int) -> torch.Tensor:
        """Every tile's state, an index into STATES: uint8 [batch or 1, q_heads or 1, q_tiles, kv_tiles]."""
        tile = torch.arange(kv_tiles, device="cpu")
        first, full_first, full_last, last = (
            x[..., None] for x in (self.first, self.full_first, self.full_last, self.last)
        )
        visited, full = (first <= tile) & (tile < last), (full_first <= tile) & (tile < full_last)
        return visited.to(torch.uint8) + full.to(torch.uint8)


STATES = ("skipped", "cut", "full")  # never visited; visited, and a mask is asked; every pair counts


def key_tiles(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> KeyTiles:
    """What the forward and dQ's pass visit, by tiles of rows."""
    if 0 in shape.scores:
        none = torch.zeros(*rows.repeats, ceil_div(shape.q_len, tile_q), dtype=torch.int64, device="cpu")
        return KeyTiles(none, none, none, none)
    ranges = ranges_of(rows, shape, tile_q)
    first = ranges.start // tile_kv
    last = torch.maximum(-(-ranges.stop // tile_kv), first)
    full_first = torch.maximum(-(-ranges.full_start // tile_kv), first)
    full_last = torch.minimum(ranges.full_stop // tile_kv, last)
    none_full = full_last <= full_first
    return KeyTiles(
        first, torch.where(none_full, last, full_first), torch.where(none_full, last, full_last), last
    )


def tile_states(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> torch.Tensor:
    """The state of every tile in the forward, as `KeyTiles.states` gives it; for a head that `rows` does not
    tell apart, ask for index 0. `walk_over_keys` counts these. It has an element a tile, so it grows with
    q_len · kv_len / (tile_q · tile_kv)."""
    return key_tiles(rows, shape, tile_q, tile_kv).states(ceil_div(shape.kv_len, tile_kv))


class Visits(NamedTuple):
    """Tiles that are visited, and those of them in which every pair counts, of each batch and head that rows
    tell apart: int64 [batch or 1, q_heads or 1]."""

    visited: torch.Tensor
    full: torch.Tensor


def over_keys(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Visits:
    """What the forward and dQ's pass visit: `kv_range` of every tile of rows."""
    found = key_tiles(rows, shape, tile_q, tile_kv)
    return Visits((found.last - found.first).sum(2), (found.full_last - found.full_first).sum(2))


def over_rows(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Visits:
    """What dK's and dV's pass visits: `q_range` of every tile of keys, from the first tile of rows that
    visits it to the last; the first run of those in which every pair counts needs no mask."""
    visited, full = (torch.zeros(rows.repeats, dtype=torch.int64, device="cpu") for _ in range(2))
    if 0 in shape.scores:
        return Visits(visited, full)
    ranges = ranges_of(rows, shape, tile_q)
    q_tiles, kv_tiles = ceil_div(shape.q_len, tile_q), ceil_div(shape.kv_len, tile_kv)
    full_stop = ranges.full_stop.clone()
    if shape.q_len % tile_q:  # rows beyond q_len must be masked
        full_stop[..., -1] = 0
    index = torch.arange(q_tiles, device="cpu")[:, None]
    for chunk in torch.arange(kv_tiles, device="cpu").split(tile_q):  # as many numbers as there are rows
        begin = chunk * tile_kv  # [chunk], against [batch, q_heads, q_tiles, 1]
        visits = (ranges.start[..., None] < begin + tile_kv) & (ranges.stop[..., None] > begin)
        is_full = (ranges.full_start[..., None] <= begin) & (full_stop[..., None] >= begin + tile_kv)
        first = torch.where(visits, index, q_tiles).amin(2, keepdim=True)
        last = torch.where(visits, index + 1, 0).amax(2, keepdim=True)
        full_first = torch.where(is_full, index, q_tiles).amin(2, keepdim=True)
        ends = (index >= full_first) & ~is_full
        full_last = torch.minimum(torch.where(ends, index, q_tiles).amin(2, keepdim=True), last)
        visited += (last - first).clamp(min=0).sum((2, 3))
        full += (full_last - full_first).clamp(min=0).sum((2, 3))
    return Visits(visited, full)


def of_a_parameter(rows: Rows, shape: Shape, tile: int) -> Visits:
    """What the gradient of a score's parameter visits; it masks them all."""
    visited, full = over_keys(rows, shape, tile, tile)
    return Visits(visited, torch.zeros_like(full))


def walk_over_keys(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Coverage:
    return coverage(rows, shape, (tile_q, tile_kv), over_keys(rows, shape, tile_q, tile_kv))


def walk_over_rows(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Coverage:
    return coverage(rows, shape, (tile_q, tile_kv), over_rows(rows, shape, tile_q, tile_kv))


def walk_of_a_parameter(rows: Rows, shape: Shape, tile: int) -> Coverage:
    return coverage(rows, shape, (tile, tile), of_a_parameter(rows, shape, tile))


def coverage(rows: Rows, shape: Shape, tile: tuple[int, int], visits: Visits) -> Coverage:
    """Counts of the heads that `rows` tells apart, as those of all heads."""
    alike = shape.batch // rows.repeats[0] * (shape.q_heads // rows.repeats[1])
    visited, full = (int(each.sum()) * alike for each in visits)
    return coverage_of(shape, tile, visited, full)


def coverage_of(shape: Shape, tile: tuple[int, int], visited: int, full: int) -> Coverage:
    """The same of counts of all heads."""
    if 0 in shape.scores:
        return NOTHING
    total = ceil_div(shape.q_len, tile[0]) * ceil_div(shape.kv_len, tile[1]) * shape.batch * shape.q_heads
    return Coverage(total, total - visited, visited - full, full)


# ---- Pairs and keys


def pairs_that_count(rows: Rows, shape: Shape) -> int:
    """The pairs inside the rows' intervals, of all batches and heads. A mask that decides pair by pair may
    leave out more of them; no tile becomes smaller by that."""
    if 0 in shape.scores:
        return 0
    alike = shape.batch // rows.repeats[0] * (shape.q_heads // rows.repeats[1])
    return int(pairs_of_each(rows, shape).sum()) * alike


def pairs_of_each(rows: Rows, shape: Shape) -> torch.Tensor:
    """The same of each batch and head that rows tell apart, [batch or 1, q_heads or 1]."""
    return (rows.hi - rows.lo).clamp(min=0).sum(2)


def keys_that_are_seen(rows: Rows, shape: Shape) -> int:
    """Keys between the first and the last that some row sees, summed over batches and kv heads."""
    if 0 in shape.scores:
        return 0
    found = keys_of_each(rows, shape)
    alike = shape.batch // rows.repeats[0] * (shape.kv_heads // found.shape[1])
    return int(found.sum()) * alike


def keys_of_each(rows: Rows, shape: Shape) -> torch.Tensor:
    """The same of each batch and head of keys that rows tell apart, [batch or 1, kv_heads or 1]."""
    sees = rows.lo < rows.hi
    start = torch.where(sees, rows.lo, shape.kv_len).amin(2)  # [batch or 1, q_heads or 1]
    stop = torch.where(sees, rows.hi, 0).amax(2)
    if rows.repeats[1] > 1:
        grouped = (rows.repeats[0], shape.kv_heads, shape.group)
        start, stop = start.reshape(grouped).amin(2), stop.reshape(grouped).amax(2)
    return (stop - start).clamp(min=0)
