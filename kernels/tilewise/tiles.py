"""Which tile does a call get? A table with its evidence, a rule for what it leaves out, and a check of fit.

A tile is chosen on the host, before the launch, from the architecture, the dimensions and the dtype. Nothing
is timed inside a user's call.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .numerics import INTERPRETED
from .problem import Shape, next_power_of_two


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


Pass = Literal["forward", "dkv", "dq"]

# By pass, architecture, bytes an element (2: fp16 and bf16, 4: fp32) and the wider of head_dim and value_dim,
# up to a power of two. Evidence: registers a thread and bytes of shared memory of the causal kernel, compiled
# ahead of time by Triton 3.9.0; none of them spills (tests/test_compiled.py). No row has been timed on a GPU
# yet.
TABLE: dict[tuple[Pass, str, int, int], Tile] = {
    ("forward", "sm_80", 2, 64): Tile(128, 64, num_warps=8),  # 164, 32768
    ("forward", "sm_80", 2, 128): Tile(128, 64, num_warps=8),  # 210, 65536
    ("forward", "sm_80", 2, 256): Tile(64, 64, num_warps=8),  # 255, 106496
    ("forward", "sm_80", 4, 64): Tile(32, 32, num_warps=4),  # 104, 28800
    ("forward", "sm_80", 4, 128): Tile(32, 32, num_warps=8),  # 78, 53248
    ("forward", "sm_80", 4, 256): Tile(16, 32, num_warps=8),  # 73, 84032
    ("forward", "sm_90", 2, 64): Tile(128, 128, num_warps=8),  # 211, 81920
    ("forward", "sm_90", 2, 128): Tile(128, 128, num_warps=8),  # 254, 163840
    ("forward", "sm_90", 2, 256): Tile(128, 32, num_warps=8),  # 243, 131072
    ("forward", "sm_90", 4, 64): Tile(32, 32, num_warps=4),  # 90, 28800
    ("forward", "sm_90", 4, 128): Tile(16, 32, num_warps=8),  # 68, 43072
    ("forward", "sm_90", 4, 256): Tile(16, 32, num_warps=8),  # 76, 84032
    ("forward", "sm_100", 2, 64): Tile(128, 128, num_warps=8),  # 210, 82944
    ("forward", "sm_100", 2, 128): Tile(128, 64, num_warps=8),  # 220, 98848
    ("forward", "sm_100", 2, 256): Tile(64, 64, num_warps=8),  # 196, 164896
    ("forward", "sm_100", 4, 64): Tile(32, 32, num_warps=4),  # 92, 28800
    ("forward", "sm_100", 4, 128): Tile(16, 32, num_warps=8),  # 56, 43072
    ("forward", "sm_100", 4, 256): Tile(16, 32, num_warps=8),  # 78, 84032
    ("forward", "gfx942", 2, 64): Tile(128, 64, num_warps=4),  # 246, 16384
    ("forward", "gfx942", 2, 128): Tile(128, 64, num_warps=4),  # 324, 32768
    ("forward", "gfx942", 2, 256): Tile(64, 32, num_warps=4),  # 288, 36864
    ("forward", "gfx942", 4, 64): Tile(32, 32, num_warps=4),  # 151, 16384
    ("forward", "gfx942", 4, 128): Tile(32, 32, num_warps=4),  # 198, 32768
    ("forward", "gfx942", 4, 256): Tile(16, 32, num_warps=4, num_stages=1),  # 314, 32768
    ("dkv", "sm_80", 2, 64): Tile(32, 64, num_warps=4),  # 194, 24832
    ("dkv", "sm_80", 2, 128): Tile(64, 64, num_warps=8),  # 177, 74240
    ("dkv", "sm_80", 2, 256): Tile(32, 32, num_warps=8),  # 171, 67840
    ("dkv", "sm_80", 4, 64): Tile(32, 32, num_warps=4, num_stages=1),  # 138, 36864
    ("dkv", "sm_80", 4, 128): Tile(16, 32, num_warps=8),  # 102, 53376
    ("dkv", "sm_80", 4, 256): Tile(16, 32, num_warps=8),  # 183, 100480
    ("dkv", "sm_90", 2, 64): Tile(64, 128, num_warps=8),  # 249, 66048
    ("dkv", "sm_90", 2, 128): Tile(32, 128, num_warps=8),  # 244, 98688
    ("dkv", "sm_90", 2, 256): Tile(64, 32, num_warps=8),  # 174, 102912
    ("dkv", "sm_90", 4, 64): Tile(32, 32, num_warps=4, num_stages=1),  # 228, 36864
    ("dkv", "sm_90", 4, 128): Tile(16, 32, num_warps=8),  # 87, 51328
    ("dkv", "sm_90", 4, 256): Tile(16, 32, num_warps=8),  # 152, 100480
    ("dkv", "sm_100", 2, 64): Tile(64, 64, num_warps=8),  # 210, 66560
    ("dkv", "sm_100", 2, 128): Tile(64, 64, num_warps=8),  # 245, 132096
    ("dkv", "sm_100", 2, 256): Tile(32, 32, num_warps=8, num_stages=1),  # 167, 81920
    ("dkv", "sm_100", 4, 64): Tile(32, 32, num_warps=4, num_stages=1),  # 228, 36864
    ("dkv", "sm_100", 4, 128): Tile(16, 32, num_warps=8),  # 86, 51328
    ("dkv", "sm_100", 4, 256): Tile(16, 32, num_warps=8),  # 142, 100480
    ("dkv", "gfx942", 2, 64): Tile(64, 128, num_warps=4, num_stages=1),  # 325, 16384
    ("dkv", "gfx942", 2, 128): Tile(64, 64, num_warps=4, num_stages=1),  # 426, 16384
    ("dkv", "gfx942", 2, 256): Tile(16, 32, num_warps=4, num_stages=1),  # 253, 16384
    ("dkv", "gfx942", 4, 64): Tile(32, 32, num_warps=4, num_stages=1),  # 260, 8192
    ("dkv", "gfx942", 4, 128): Tile(16, 32, num_warps=4, num_stages=1),  # 250, 16384
    ("dkv", "gfx942", 4, 256): Tile(16, 32, num_warps=4, num_stages=1),  # 437, 32768
    ("dq", "sm_80", 2, 64): Tile(128, 64, num_warps=8),  # 186, 49152
    ("dq", "sm_80", 2, 128): Tile(128, 64, num_warps=8),  # 255, 98304
    ("dq", "sm_80", 2, 256): Tile(64, 32, num_warps=8),  # 212, 102400
    ("dq", "sm_80", 4, 64): Tile(32, 64, num_warps=8),  # 74, 57344
    ("dq", "sm_80", 4, 128): Tile(32, 16, num_warps=8),  # 78, 51200
    ("dq", "sm_80", 4, 256): Tile(16, 16, num_warps=8),  # 74, 66560
    ("dq", "sm_90", 2, 64): Tile(128, 128, num_warps=8),  # 199, 98304
    ("dq", "sm_90", 2, 128): Tile(128, 128, num_warps=8),  # 226, 196608
    ("dq", "sm_90", 2, 256): Tile(64, 64, num_warps=8),  # 250, 196608
    ("dq", "sm_90", 4, 64): Tile(32, 32, num_warps=4),  # 107, 36864
    ("dq", "sm_90", 4, 128): Tile(32, 16, num_warps=8),  # 76, 51200
    ("dq", "sm_90", 4, 256): Tile(16, 16, num_warps=8),  # 78, 66560
    ("dq", "sm_100", 2, 64): Tile(128, 128, num_warps=8),  # 255, 115712
    ("dq", "sm_100", 2, 128): Tile(128, 64, num_warps=8),  # 145, 148480
    ("dq", "sm_100", 2, 256): Tile(64, 64, num_warps=8),  # 124, 230400
    ("dq", "sm_100", 4, 64): Tile(32, 32, num_warps=4),  # 102, 36864
    ("dq", "sm_100", 4, 128): Tile(32, 16, num_warps=8),  # 76, 51200
    ("dq", "sm_100", 4, 256): Tile(16, 16, num_warps=8),  # 76, 66560
    ("dq", "gfx942", 2, 64): Tile(128, 64, num_warps=4, num_stages=1),  # 255, 16384
    ("dq", "gfx942", 2, 128): Tile(64, 64, num_warps=4, num_stages=1),  # 356, 16384
    ("dq", "gfx942", 2, 256): Tile(32, 32, num_warps=4, num_stages=1),  # 388, 16384
    ("dq", "gfx942", 4, 64): Tile(32, 32, num_warps=4, num_stages=1),  # 220, 8192
    ("dq", "gfx942", 4, 128): Tile(32, 16, num_warps=4, num_stages=1),  # 205, 16384
    ("dq", "gfx942", 4, 256): Tile(16, 16, num_warps=4, num_stages=1),  # 352, 16384
}

# Shared memory that one block may use, in bytes (CUDA programming guide, "compute capabilities"; CDNA3 ISA).
SHARED_BYTES = {
    "sm_75": 65_536,
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_87": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "sm_121": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
SMALLEST_SHARED_BYTES = 65_536
# Of a thread's 255; the rest goes to addresses, row state and operands, of which dQ's pass has the fewest.
ACCUMULATOR_REGISTERS = {"forward": 160, "dkv": 168, "dq": 224}


def shared_bytes(tile: Tile, arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> int:
    """Shared memory that a pass needs at most: the two tiles that a program owns, the two it walks over,
    times those in flight, and P and dS on their way from one matmul to the next. Hopper's and Blackwell's
    16-bit matmuls take all stages from shared memory, others one less; without pipelining K and V share one
    place in the forward. CDNA keeps what a program owns in registers."""
    walked = tile.tile_q if work == "dkv" else tile.tile_kv
    owned = {"forward": tile.tile_q, "dq": 2 * tile.tile_q, "dkv": 2 * tile.tile_kv}[work]
    owned = 0 if arch.startswith("gfx") else owned
    from_shared = element_bytes == 2 and family(arch) in ("sm_90", "sm_100")
    between = 0 if from_shared else tile.tile_q * tile.tile_kv
    in_flight = tile.num_stages if from_shared else max(1, tile.num_stages - 1)
    buffers = 1 if tile.num_stages == 1 and work == "forward" else 2 * in_flight
    if from_shared and family(arch) == "sm_100" and work != "forward":
        buffers += 1  # a transposed copy; and P and dS of the dK and dV pass are operands in shared memory
        between = 2 * tile.tile_q * tile.tile_kv if work == "dkv" else 0
    return element_bytes * (owned * dim + between + buffers * walked * dim)


def accumulator_registers(tile: Tile, arch: str, dim: int, work: Pass = "forward") -> int:
    """Registers a thread that hold what is summed (O; dQ; dK and dV), the scores and what becomes of them."""
    threads = tile.num_warps * (64 if arch.startswith("gfx") else 32)
    pairs = tile.tile_q * tile.tile_kv
    if work == "forward":  # S and the rounded P
        return (tile.tile_q * dim + pairs + pairs // 2) // threads
    sums = tile.tile_q * dim if work == "dq" else 2 * tile.tile_kv * dim
    return (sums + 2 * pairs + pairs // 2) // threads  # S, dP and the rounded dS


def fits(tile: Tile, arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> bool:
    """Whether a pass with this tile stays within the chip's shared memory and a thread's registers."""
    budget = ACCUMULATOR_REGISTERS[work] * (2 if arch.startswith("gfx") else 1)
    return (
        shared_bytes(tile, arch, element_bytes, dim, work) <= SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)
        and accumulator_registers(tile, arch, dim, work) <= budget
    )


def family(arch: str) -> str:
    """The architecture of the table that a chip is nearest to: the newest that is not newer than it."""
    if arch.startswith("gfx"):
        return "gfx942"
    version = int(re.sub(r"\D", "", arch))
    return "sm_100" if version >= 100 else "sm_90" if version >= 90 else "sm_80"


@functools.cache
def table_tile(arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> Tile:
    """The table's tile, halved until it fits a chip that the table does not list."""
    tile = TABLE[work, family(arch), element_bytes, max(64, dim)]
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


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a GPU: "sm_90", "gfx942"."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def length_tile(length: int, most: int) -> int:
    """The tile for an axis: no longer than the axis needs."""
    return min(most, max(16, next_power_of_two(length)))


_forced: ContextVar[Tile | None] = ContextVar("tilewise_tile", default=None)


@contextlib.contextmanager
def use(tile: Tile) -> Iterator[None]:
    """Give every call inside the `with` block this tile, as tests and tuning do."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_tile(q: torch.Tensor, shape: Shape, work: Pass) -> Tile:
    """The tile for a pass over a call. Short queries get short tiles; kv_len plays no part on a GPU, so that
    a row's result does not depend on how much padding follows it."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if INTERPRETED:  # its cost is by the operation, hardly by the element
        return Tile(length_tile(shape.q_len, 64), length_tile(shape.kv_len, 64))
    return gpu_tile(architecture(q.device), q.element_size(), shape, work)


def square_tile(tile: Tile) -> Tile:
    """The tile of the parameters' gradients: square, with the rows of the dK and dV pass."""
    return replace(tile, tile_kv=tile.tile_q)


def gpu_tile(arch: str, element_bytes: int, shape: Shape, work: Pass = "forward") -> Tile:
    """The tile for a pass over a call on a chip: the table's, or fewer rows of it where q_len is short. In
    the forward fewer warps share them then, or fewer keys where O is wide."""
    dim = next_power_of_two(max(shape.head_dim, shape.value_dim))
    tile = table_tile(arch, element_bytes, dim, work)
    tile_q = length_tile(shape.q_len, tile.tile_q)
    if tile_q == tile.tile_q or work != "forward":
        return replace(tile, tile_q=tile_q)
    if dim > 128:
        return Tile(tile_q, min(32, tile.tile_kv), tile.num_warps, tile.num_stages)
    return Tile(tile_q, min(64, tile.tile_kv), min(4, tile.num_warps), tile.num_stages)
