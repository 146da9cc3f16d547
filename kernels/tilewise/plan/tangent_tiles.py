"""Which tile do the kernels of tangents get? A small one: each tensor has a tangent beside it.

Scores, gradients and their tangents are seven tiles, which must stay in registers beside what is summed. The
rows below are as compiled with few spills: in 16 bits up to 256 columns, at most 24 bytes a thread on
NVIDIA's chips, and 248 for wider rows; in fp32 8 up to 64 columns, and 400 at 256. No GPU has timed them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kernels.room import SHARED_BYTES, SMALLEST_SHARED_BYTES, shared_bytes
from ..kernels.tile import Pass, Tile
from ..parts.numerics import INTERPRETED
from ..parts.pieces import NARROWEST
from ..parts.shape import Shape
from . import tiles

# For programs that own rows ("dq") and keys ("dkv"), by bytes an element, and the widest columns they serve.
TILES: dict[tuple[Pass, int], dict[int, Tile]] = {
    ("dq", 2): {128: Tile(64, 32, 4, 2), 256: Tile(16, 64, 8, 1), 576: Tile(16, 16, 8, 1)},
    ("dkv", 2): {
        64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1), 576: Tile(16, 16, 8, 1)
    },
    ("dq", 4): {64: Tile(32, 32, 8, 1), 576: Tile(16, 16, 8, 1)},
    ("dkv", 4): {64: Tile(32, 32, 8, 1), 576: Tile(16, 16, 8, 1)},
}  # fmt: skip


def choose_tangent_tile(q: torch.Tensor, shape: Shape, work: Pass) -> Tile:
    """The tile for the tangents of a call's pass, "dq" or "dkv"."""
    if work in tiles._forced or INTERPRETED:
        return tiles.choose_tile(q, shape, work)
    return arch_tangent_tile(tiles.architecture(q.device), q.element_size(), shape, work)


def arch_tangent_tile(arch: str, element_bytes: int, shape: Shape, work: Pass) -> Tile:
    """The same on an architecture by name. Raises NotImplementedError where it has too little room."""
    if work in tiles._forced:
        return tiles._forced[work]
    dim, rows = tiles.widest(shape), TILES[work, element_bytes]
    tile = rows[min(columns for columns in rows if columns >= dim)]
    if arch.startswith("gfx") and work == "dkv":  # Triton 3.9 translates no loop in flight beside so few keys
        tile = replace(tile, num_stages=1)
    room = SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)
    while shared_bytes(tile, arch, element_bytes, 2 * dim, work) > room:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=1)
        elif max(tile.tile_q, tile.tile_kv) == NARROWEST:
            raise NotImplementedError(
                f"{arch} has too little shared memory for second derivatives and forward mode with "
                f"{element_bytes} bytes an element at a dimension of {dim}: use fp16 or bf16, or impl='torch'"
            )
        elif tile.tile_kv >= tile.tile_q:
            tile = replace(tile, tile_kv=tile.tile_kv // 2)
        else:
            tile = replace(tile, tile_q=tile.tile_q // 2)
    return tile


def square_tangent_tile(tile: Tile) -> Tile:
    """The tile of the parameters' gradients, from that of programs that own keys."""
    side = min(tile.tile_q, tile.tile_kv)
    return replace(tile, tile_q=side, tile_kv=side)
