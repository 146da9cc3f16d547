"""Which tiles are worth a try for a pass, and in which order?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from ...kernels.hopper.limits import WARPGROUP_ROWS
from ...kernels.room import family, fits
from ...kernels.tile import CopiedTile, HopperBackwardTile, HopperTile, Pass, Tile

HOPPER_BACKWARD_STAGES = (2, 3, 4)
SIZES = (16, 32, 64, 128, 256)
STAGES = (1, 2, 3, 4)
HOPPER_STAGES = {2: (2, 3), 3: (2,)}  # by warpgroups: a multiprocessor has barriers for no more


def candidates(work: Pass, arch: str, element_bytes: int, dim: int) -> list[Tile]:
    """Every tile of powers of two that the chip has shared memory and registers for; of the forward also with
    its copies by the engine, where the chip has one."""
    if work == "hopper":
        return [tile for tile in hopper_tiles(dim) if fits(tile, arch, element_bytes, dim, work)]
    if work == "hopper_backward":
        return [tile for tile in hopper_backward_tiles() if fits(tile, arch, element_bytes, dim, work)]
    has_engine = work == "forward" and family(arch) in ("sm_90", "sm_100")
    tiles = (
        made(tile_q, tile_kv, warps, stages)
        for tile_q, tile_kv, stages in itertools.product(SIZES, SIZES, STAGES)
        for warps in warp_counts(tile_q, tile_kv)
        for made in ((Tile, CopiedTile) if has_engine else (Tile,))
    )
    return [tile for tile in tiles if fits(tile, arch, element_bytes, dim, work)]


def hopper_tiles(dim: int) -> Iterator[Tile]:
    """Those of Hopper's forward, in turns or not, Q in registers or not."""
    keys = (64, 128) if dim <= 128 else (32, 64)
    for warpgroups, all_stages in HOPPER_STAGES.items():
        rows, warps = WARPGROUP_ROWS * warpgroups, 4 * warpgroups
        for tile_kv, stages, *switched in itertools.product(keys, all_stages, (True, False), (False, True)):
            yield HopperTile(rows, tile_kv, warps, stages, *switched)


def hopper_backward_tiles() -> Iterator[Tile]:
    for tile_q, stages in itertools.product((64, 128), HOPPER_BACKWARD_STAGES):
        yield HopperBackwardTile(tile_q, 2 * WARPGROUP_ROWS, 8, stages)


def warp_counts(tile_q: int, tile_kv: int) -> tuple[int, ...]:
    """4 and 8 warps; 2 where the scores of a step are few, 16 where they are many."""
    pairs = tile_q * tile_kv
    few = (2,) if pairs <= 64 * 64 else ()
    many = (16,) if pairs >= 128 * 128 else ()
    return (*few, 4, 8, *many)


def distance(one: Tile, other: Tile) -> float:
    """How many halvings and doublings lie between two tiles; a stage counts half of one, and so does what a
    tile switches on."""
    return (
        abs(math.log2(one.tile_q / other.tile_q))
        + abs(math.log2(one.tile_kv / other.tile_kv))
        + abs(math.log2(one.num_warps / other.num_warps))
        + abs(one.num_stages - other.num_stages) / 2
        + sum(mine != theirs for mine, theirs in zip(switches(one), switches(other), strict=True)) / 2
    )


def switches(tile: Tile) -> tuple[int, ...]:
    if not isinstance(tile, HopperTile):
        return (isinstance(tile, CopiedTile),)
    return tile.has_turns, tile.is_q_in_registers, tile.producer_warps


def nearest_first(tiles: Iterable[Tile], best: Tile, start: Tile) -> list[Tile]:
    """In the order of the distance from the best tile so far, then from where the search began; of those as
    near, the larger tiles first."""
    return sorted(
        tiles, key=lambda tile: (distance(tile, best), distance(tile, start), -tile.tile_q * tile.tile_kv)
    )
