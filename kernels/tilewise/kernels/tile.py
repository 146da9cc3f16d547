"""What is a tile? The sizes with which a kernel walks, chosen on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..parts.shape import next_power_of_two
from .hopper.limits import (
    HOPPER_COLUMNS,
    NAMED_BARRIERS,
    WARPGROUP_ROWS,
    backward_barriers,
    named_barriers,
)

Pass = Literal["forward", "dkv", "dq", "dqkv", "hopper", "hopper_backward"]


# Of the portable kernels: "dqkv" stands for "dkv" and "dq" together. "hopper" is a second forward, and
# "hopper_backward" a second dqkv.
PASSES: tuple[Pass, ...] = ("forward", "dkv", "dq", "dqkv")
HOPPER_PASSES: tuple[Pass, ...] = ("hopper", "hopper_backward")


@dataclass(frozen=True)
class Tile:
    """tile_q query rows against tile_kv keys a step, by num_warps warps, with num_stages steps in flight."""

    tile_q: int
    tile_kv: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("tile_q", "tile_kv"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two, at least 16")


@dataclass(frozen=True)
class CopiedTile(Tile):
    """The same for the portable forward, and the copy engine (TMA: sm_90 and newer) brings K and V of steps
    in which every pair counts, where they lie so that it can: copies.py."""

    is_copied: bool = True


@dataclass(frozen=True)
class HopperTile(Tile):
    """The same for Hopper's forward: warpgroups of 4 warps own 64 query rows each, K and V have num_stages
    buffers each. The producer's warps are not counted."""

    has_turns: bool = True  # warpgroups issue their matmuls one after another
    is_q_in_registers: bool = False
    producer_warps: int = 1  # or 4, so that nobody else is in its warpgroup: docs/hopper.md, "The roles"

    def __post_init__(self) -> None:
        if self.tile_q not in (2 * WARPGROUP_ROWS, 3 * WARPGROUP_ROWS):
            raise ValueError(
                f"tile_q={self.tile_q} must be 128 or 192: 64 rows for each of 2 or 3 warpgroups"
            )
        if self.tile_kv not in (16, 32, 64, 128, 256):
            raise ValueError(f"tile_kv={self.tile_kv} must be a power of two from 16 to 256")
        if self.num_warps != 4 * self.warpgroups:
            raise ValueError(f"num_warps={self.num_warps} must be {4 * self.warpgroups} where {self.tile_q=}")
        most = (NAMED_BARRIERS - named_barriers(self.warpgroups, 0)) // 2
        if not 1 <= self.num_stages <= most:
            raise ValueError(f"num_stages={self.num_stages} must be from 1 to {most} where {self.tile_q=}")
        if self.producer_warps not in (1, 4):
            raise ValueError(f"producer_warps={self.producer_warps} must be 1 or 4")

    @property
    def warpgroups(self) -> int:
        return self.tile_q // WARPGROUP_ROWS


@dataclass(frozen=True)
class HopperBackwardTile(Tile):
    """The same for Hopper's backward: two warpgroups of 4 warps own 64 keys each, Q and dO have num_stages
    buffers each. The producer's warp and the reducer's are not counted."""

    def __post_init__(self) -> None:
        if self.tile_q not in (64, 128):
            raise ValueError(f"tile_q={self.tile_q} must be 64 or 128")
        if (self.tile_kv, self.num_warps) != (2 * WARPGROUP_ROWS, 8):
            raise ValueError(f"{self} must have tile_kv=128 and num_warps=8: two warpgroups of 64 keys")
        most = NAMED_BARRIERS - backward_barriers(0)
        if not 2 <= self.num_stages <= most:
            raise ValueError(f"num_stages={self.num_stages} must be from 2 to {most}")


def hopper_backward_tile(dim: int) -> HopperBackwardTile:
    """The tile for this dimension: dQ of a step is one piece of 64 rows and 64 columns for each warpgroup,
    and shared memory has room for two stages. At 128 there is no other."""
    columns = max(HOPPER_COLUMNS, next_power_of_two(dim))
    return HopperBackwardTile(2 * WARPGROUP_ROWS**2 // columns, 2 * WARPGROUP_ROWS, 8, 2)


def tile_from(work: Pass, given: Mapping[str, Any]) -> Tile:
    """A pass' tile, by the names of its fields; other names may be there."""
    portable = CopiedTile if given.get("is_copied") else Tile
    of_hopper: dict[Pass, type[Tile]] = {"hopper": HopperTile, "hopper_backward": HopperBackwardTile}
    kind = of_hopper.get(work, portable)
    return kind(**{each.name: given[each.name] for each in fields(kind)})


def describe(tile: Tile) -> str:
    """A tile in words: "128 x 64, 8 warps, 2 stages"."""
    text = (
        f"{tile.tile_q} x {tile.tile_kv}, {tile.num_warps} warp{'s' * (tile.num_warps > 1)}, "
        f"{tile.num_stages} stage{'s' * (tile.num_stages > 1)}"
    )
    if isinstance(tile, CopiedTile):
        text += ", by the copy engine"
    if isinstance(tile, HopperTile):
        text += ", in turns" * tile.has_turns + ", Q in registers" * tile.is_q_in_registers
        text += f", {tile.producer_warps} producer warps" * (tile.producer_warps > 1)
    return text
