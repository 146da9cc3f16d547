"""What a tile of keys adds to dQ: dS K of each tile of rows that visits it, summed in memory in fp32."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ..parts.numerics import matmul, widen
from .turns import FIRST_COUNTER, rank_of, take_turn


@triton.jit
def finite(x):
    """X with 0 for NaN and infinities. 0 · NaN is NaN: a key that no row of a tile sees must not enter its
    sum. Where a row sees such a key, its dS is NaN before."""
    return tl.where(tl.abs(widen(x)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def add_share(
    dsT,
    k,  # `finite_rows`
    kv_tile,  # its number
    range_ptr,  # the keys that these rows visit: prepare.py
    shares,
    tile,  # the number of these rows, of their sums and of their counter
    before,  # of the turn that is to be passed on
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ = dQ + dS K of a tile of rows, in this program's turn; the counter of the turn it has then."""
    sums_ptr, turns = shares
    if HEAD_TILE >= 64 and cuda_capability_geq(9):  # whose tensor cores want 64 rows
        dq = tl.trans(matmul(tl.trans(k), dsT, tl.zeros([HEAD_TILE, TILE_Q], tl.float32), PRECISION))
    else:
        dq = matmul(tl.trans(dsT), k, tl.zeros([TILE_Q, HEAD_TILE], tl.float32), PRECISION)
    visits, rank = rank_of(tl.load(range_ptr), tl.load(range_ptr + 1), kv_tile, TILE_KV)
    if visits:
        turn = FIRST_COUNTER + tile.to(tl.int32)
        if len(turns) > 0:
            take_turn(turns[0] + turn, rank, turns[0] + before)
        before = turn
        add_tile(sums_ptr + tile * TILE_Q * HEAD_DIM, dq, HEAD_DIM, HEAD_TILE, TILE_Q)
    return before


@triton.jit
def add_tile(ptr, tile, DIM: tl.constexpr, DIM_TILE: tl.constexpr, ROWS: tl.constexpr):
    """Add a tile [ROWS, DIM_TILE] to one that lies in memory in one piece, without padding columns. Offsets
    that the compiler knows take no registers."""
    columns = tl.arange(0, DIM_TILE)
    ptrs = ptr + (tl.arange(0, ROWS)[:, None] * DIM + columns[None, :])
    if DIM == DIM_TILE:
        tl.atomic_add(ptrs, tile, sem="relaxed")
    else:
        tl.atomic_add(ptrs, tile, mask=(columns < DIM)[None, :], sem="relaxed")
