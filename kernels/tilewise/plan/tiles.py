"""Which tile does a call get? A table with its evidence, a rule for what it leaves out, and a check of fit.

A tile is chosen on the host, before the launch, from the architecture, the dimensions and the dtype. The rows
that ship are in `tile_table.json`; those that the user tuned on this GPU go first (`user_tiles.py`). Nothing
is timed inside a user's call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..kernels.hopper.limits import HOPPER_COLUMNS, hopper_pieces
from ..kernels.room import family, fits, out_fits_q
from ..kernels.tile import HOPPER_PASSES, PASSES, HopperTile, hopper_backward_tile
from ..kernels.tile import Pass as Pass
from ..kernels.tile import Tile as Tile
from ..parts.numerics import INTERPRETED
from ..parts.pieces import NARROWEST, WIDE
from ..parts.shape import FAR, Shape, next_power_of_two
from .tile_table import SHIPPED, Evidence, Key, Row, load
from .user_tiles import UserTable, read_user_table

_SHIPPED_ROWS = load(SHIPPED)
TABLE: dict[Key, Tile] = {key: row.tile for key, row in _SHIPPED_ROWS.items()}


@functools.cache
def table_tile(arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> Tile:
    """The shipped table's tile, halved until it fits a chip that the table does not list."""
    row = row_dim(arch, element_bytes, dim, work)
    if work == "hopper_backward":
        return TABLE.get((work, arch, element_bytes, row)) or hopper_backward_tile(dim)
    if work == "hopper":  # for this chip alone
        return TABLE[work, arch, element_bytes, row]
    if not has_tile(element_bytes, dim, work):
        raise NotImplementedError(
            f"one walk has no tile for {element_bytes} bytes an element at a dimension of {dim}: all spill "
            "registers; take two walks"
        )
    tile = TABLE.get((work, arch, element_bytes, row)) or TABLE[work, family(arch), element_bytes, row]
    dim = max(dim, row)
    while not fits(tile, arch, element_bytes, dim, work) and tile != Tile(16, 16, tile.num_warps, 1):
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.tile_kv > 16 and tile.tile_kv >= tile.tile_q:
            tile = replace(tile, tile_kv=tile.tile_kv // 2)
        else:
            tile = replace(tile, tile_q=tile.tile_q // 2)
    if not fits(tile, arch, element_bytes, dim, work):
        raise NotImplementedError(
            f"{arch} has too little shared memory for the {work} pass with {element_bytes} bytes an element "
            f"at a dimension of {dim}: use fp16 or bf16, or impl='torch'"
        )
    return tile


def has_tile(element_bytes: int, dim: int, work: Pass) -> bool:
    """Whether the table has rows of a pass for these: one walk spills registers where rows are wider."""
    return work != "dqkv" or dim <= (256 if element_bytes == 2 else 128)


@functools.cache
def row_dim(arch: str, element_bytes: int, dim: int, work: Pass) -> int:
    """The dimension of the row that serves `dim`: the least that the chip, or its family, has a row for; the
    widest row where `dim` is wider still, and `dim` itself where there are no rows. Of Hopper's backward
    it is the columns of its tiles."""
    if work == "hopper_backward":
        return max(HOPPER_COLUMNS, next_power_of_two(dim))
    of_chip, of_family = (work, arch, element_bytes), (work, family(arch), element_bytes)
    dims = [key[3] for key in TABLE if key[:3] in (of_chip, of_family)]
    return min([each for each in dims if each >= dim], default=max(dims, default=dim))


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a GPU: "sm_90", "gfx942"."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiplies_fp8(arch: str) -> bool:
    """Whether a chip of this architecture has tensor cores for e4m3 that the kernels use."""
    return family(arch) in ("sm_90", "sm_100")


def is_proven(evidence: Evidence) -> bool:
    """Whether a GPU has shown that a kernel of Hopper's is right there, and faster than the portable one."""
    right = evidence.error is not None and evidence.error <= 1
    return evidence.gpu is not None and right and (evidence.over_portable or 0) > 1


PROVEN = frozenset(
    key for key, row in _SHIPPED_ROWS.items() if key[0] in HOPPER_PASSES and is_proven(row.evidence)
)


def is_hopper_proven(arch: str, element_bytes: int, shape: Shape) -> bool:
    """Whether it has been shown for such calls on a chip. What was shown of rows in one piece says nothing
    about those in two."""
    dim = row_dim(arch, element_bytes, tile_dim(shape.head_dim, shape.value_dim, "hopper"), "hopper")
    most = max(len(hopper_pieces(each)) for each in (shape.head_dim, shape.value_dim))
    return ("hopper", arch, element_bytes, dim) in PROVEN and most <= len(hopper_pieces(dim))


def length_tile(length: int, most: int) -> int:
    """The tile for an axis: no longer than the axis needs."""
    return min(most, max(16, next_power_of_two(length)))


# Every thread reads it: PyTorch runs a backward on the GPU in a thread of its own.
_forced: dict[Pass, Tile] = {}


@contextlib.contextmanager
def use(tile: Tile, passes: Iterable[Pass] = PASSES) -> Iterator[None]:
    """Give every call inside the `with` block this tile, as tests and tuning do; with `passes`, these alone.
    It holds for all threads of the process."""
    global _forced
    before = _forced
    _forced = before | dict.fromkeys(passes, tile)
    try:
        yield
    finally:
        _forced = before


_walks: int | None = None


@contextlib.contextmanager
def use_walks(walks: int) -> Iterator[None]:
    """Have every backward inside the `with` block that makes dQ, dK and dV take 1 walk or 2."""
    if walks not in (1, 2):
        raise ValueError(f"walks={walks!r} must be 1 or 2")
    global _walks
    before, _walks = _walks, walks
    try:
        yield
    finally:
        _walks = before


# Where the static model (`tilewise.tools.rank`) finds one walk of the shipped tiles faster than two at every
# length, if its programs may add to dQ in any order. In turns it finds that for long calls at 64, but not
# beside two walks of the tiles that it ranks first (docs/backward.md). No GPU has timed any of them.
ONE_WALK = {("sm_90", 2, 64)}


def choose_walks(q: torch.Tensor, shape: Shape, in_order: bool) -> int:
    """In how many walks the backward makes dQ, dK and dV, if it makes all of them. The interpreter takes two,
    so that tests which say nothing see both of their kernels; those of one walk ask for it."""
    if _walks is not None or INTERPRETED or in_order:
        return _walks or 2
    return arch_walks(architecture(q.device), q.element_size(), shape, in_order)


def arch_walks(arch: str, element_bytes: int, shape: Shape, in_order: bool) -> int:
    """The same on an architecture by name."""
    if _walks is not None:
        return _walks
    key = arch, element_bytes, max(64, widest(shape))
    return 1 if not in_order and key in ONE_WALK else 2


def row_bytes(q: torch.Tensor, work: Pass) -> int:
    """The bytes an element of the rows that serve q in a pass: fp8 has rows of its own in the forward alone.
    What else walks over such numbers, for statistics, takes those of 16 bits."""
    return q.element_size() if work == "forward" else max(2, q.element_size())


def choose_tile(q: torch.Tensor, shape: Shape, work: Pass) -> Tile:
    """The tile for a pass over a call. Short queries get short tiles; kv_len plays no part on a GPU, so that
    a row's result does not depend on how much padding follows it."""
    forced = _forced.get(work)
    if forced is not None:
        return forced
    if INTERPRETED:  # its cost is by the operation, hardly by the element
        if work == "hopper":
            return HopperTile(128, length_tile(shape.kv_len, 32), 8, 2)
        if work == "hopper_backward":
            return hopper_backward_tile(widest(shape))
        if not shape.is_dense:
            return Tile(length_tile(rows_of_a_tile(shape), 32), 32)
        return Tile(length_tile(shape.q_len, 64), length_tile(shape.kv_len, 64))
    dim = tile_dim(shape.head_dim, shape.value_dim, work)
    return cut_tile(device_row(q.device, row_bytes(q, work), dim, work)[0], shape, dim, work)


def tile_choice(q: torch.Tensor, shape: Shape, work: Pass) -> tuple[Tile, str]:
    """`choose_tile`, and where its tile comes from: "given by tiles.use", "interpreter", "your table (PATH)"
    or "shipped table"."""
    tile = choose_tile(q, shape, work)
    if work in _forced:
        return tile, "given by tiles.use"
    if INTERPRETED:
        return tile, "interpreter"
    dim = tile_dim(shape.head_dim, shape.value_dim, work)
    return tile, device_row(q.device, row_bytes(q, work), dim, work)[1]


def arch_choice(arch: str, element_bytes: int, shape: Shape, work: Pass) -> tuple[Tile, str]:
    """The same for an architecture by name, with no GPU to ask: nobody's own table is known for it."""
    if work in _forced:
        return _forced[work], "given by tiles.use"
    return gpu_tile(arch, element_bytes, shape, work), "shipped table"


@functools.cache
def user_table(device: torch.device) -> UserTable:
    """The tiles tuned for this GPU, read from its file once; raises ValueError where that file is broken."""
    name, arch = torch.cuda.get_device_name(device), architecture(device)
    return read_user_table(name, arch, lambda row: fits(row.tile, arch, row.element_bytes, row.dim, row.work))


reloads = 0  # how often: calls that are repeated (repeated.py) have the tiles of before


def reload_user_tables() -> None:
    """Read the users' tables again at the next call: `tilewise tune` has changed them."""
    global reloads
    reloads += 1
    user_table.cache_clear()
    device_row.cache_clear()


@functools.cache
def device_row(device: torch.device, element_bytes: int, dim: int, work: Pass) -> tuple[Tile, str]:
    """The tile of a pass on a GPU before it is cut for a call, the user's or the shipped one, and whose."""
    table, arch = user_table(device), architecture(device)
    row: Row | None = table.applied.get((work, arch, element_bytes, row_dim(arch, element_bytes, dim, work)))
    if row is not None:
        return row.tile, f"your table ({table.path})"
    return table_tile(arch, element_bytes, dim, work), "shipped table"


def square_tile(tile: Tile, dim: int) -> Tile:
    """The tile of the parameters' gradients: square, with the rows of the dK and dV pass, or, where rows are
    wide, the smallest: programs own rows of both Q and dO there."""
    side = NARROWEST if dim > WIDE else tile.tile_q
    return replace(tile, tile_q=side, tile_kv=side)


def gpu_tile(arch: str, element_bytes: int, shape: Shape, work: Pass = "forward") -> Tile:
    """The tile that the shipped table gives a pass over a call on a chip."""
    dim = tile_dim(shape.head_dim, shape.value_dim, work)
    return cut_tile(table_tile(arch, element_bytes, dim, work), shape, dim, work)


def widest(shape: Shape) -> int:
    return max(shape.head_dim, shape.value_dim)


@functools.cache
def tile_dim(head_dim: int, value_dim: int, work: Pass) -> int:
    """The dimension that a tile is chosen by: the wider one. But Hopper's forward has rows of K and V side by
    side in shared memory, and in registers those of O alone: it is what K and V have on average where O is no
    wider and can leave through Q's place. Otherwise O needs a place of its own, for which only tiles of
    powers of two leave room."""
    widest = max(head_dim, value_dim)
    if work != "hopper":
        return widest
    if out_fits_q(head_dim, value_dim):
        return (sum(hopper_pieces(head_dim)) + sum(hopper_pieces(value_dim))) // 2
    return next_power_of_two(widest)


def cut_tile(tile: Tile, shape: Shape, dim: int, work: Pass) -> Tile:
    """A row's tile, or fewer rows of it where q_len is short. In the forward fewer warps share them then, or
    fewer keys where O is wide."""
    if work in HOPPER_PASSES:  # its warpgroups have 64 rows each, whatever q_len is
        return tile
    if shape.cache is not None:  # rows of a group and keys in pages have addresses of their own to keep
        tile = replace(tile, tile_kv=min(64, tile.tile_kv))
    tile_q = length_tile(rows_of_a_tile(shape), tile.tile_q)
    if tile_q == tile.tile_q or work != "forward":
        return replace(tile, tile_q=tile_q)
    if dim > 128:
        return Tile(tile_q, min(32, tile.tile_kv), tile.num_warps, tile.num_stages)
    return Tile(tile_q, min(64, tile.tile_kv), min(4, tile.num_warps), tile.num_stages)


def rows_of_a_tile(shape: Shape) -> int:
    """How many rows a tile can be filled with, as far as the host knows: all of q_len, with a cache those of
    all heads of a group. Of packed sequences nobody knows. Where the keys of a cache are split in pieces of a
    given size, bits must not depend on how many queries come together: as few as there can be."""
    if shape.cache is not None and shape.cache.split_size is not None:
        return shape.group
    if shape.packing is not None:
        return FAR
    return shape.q_len if shape.cache is None else shape.q_len * shape.group
