"""Which tile of rows comes next, and which keys does it visit?

A program stays on its multiprocessor and takes every n-th tile of rows, n being the number of programs:

    program 0    tile 0, tile n, tile 2n, ...
    program 1    tile 1, tile n + 1, ...

Tiles are counted so that programs which run side by side read the same keys, or keys that the L2 cache still
holds, and so that they have about as much to do: heads are taken together as many as fit the cache, and of
these first the last tiles of rows, which a causal mask makes the longest, then those before, and so on.

The keys that a tile visits are those of the portable kernel (`intervals.py`), in another order: first the
tiles that a mask cuts, then those in which every pair counts. One tile is visited at least, so that the
pipeline has something in it; where no row sees a key, all of its pairs are masked out.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...parts.intervals import cut_tile, intersect_intervals, kv_range
from .instructions import aggregate


@aggregate
class Rows:
    """A tile of rows: where it is, the keys start..stop that it visits, and in how many steps."""

    batch: gl.tensor
    head: gl.tensor
    q_start: gl.tensor
    start: gl.tensor
    stop: gl.tensor
    first: (
        gl.tensor
    )  # the first tile of keys, the full ones, and how many steps there are, as kv_range has them
    full_first: gl.tensor
    full_last: gl.tensor
    cut_steps: gl.tensor
    steps: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, head, q_start, start, stop, first, full_first, full_last, cut_steps, steps):
        self.batch = batch
        self.head = head
        self.q_start = q_start
        self.start = start
        self.stop = stop
        self.first = first
        self.full_first = full_first
        self.full_last = full_last
        self.cut_steps = cut_steps
        self.steps = steps

    @gluon.jit
    def kv_start(self, step, TILE_KV: gl.constexpr):
        """The first key of the tile that is visited in a step."""
        cut = cut_tile(step, self.first, self.full_first, self.full_last)
        return gl.where(step < self.cut_steps, cut, self.full_first + step - self.cut_steps) * TILE_KV

    @gluon.jit
    def has_unseen(self, kv_start, kv_len, TILE_KV: gl.constexpr):
        """Whether the tile of keys at kv_start has keys outside start..stop; those beyond kv_len are none."""
        return (kv_start < self.start) | ((self.stop < kv_start + TILE_KV) & (self.stop < kv_len))


@gluon.constexpr_function
def power_of_two(n):
    return 1 << (n - 1).bit_length()


@gluon.jit
def rows_of(
    tile, order, sizes, mask_args, INTERVALS: gl.constexpr, TILE_Q: gl.constexpr, TILE_KV: gl.constexpr
):
    """The tile of rows with this number."""
    heads, heads_together = order[1], order[2]
    q_heads, q_len, kv_len = sizes
    q_tiles = gl.cdiv(q_len, TILE_Q)
    first_head = tile // (heads_together * q_tiles) * heads_together
    together = gl.minimum(heads_together, heads - first_head)  # the last heads may be fewer
    within = tile - first_head * q_tiles
    head = (first_head + within % together) % q_heads
    batch = (first_head + within % together) // q_heads
    q_start = (q_tiles - 1 - within // together) * TILE_Q

    # Every warp looks at all rows: nobody waits for another's minimum.
    ROWS: gl.constexpr = power_of_two(TILE_Q)
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [gl.num_warps()], [0])
    row = gl.minimum(q_start + gl.arange(0, ROWS, LAYOUT), gl.minimum(q_start + TILE_Q, q_len) - 1)
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    start, stop, first, full_first, full_last, last = kv_range(lo, hi, whole, kv_len, TILE_KV)
    steps = gl.maximum(last - first, 1)
    cut_steps = steps - (full_last - full_first)
    return Rows(batch, head, q_start, start, stop, first, full_first, full_last, cut_steps, steps)
