"""What a tile of keys adds to dQ: dS K of each tile of rows that visits it, summed in memory in fp32."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ..parts.numerics import matmul, widen
from ..parts.pieces import columns_before
from .turns import FIRST_COUNTER, rank_of, take_turn


@triton.jit
def finite(x):
    """X, in pieces, with 0 for NaN and infinities. 0 · NaN is NaN: a key that no row of a tile sees must not
    enter its sum. Where a row sees such a key, its dS is NaN before."""
    y = ()
    for i in tl.static_range(len(x)):
        is_finite = tl.abs(widen(x[i])) < float("inf")
        y = y + (tl.where(is_finite, x[i], tl.zeros_like(x[i])),)  # type: ignore[assignment]
    return y


@triton.jit
def add_share(
    dsT,
    k,  # `finite`
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
    dq = ()
    for i in tl.static_range(len(k)):
        dq = dq + (product_by_keys(dsT, k[i], PRECISION),)  # type: ignore[assignment]
    visits, rank = rank_of(tl.load(range_ptr), tl.load(range_ptr + 1), kv_tile, TILE_KV)
    if visits:
        turn = FIRST_COUNTER + tile.to(tl.int32)
        if len(turns) > 0:
            take_turn(turns[0] + turn, rank, turns[0] + before)
        before = turn
        for i in tl.static_range(len(dq)):
            add_tile(sums_ptr + tile * TILE_Q * HEAD_DIM, dq[i], columns_before(HEAD_TILE, i), HEAD_DIM)
    return before


@triton.jit
def product_by_keys(dsT, k, PRECISION: tl.constexpr):
    """dS K of one piece, [TILE_Q, columns]."""
    # Hopper's and Blackwell's tensor cores want 64 rows of 16 bits.
    if k.dtype.primitive_bitwidth == 16 and k.shape[1] >= 64 and cuda_capability_geq(9):
        dqT = matmul(tl.trans(k), dsT, tl.zeros([k.shape[1], dsT.shape[1]], tl.float32), PRECISION)
        return tl.trans(dqT)
    else:
        return matmul(tl.trans(dsT), k, tl.zeros([dsT.shape[1], k.shape[1]], tl.float32), PRECISION)


@triton.jit
def add_tile(ptr, tile, START: tl.constexpr, DIM: tl.constexpr):
    """Add to the columns from START on of rows that lie in memory one behind the other, without padding.
    Offsets that the compiler knows take no registers."""
    rows, columns = tl.arange(0, tile.shape[0]), START + tl.arange(0, tile.shape[1])
    ptrs = ptr + (rows[:, None] * DIM + columns[None, :])
    if START + tile.shape[1] <= DIM:
        tl.atomic_add(ptrs, tile, sem="relaxed")
    else:
        tl.atomic_add(ptrs, tile, mask=(rows[:, None] >= 0) & (columns[None, :] < DIM), sem="relaxed")
