"""Does a tile fit a chip? The shared memory and the registers that each pass needs."""

from __future__ import annotations

import re

from ..parts.pieces import WIDE
from .hopper.limits import hopper_pieces
from .tile import HopperBackwardTile, HopperTile, Pass, Tile

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
ACCUMULATOR_REGISTERS = {"forward": 160, "dkv": 168, "dq": 224, "dqkv": 184}


HOPPER_REGISTERS = {2: 192, 3: 112}  # by warpgroups: of 240 and 160
HOPPER_BACKWARD_REGISTERS = 224  # of 240


def shared_bytes(tile: Tile, arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> int:
    """Shared memory that a pass needs at most: the two tiles that a program owns, the two it walks over,
    times those in flight, and P and dS on their way from one matmul to the next. Hopper's and Blackwell's
    matmuls of 8 and 16 bits with 64 rows and more take all stages from shared memory, others one less;
    without pipelining K and V share one place in the forward. CDNA keeps what a program owns in registers."""
    if isinstance(tile, HopperBackwardTile):
        return hopper_backward_bytes(tile, dim)
    if isinstance(tile, HopperTile):
        return hopper_bytes(tile, dim, dim, has_out_buffer(tile, dim, dim))
    owns_keys = work in ("dkv", "dqkv")
    walked = tile.tile_q if owns_keys else tile.tile_kv
    # One walk has K twice, once without NaN; its share of dQ goes through shared memory to be added by rows.
    owned = {
        "forward": tile.tile_q,
        "dq": 2 * tile.tile_q,
        "dkv": 2 * tile.tile_kv,
        "dqkv": 3 * tile.tile_kv,
    }[work]
    share = 4 * tile.tile_q * dim if work == "dqkv" else 0
    owned = 0 if arch.startswith("gfx") else owned
    rows = {"dkv": tile.tile_kv, "dqkv": dim}.get(work, tile.tile_q)  # of dQ's share, its columns
    if element_bytes == 1 and rows < 64:  # numbers of 8 bits are multiplied as fp16 then
        element_bytes = 2
    from_shared = element_bytes <= 2 and rows >= 64 and family(arch) in ("sm_90", "sm_100")
    between = 0 if from_shared else tile.tile_q * tile.tile_kv
    in_flight = tile.num_stages if from_shared else max(1, tile.num_stages - 1)
    buffers = 1 if tile.num_stages == 1 and work == "forward" else 2 * in_flight
    is_apart = work == "dkv" and dim > WIDE  # dK and dV, which takes no copy
    if element_bytes == 2 and family(arch) == "sm_100" and work != "forward" and not is_apart:
        buffers += 1  # a transposed copy; and P and dS of the dK and dV pass are operands in shared memory
        if from_shared:
            between = 2 * tile.tile_q * tile.tile_kv if owns_keys else 0
    return element_bytes * (owned * dim + between + buffers * walked * dim) + share


def hopper_bytes(tile: HopperTile, head_dim: int, value_dim: int, with_out_buffer: bool) -> int:
    """Shared memory of Hopper's forward: Q, the rings of K and V, O on its way out, and the barriers."""
    head_tile, value_tile = sum(hopper_pieces(head_dim)), sum(hopper_pieces(value_dim))
    columns = tile.tile_q * head_tile + tile.num_stages * tile.tile_kv * (head_tile + value_tile)
    columns += tile.tile_q * value_tile if with_out_buffer else 0
    return 2 * columns + 512


def hopper_backward_bytes(tile: HopperBackwardTile, columns: int) -> int:
    """Shared memory of Hopper's backward: K, K cleaned and V; the rings of Q and dO; dS of each stage; in
    fp32 dQ of a step and three numbers a row for each warpgroup; and the barriers."""
    walked = tile.num_stages * tile.tile_q
    numbers = 3 * tile.tile_kv * columns + 2 * walked * columns + walked * tile.tile_kv
    return 2 * numbers + 4 * (tile.tile_q * columns + 2 * 3 * tile.tile_q) + 512


def has_out_buffer(tile: HopperTile, head_dim: int, value_dim: int) -> bool:
    """Whether O has a place of its own there, so that the next tile's Q can be on its way while O leaves.
    Otherwise O leaves through Q's."""
    if hopper_bytes(tile, head_dim, value_dim, True) <= SHARED_BYTES["sm_90"]:
        return True
    if out_fits_q(head_dim, value_dim):
        return False
    raise NotImplementedError(
        f"{tile} has no room for O in shared memory beside Q, K and V of {head_dim=} and {value_dim=}"
    )


def out_fits_q(head_dim: int, value_dim: int) -> bool:
    """Whether O can leave through Q's place: each of its pieces through one as wide."""
    return {*hopper_pieces(value_dim)} <= {*hopper_pieces(head_dim)}


def accumulator_registers(tile: Tile, arch: str, dim: int, work: Pass = "forward") -> int:
    """Registers a thread that hold what is summed (O; dQ; dK and dV; all three), the scores and what becomes
    of them. dK and dV count both where programs sum one of them, too."""
    if isinstance(tile, HopperTile):  # as the forward's, and Q where it is kept there
        q = tile.tile_q * dim // 2 if tile.is_q_in_registers else 0
        return (tile.tile_q * (dim + tile.tile_kv + tile.tile_kv // 2) + q) // (32 * tile.num_warps)
    if isinstance(tile, HopperBackwardTile):  # dK and dV, P and dP, the rounded P
        return tile.tile_kv * (2 * dim + 2 * tile.tile_q + tile.tile_q // 2) // (32 * tile.num_warps)
    threads = tile.num_warps * (64 if arch.startswith("gfx") else 32)
    pairs = tile.tile_q * tile.tile_kv
    if work == "forward":  # S and the rounded P
        return (tile.tile_q * dim + pairs + pairs // 2) // threads
    sums = {"dq": tile.tile_q, "dkv": 2 * tile.tile_kv, "dqkv": 2 * tile.tile_kv + tile.tile_q}[work] * dim
    return (sums + 2 * pairs + pairs // 2) // threads  # S, dP and the rounded dS


def fits(tile: Tile, arch: str, element_bytes: int, dim: int, work: Pass = "forward") -> bool:
    """Whether a pass with this tile stays within the chip's shared memory and a thread's registers."""
    if isinstance(tile, HopperTile):
        budget = HOPPER_REGISTERS[tile.warpgroups]
    elif isinstance(tile, HopperBackwardTile):
        budget = HOPPER_BACKWARD_REGISTERS
    else:
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
