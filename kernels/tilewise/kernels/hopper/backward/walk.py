"""Which keys does a program own, and which tiles of rows visit them, in which order?

A program owns a tile of keys of one head of keys and values. Programs are numbered tile by tile, through some
heads together (`head_and_tile`), and take their numbers as tickets when they start. For each query head of
the group a program walks the tiles of rows that visit its keys, from the last to the first, in all roles
alike:

                      keys ──►
                      0   1   2
    rows    last      █   █   █      program 1 comes to a tile of rows when program 0 has left it
      ▲               █   █   █      also where the mask is causal
      │               █   █   ▒
      │               █   ▒
    first             ▒

Sums of dQ are taken along the keys, in this order: who walked upwards instead would start where most have to
add before him.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ....parts.intervals import q_range_of
from ....parts.sequences import head_and_tile
from ..instructions import aggregate
from .plan import TILE_KV


@aggregate
class Keys:
    """A tile of keys: where it is."""

    batch: gl.tensor
    kv_head: gl.tensor
    kv_start: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, kv_head, kv_start):
        self.batch = batch
        self.kv_head = kv_head
        self.kv_start = kv_start


@gluon.jit
def keys_of(number, sizes):
    """The tile of keys with this number."""
    q_heads, group, _q_len, kv_len = sizes
    kv_heads = q_heads // group
    head, tile = head_and_tile(number, gl.num_programs(0), gl.cdiv(kv_len, TILE_KV))
    return Keys(head // kv_heads, head % kv_heads, tile * TILE_KV)


@gluon.jit
def tile_of_head(batch, head, sizes, TILE_Q: gl.constexpr):
    """The number of a head's first tile of rows among those of all heads."""
    q_heads, _group, q_len, _kv_len = sizes
    return (batch.to(gl.int64) * q_heads + head) * gl.cdiv(q_len, TILE_Q)


@gluon.jit
def visits_of(keys, head, ranges, sizes, TILE_Q: gl.constexpr):
    """The tiles of rows of a head that visit the keys: first, full_first, full_last, last of `q_range`."""
    q_len = sizes[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])  # every warp looks at all
    head_ranges = ranges + tile_of_head(keys.batch, head, sizes, TILE_Q) * 4
    return q_range_of(
        head_ranges, gl.cdiv(q_len, TILE_Q), keys.kv_start, keys.kv_start + TILE_KV,
        gl.arange(0, 128, LAYOUT),
    )  # fmt: skip
