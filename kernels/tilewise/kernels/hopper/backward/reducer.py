"""The reducer: a warp that adds each step's dQ to memory when its program's turn has come.

Floating-point sums depend on their order. Of all programs that add to a tile of rows, each has a rank: how
many tiles of keys before its own these rows visit. A counter a tile of rows says how many have added:

    wait until counter = rank     add, and wait until memory has it     counter + 1

It is the copy engine that adds, so that consumers lose no time: they compute the next step meanwhile, and
wait only if dQ of the last one has not left shared memory yet. While memory takes in what was added, the
reducer looks at the counter of the next step already.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..instructions import add_async, arrive, fence_async, sync, wait_added, wait_for_role
from .plan import PIECE, TILE_KV, WARPGROUP_THREADS, WARPGROUPS
from .walk import tile_of_head, visits_of


@gluon.jit
def pass_turn(counter):
    """The next program may add. Memory has what this one has added."""
    wait_added()
    fence_async()
    wait_for_role()  # one thread has had it added, and perhaps another says so
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def take_turn(counter, rank, before):
    """Pass on the turn of the counter `before`, and wait until `rank` programs have had that of `counter`;
    what they have added is there then."""
    had = gl.atomic_add(counter, 0, sem="acquire")  # a load: Triton adds no 0
    pass_turn(before)
    while had < rank:
        had = gl.atomic_add(counter, 0, sem="acquire")
    fence_async()


@gluon.jit
def reduce(plan, channels, keys, dq_desc, ranges, turns, sizes):
    """dQ of each step, added by both warpgroups' pieces. turns: a counter of no tile, which is passed on
    before there was a turn, and the counters of all tiles of rows."""
    before, counters = turns
    group = sizes[1]
    TILE_Q: gl.constexpr = plan.TILE_Q
    THREADS: gl.constexpr = WARPGROUP_THREADS + 32
    IS_SPLIT_BY_ROWS: gl.constexpr = TILE_Q > PIECE
    for warpgroup in gl.static_range(WARPGROUPS):
        arrive(plan.DQ_FREE + warpgroup, THREADS)
    for member in range(group):
        head = keys.kv_head * group + member
        first, _full_first, _full_last, last = visits_of(keys, head, ranges, sizes, TILE_Q)
        first_tile = tile_of_head(keys.batch, head, sizes, TILE_Q)
        for step in range(last - first):
            q_tile = last - 1 - step
            visited = ranges + (first_tile + q_tile) * 4
            start, stop = gl.load(visited), gl.load(visited + 1)
            # Between the first and the last tile of rows that visit these keys some may not.
            is_visit = (start < keys.kv_start + TILE_KV) & (stop > keys.kv_start)
            if plan.IS_ORDERED:
                if is_visit:
                    counter = counters + first_tile + q_tile
                    take_turn(counter, keys.kv_start // TILE_KV - start // TILE_KV, before)
                    before = counter
            for warpgroup in gl.static_range(WARPGROUPS):
                sync(plan.DQ_FULL + warpgroup, THREADS)
                if is_visit:
                    row = q_tile * TILE_Q
                    column = 0
                    if IS_SPLIT_BY_ROWS:
                        row += warpgroup * PIECE
                    else:
                        column = warpgroup * plan.DQ_COLUMNS
                    add_async(dq_desc, [keys.batch, head, row, column], channels.dq.index(warpgroup))
            tma.store_wait(0)  # the copy engine has read them
            for warpgroup in gl.static_range(WARPGROUPS):
                arrive(plan.DQ_FREE + warpgroup, THREADS)
    if plan.IS_ORDERED:
        pass_turn(before)
