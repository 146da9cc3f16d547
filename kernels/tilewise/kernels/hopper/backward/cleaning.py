"""0 · NaN is NaN: what no pair may see must not be multiplied, not even by 0.

In a step that a mask cuts, two kinds of numbers may be anything. Rows of Q and dO that see none of the
program's keys would enter dK and dV: both warpgroups write zeros over them, half each. Keys that lie outside
what the tile of rows visits would enter dQ; other tiles of rows may see them, so both warpgroups make a copy
of K with zeros there, half each, and the product reads that one. What lies beyond q_len and kv_len is 0
already.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ....parts.intervals import intersect_intervals
from ..instructions import sync
from .plan import KEYS, TILE_KV, WARPGROUP_THREADS, WARPGROUPS
from .walk import tile_of_head

CHUNK = gl.constexpr(16)  # rows that are cleaned at once


@gluon.constexpr_function
def chunk_layout(columns, warps):
    return gl.BlockedLayout([1, 8], [32 // (columns // 8), columns // 8], [warps, 1], [1, 0])


@gluon.jit
def copy_where(source, to, chunk, seen, LAYOUT: gl.constexpr):
    """A chunk of the rows of `source`, 0 where they are not seen."""
    values = source.slice(chunk * CHUNK, CHUNK).load(LAYOUT)
    to.slice(chunk * CHUNK, CHUNK).store(gl.where(seen[:, None], values, gl.zeros_like(values)))


@gluon.jit
def clean_step(plan, channels, keys, q, do, head, q_tile, ranges, sizes, mask_args, WARPGROUP: gl.constexpr):
    """Clean the step's Q and dO, in place, and K, if it needs it; says which K is clean: 0, as it came, or 1.
    Both warpgroups come, when Q and dO have landed, and go on when all is clean."""
    _q_heads, _group, q_len, kv_len = sizes
    BOTH: gl.constexpr = WARPGROUPS * WARPGROUP_THREADS
    LAYOUT: gl.constexpr = chunk_layout(plan.COLUMNS, gl.num_warps())
    offsets = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
    kv_stop = keys.kv_start + TILE_KV
    sync(plan.TOGETHER, BOTH)  # nobody reads the clean K of the last step any more

    CHUNKS: gl.constexpr = plan.TILE_Q // CHUNK // WARPGROUPS  # a warpgroup's
    for chunk in gl.static_range(WARPGROUP * CHUNKS, (WARPGROUP + 1) * CHUNKS):
        q_idx = q_tile * plan.TILE_Q + chunk * CHUNK + offsets
        row = gl.minimum(q_idx, q_len - 1)
        lo, hi, _ = intersect_intervals(row, kv_len, keys.batch, head, plan.INTERVALS, mask_args)
        seen = gl.maximum(lo, keys.kv_start) < gl.minimum(hi, kv_stop)
        copy_where(q, q, chunk, seen, LAYOUT)
        copy_where(do, do, chunk, seen, LAYOUT)

    visited = ranges + (tile_of_head(keys.batch, head, sizes, plan.TILE_Q) + q_tile) * 4
    start, stop = gl.load(visited), gl.load(visited + 1)
    is_unclean = (keys.kv_start < start) | ((stop < kv_stop) & (stop < kv_len))
    if is_unclean:
        source = channels.k.index(WARPGROUP).reshape([KEYS, plan.COLUMNS])
        to = channels.k.index(WARPGROUPS + WARPGROUP).reshape([KEYS, plan.COLUMNS])
        for chunk in gl.static_range(KEYS // CHUNK):
            kv_idx = keys.kv_start + WARPGROUP * KEYS + chunk * CHUNK + offsets
            copy_where(source, to, chunk, (kv_idx >= start) & (kv_idx < stop), LAYOUT)
    fence_async_shared()
    sync(plan.TOGETHER, BOTH)
    return gl.where(is_unclean, 1, 0)
