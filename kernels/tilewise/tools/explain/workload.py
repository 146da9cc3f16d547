"""What does each kernel of a call have to do? Programs, tiles, FLOPs, exponentials, bytes and memory.

FLOPs       of the matmuls: those of the pairs that count, and those that are executed, on whole tiles and
            on dimensions that are rounded up: pieces.py
bytes       the least traffic with the GPU's memory: everything read once and written once
memory      what a call allocates beside its arguments
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...kernels.backward import sums_of
from ...kernels.call import Split, power_of_two_tile, programs, tile_count
from ...kernels.combine import TILE_ROWS as COMBINED_ROWS
from ...kernels.forward import rows_programs as programs_over_rows
from ...kernels.hopper.limits import HOPPER_COLUMNS, hopper_pieces
from ...kernels.tile import Pass, Tile
from ...parts.fp8 import NARROWEST_FP8
from ...parts.pieces import NARROWEST, padded_columns, pieces_of
from ...parts.shape import Shape, ceil_div
from ...plan.passes import split_keys
from ...plan.tiles import square_tile, widest
from ..chips import Chip
from .coverage import (
    Coverage,
    Rows,
    Visits,
    coverage,
    keys_that_are_seen,
    over_keys,
    pairs_that_count,
    ranges_of,
    walk_of_a_parameter,
    walk_over_keys,
    walk_over_rows,
)
from .limits import Limits, limits_of
from .parts import Parts
from .splits import busy_programs, split_walk

TileChoice = Callable[[int, Pass], tuple[Tile, str]]  # of bytes an element and a pass: a tile, and whence
STATISTIC = 4  # bytes of a number that is kept for each row, in fp32


@dataclass(frozen=True)
class Extra:
    """A tensor besides q, k and v that the kernels read."""

    name: str
    stored_bytes: int
    every_pair: bool  # it is read along with the pairs: as much of it as there are tiles visited
    pairs: int = 0  # then: how many pairs of all batches and heads it has, or broadcasts to


@dataclass(frozen=True)
class TrainedParameter:
    """A tensor whose gradient is a kernel of its own."""

    name: str
    bytes: int
    programs: Callable[[int], int]  # of the side of a square tile
    sums: Callable[[int], tuple[int, bool]]  # bytes that its programs write, and whether that is the gradient


@dataclass(frozen=True)
class Allocation:
    """Memory that a call asks for."""

    name: str
    bytes: int
    kept: str  # "result", "for the backward", "during the call", "during the backward"


@dataclass(frozen=True)
class Workload:
    """A call as the model sees it. Suggestions change a field and ask again."""

    shape: Shape
    chip: Chip
    parts: Parts  # what masks leave to do
    choose: TileChoice
    element_bytes: int
    precision: str  # "ieee" or "tf32", of fp32 operands
    training: bool
    return_lse: bool
    extras: tuple[Extra, ...] = ()
    parameters: tuple[TrainedParameter, ...] = ()
    computed: tuple[Allocation, ...] = ()  # what masks and scores compute for the kernels, at each call
    # Exponentials a pair beside that of the softmax: in the scores, and in their derivative.
    of_scores: int = 0
    of_derivatives: int = 0
    is_hopper: bool = False  # the forward is Hopper's
    walks: int = 2  # of the portable backward
    is_hopper_backward: bool = False  # the backward is Hopper's, as the forward
    has_holes: bool = False  # walks are over lists of tiles
    out_element_bytes: int | None = None  # where out has not the dtype of q, k and v, which are fp8

    @property
    def out_bytes(self) -> int:
        """Of out: of the forward's alone, for fp8 has no backward."""
        size = self.out_element_bytes or self.element_bytes
        return row_count(self.shape) * self.shape.value_dim * size

    @property
    def columns_of_q(self) -> int:
        """Those of q and k as the portable kernels multiply them."""
        narrowest = NARROWEST_FP8 if self.element_bytes == 1 else NARROWEST
        return sum(pieces_of(self.shape.head_dim, narrowest))

    @property
    def over_rows(self) -> Pass:
        """The pass that walks over rows, whose tiles of rows are the whole backward's."""
        if self.is_hopper_backward:
            return "hopper_backward"
        return "dqkv" if self.walks == 1 else "dkv"

    def split(self) -> Split | None:
        """How the keys of a cache are split over programs."""
        tile, _ = self.choose(self.element_bytes, "forward")
        return split_keys(self.shape, tile, self.chip.multiprocessors)


@dataclass(frozen=True)
class Kernel:
    """One launch, and what it has to do."""

    name: str
    tile: Tile  # of prepare the rows alone
    tile_from: str
    programs: int
    busy: int  # programs with rows and keys: packed sequences (sequences.py) and splits leave some without
    waves: float  # of those, for each multiprocessor
    tiles: Coverage | None  # None: it walks over no keys
    flops: int
    executed_flops: int
    exponentials: int
    bytes: int
    limits: Limits

    @property
    def intensity(self) -> float:
        """FLOPs of the pairs that count for each byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0


def kernels_of(work: Workload) -> tuple[Kernel, ...]:
    """The launches of a call, in order."""
    kernels = [hopper_forward(work) if work.is_hopper else forward(work)]
    if (split := work.split()) is not None:
        kernels.append(combine(work, split))
    if work.training:
        kernels.append(prepare(work))
        if work.is_hopper_backward:
            kernels += [hopper_backward(work), finish_dq(work)]
        else:
            kernels += [dqkv(work), finish_dq(work)] if work.walks == 1 else [dq(work), *dkv(work)]
        kernels += [gradient(work, parameter) for parameter in work.parameters]
    return tuple(kernels)


def seconds(work: Workload) -> float:
    """The least time of all launches, one after another."""
    return sum(kernel.limits.overlapped for kernel in kernels_of(work))


# ---- Traffic, in bytes


def row_count(shape: Shape) -> int:
    """The rows of all heads of q; packed sequences lie in one tensor."""
    return shape.blocks * shape.q_heads * shape.q_len


def key_count(shape: Shape) -> int:
    return shape.blocks * shape.kv_heads * shape.kv_len


def rows_bytes(work: Workload, columns: int) -> int:
    """Of a tensor [batch, q_heads, q_len, columns] in the call's dtype: q, out and their gradients."""
    return row_count(work.shape) * columns * work.element_bytes


def seen_bytes(work: Workload) -> int:
    """Of the keys and values that some row sees."""
    columns = work.shape.head_dim + work.shape.value_dim
    return work.parts.counted(keys_that_are_seen) * columns * work.element_bytes


def all_keys_bytes(work: Workload) -> int:
    """Of k and v, or of their gradients."""
    return key_count(work.shape) * (work.shape.head_dim + work.shape.value_dim) * work.element_bytes


def statistics_bytes(work: Workload, count: int) -> int:
    return row_count(work.shape) * count * STATISTIC


def extra_bytes(work: Workload, tiles: Coverage, tile: Tile) -> int:
    """Of the other tensors; of those with a number for every pair, what the visited tiles cover."""
    covered = tiles.visited * tile.tile_q * tile.tile_kv

    def share(x: Extra) -> float:
        if not x.every_pair:
            return 1.0
        return min(1.0, covered / x.pairs) if x.pairs else 0.0

    return round(sum(x.stored_bytes * share(x) for x in work.extras))


# ---- Kernels


def walk(
    work: Workload, name: str, tile: tuple[Tile, str], programs: tuple[int, int], tiles: Coverage,
    dims: tuple[int, int], exponentials: int, moved: int, columns: Callable[[int], int] | None = None,
) -> Kernel:  # fmt: skip
    """A kernel that visits tiles of pairs. programs: all, and those that have a tile; dims: how many products
    over head_dim and over value_dim it makes of each; exponentials: of each pair; columns: of a tile, by
    the dimension, where they are not the portable kernels'."""
    shape, (chosen, tile_from), (started, busy) = work.shape, tile, programs
    of_head, of_value = dims
    executed = tiles.visited * chosen.tile_q * chosen.tile_kv
    of_q, of_v = work.columns_of_q, padded_columns(shape.value_dim)
    if columns is not None:
        of_q, of_v = columns(shape.head_dim), columns(shape.value_dim)
    padded = of_head * of_q + of_value * of_v
    flops = 2 * executed * padded
    wanted = of_head * shape.head_dim + of_value * shape.value_dim
    return Kernel(
        name, chosen, tile_from, started, busy, busy / work.chip.multiprocessors, tiles,
        flops=2 * work.parts.counted(pairs_that_count) * wanted,
        executed_flops=flops,
        exponentials=exponentials * executed,
        bytes=moved,
        limits=limits_of(
            work.chip, busy, flops, exponentials * executed, moved, work.element_bytes, work.precision
        ),
    )  # fmt: skip


def rows_programs(work: Workload, tile_q: int) -> tuple[int, int]:
    """The programs that own a tile of rows, as the launch counts them, and those of them that have one."""
    shape = work.shape
    busy = work.parts.tiles_of_rows(tile_q) * shape.q_heads
    return programs(shape, shape.q_len, tile_q, shape.q_heads), busy


def keys_programs(work: Workload, tile_kv: int) -> tuple[int, int]:
    """The same for tiles of keys."""
    shape = work.shape
    busy = work.parts.tiles_of_keys(tile_kv) * shape.kv_heads
    return programs(shape, shape.kv_len, tile_kv, shape.kv_heads), busy


def hopper_columns(dim: int) -> int:
    """The columns of a tile of Hopper's forward."""
    return sum(hopper_pieces(dim))


def forward(work: Workload) -> Kernel:
    """S = scores(Q Kᵀ), O = P V."""
    tile, tile_from = work.choose(work.element_bytes, "forward")
    if work.shape.cache is not None:
        return cached_forward(work, tile, tile_from)
    tiles = work.parts.covered(walk_over_keys, tile.tile_q, tile.tile_kv)
    return walk(
        work, "forward", (tile, tile_from), rows_programs(work, tile.tile_q), tiles, (1, 1),
        1 + work.of_scores, forward_bytes(work, tiles, tile),
    )  # fmt: skip


def cached_forward(work: Workload, tile: Tile, tile_from: str) -> Kernel:
    """The same over a cache. With splits each writes an O of its own, in fp32, and the LSE of its rows."""
    shape, split = work.shape, work.split()
    tiles = split_walk(work.parts, split, tile)
    started = programs_over_rows(shape, True, tile.tile_q) * (1 if split is None else split.programs)
    moved = forward_bytes(work, tiles, tile)
    if split is not None:
        written = work.out_bytes + statistics_bytes(work, int(work.return_lse))
        moved += split_bytes(work, split) - written
    return walk(
        work, "forward", (tile, tile_from), (started, busy_programs(work.parts, split, tile)), tiles, (1, 1),
        1 + work.of_scores, moved,
    )  # fmt: skip


def combine(work: Workload, split: Split) -> Kernel:
    """The merge of all splits: no matmul, and two exponentials for each split of a row."""
    rows = row_count(work.shape)
    programs, exponentials = ceil_div(rows, COMBINED_ROWS), 2 * split.programs * rows
    moved = split_bytes(work, split) + work.out_bytes
    moved += statistics_bytes(work, int(work.return_lse))
    return Kernel(
        "combine", Tile(COMBINED_ROWS, COMBINED_ROWS), "the kernel's own", programs, programs,
        programs / work.chip.multiprocessors, None, 0, 0, exponentials, moved,
        limits_of(work.chip, programs, 0, exponentials, moved, work.element_bytes, work.precision),
    )  # fmt: skip


def split_bytes(work: Workload, split: Split) -> int:
    """Of O and LSE of every split."""
    return split.programs * row_count(work.shape) * (work.shape.value_dim + 1) * STATISTIC


def hopper_forward(work: Workload) -> Kernel:
    """The same by programs that stay, one on each multiprocessor, and take one tile of rows after another."""
    tile, tile_from = work.choose(work.element_bytes, "hopper")
    tiles = work.parts.covered(hopper_walk, tile.tile_q, tile.tile_kv)
    staying = min(work.chip.multiprocessors, rows_programs(work, tile.tile_q)[0])
    return walk(
        work, "hopper forward", (tile, tile_from), (staying, staying), tiles, (1, 1),
        1 + work.of_scores, forward_bytes(work, tiles, tile), hopper_columns,
    )  # fmt: skip


def hopper_over_keys(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Visits:
    """As every walk over keys; but a tile of rows that sees no key visits one tile, and masks it out."""
    visited, full = over_keys(rows, shape, tile_q, tile_kv)
    if 0 in shape.scores:
        return Visits(visited, full)
    ranges = ranges_of(rows, shape, tile_q)
    return Visits(visited + (ranges.stop <= ranges.start).sum(2), full)


def hopper_walk(rows: Rows, shape: Shape, tile_q: int, tile_kv: int) -> Coverage:
    return coverage(rows, shape, (tile_q, tile_kv), hopper_over_keys(rows, shape, tile_q, tile_kv))


def forward_bytes(work: Workload, tiles: Coverage, tile: Tile) -> int:
    """q, out, what some row sees of k and v, the other tensors, and what is kept of each row."""
    shape = work.shape
    kept = 3 if work.training else int(work.return_lse)  # lse and two statistics
    moved = rows_bytes(work, shape.head_dim) + work.out_bytes + seen_bytes(work)
    return moved + extra_bytes(work, tiles, tile) + statistics_bytes(work, kept)


def prepare(work: Workload) -> Kernel:
    """delta = Σ_d dO · O, and the range of keys of every tile of rows: no matmul."""
    tile, tile_from = work.choose(work.element_bytes, work.over_rows)
    started, busy = rows_programs(work, tile.tile_q)
    moved = 2 * rows_bytes(work, work.shape.value_dim) + statistics_bytes(work, 2) + 16 * started
    return Kernel(
        "prepare", tile, tile_from, started, busy,
        busy / work.chip.multiprocessors, None, 0, 0, 0, moved,
        limits_of(work.chip, busy, 0, 0, moved, work.element_bytes, work.precision),
    )  # fmt: skip


def backward_reads(work: Workload, tiles: Coverage, tile: Tile) -> int:
    """q, dO, what some row sees of k and v, three statistics, and the other tensors."""
    shape = work.shape
    moved = rows_bytes(work, shape.head_dim + shape.value_dim) + seen_bytes(work)
    return moved + statistics_bytes(work, 3) + extra_bytes(work, tiles, tile)


def dq(work: Workload) -> Kernel:
    """S = scores(Q Kᵀ), dP = dO Vᵀ, dQ = dS K."""
    tile, tile_from = work.choose(work.element_bytes, "dq")
    tiles = work.parts.covered(walk_over_keys, tile.tile_q, tile.tile_kv)
    moved = backward_reads(work, tiles, tile) + rows_bytes(work, work.shape.head_dim)
    return walk(
        work, "dq", (tile, tile_from), rows_programs(work, tile.tile_q), tiles, (2, 1),
        1 + work.of_scores + work.of_derivatives, moved,
    )  # fmt: skip


def dkv(work: Workload) -> list[Kernel]:
    """Sᵀ = scores(K Qᵀ), dV = Pᵀ dO, dPᵀ = V dOᵀ, dK = dSᵀ Q; or S and dK and then, once more, S and dV."""
    tile, tile_from = work.choose(work.element_bytes, "dkv")
    tiles = work.parts.covered(walk_over_rows, tile.tile_q, tile.tile_kv)
    reads, shape = backward_reads(work, tiles, tile), work.shape
    dk, dv = (key_count(shape) * dim * work.element_bytes for dim in (shape.head_dim, shape.value_dim))
    kinds = {"dkv": ((2, 2), True, dk + dv), "dk": ((2, 1), True, dk), "dv": ((1, 1), False, dv)}
    found = []
    for name in sums_of(shape.head_dim, shape.value_dim, work.element_bytes):
        products, derives, written = kinds[name]
        found.append(
            walk(
                work, name, (tile, tile_from), keys_programs(work, tile.tile_kv), tiles, products,
                1 + work.of_scores + work.of_derivatives * derives, reads + written,
            )
        )  # fmt: skip
    return found


def dqkv(work: Workload) -> Kernel:
    """The same, and dQ = dS K in memory. Additions are the L2 cache's to bear: of them only the sums count
    here, cleared, read and written once."""
    return one_walk(work, "dqkv")


def hopper_backward(work: Workload) -> Kernel:
    """The same by Hopper's kernel, whose tiles have as many columns as the wider of head and value, in one
    piece."""
    columns = max(HOPPER_COLUMNS, power_of_two_tile(max(work.shape.head_dim, work.shape.value_dim)))
    return one_walk(work, "hopper backward", lambda _: columns)


def one_walk(work: Workload, name: str, columns: Callable[[int], int] | None = None) -> Kernel:
    tile, tile_from = work.choose(work.element_bytes, work.over_rows)
    tiles = work.parts.covered(walk_over_rows, tile.tile_q, tile.tile_kv)
    moved = backward_reads(work, tiles, tile) + all_keys_bytes(work) + 3 * sums_bytes(work)
    return walk(
        work, name, (tile, tile_from), keys_programs(work, tile.tile_kv), tiles, (3, 2),
        1 + work.of_scores + work.of_derivatives, moved, columns,
    )  # fmt: skip


def sums_bytes(work: Workload) -> int:
    """Of dQ's sums in fp32, a block for every tile of rows."""
    shape, tile_q = work.shape, work.choose(work.element_bytes, work.over_rows)[0].tile_q
    return 4 * shape.blocks * shape.q_heads * tile_count(shape, shape.q_len, tile_q) * tile_q * shape.head_dim


def finish_dq(work: Workload) -> Kernel:
    """dQ of its sums: no matmul."""
    tile, tile_from = work.choose(work.element_bytes, work.over_rows)
    started, busy = rows_programs(work, tile.tile_q)
    moved = sums_bytes(work) + 2 * rows_bytes(work, work.shape.head_dim)
    return Kernel(
        "finish dq", tile, tile_from, started, busy,
        busy / work.chip.multiprocessors, None, 0, 0, 0, moved,
        limits_of(work.chip, busy, 0, 0, moved, work.element_bytes, work.precision),
    )  # fmt: skip


def parameters_tile(work: Workload) -> tuple[Tile, str]:
    """That of the parameters' gradients, and where it comes from."""
    chosen, tile_from = work.choose(work.element_bytes, "dqkv" if work.over_rows == "dqkv" else "dkv")
    return square_tile(chosen, widest(work.shape)), tile_from


def gradient(work: Workload, parameter: TrainedParameter) -> Kernel:
    """S = scores(Q Kᵀ) and dP = dO Vᵀ once more, and the sum of dS over the pairs that read an element."""
    tile, tile_from = parameters_tile(work)
    tiles = work.parts.covered(walk_of_a_parameter, tile.tile_q)
    started = parameter.programs(tile.tile_q)
    moved = backward_reads(work, tiles, tile) + parameter.sums(tile.tile_q)[0]
    return walk(
        work, f"gradient of {parameter.name}", (tile, tile_from), (started, started), tiles, (1, 1),
        1 + work.of_scores + work.of_derivatives, moved,
    )  # fmt: skip
