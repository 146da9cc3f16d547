"""The producer: a warp, or four, that has tiles copied into shared memory, as far ahead as buffers are free.

It computes nothing but where tiles begin, so a few registers are enough for it; what it does not need, the
consumers get.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .channels import first_place
from .plan import ROWS
from .schedule import rows_of


@gluon.jit
def fill_values(v, place, v_descs, rows, batch, kv_head, step, kv_len, TILE_KV: gl.constexpr):
    """V of a step. A consumer cleans it where it holds keys that no row sees."""
    kv_start = rows.kv_start(step, TILE_KV)
    is_unclean = rows.has_unseen(kv_start, kv_len, TILE_KV)
    return v.fill(place, v_descs, batch, kv_head, kv_start, is_unclean)


@gluon.jit
def produce(plan, channels, q_descs, k_descs, v_descs, order, sizes, group, mask_args):
    """Q of a tile of rows, then K 0, K 1, V 0, K 2, V 1, ... in the order in which consumers need them."""
    q, k, v = channels.q, channels.k, channels.v
    TILE_KV: gl.constexpr = plan.TILE_KV
    kv_len = sizes[2]
    q_place, k_place, v_place = first_place(), first_place(), first_place()
    for tile in range(gl.program_id(0), order[0], gl.num_programs(0)):
        rows = rows_of(tile, order, sizes, mask_args, plan.INTERVALS, plan.TILE_Q, TILE_KV)
        batch, head, kv_head = rows.batch, rows.head, rows.head // group
        for warpgroup in gl.static_range(plan.WARPGROUPS):
            q_place = q.fill(q_place, q_descs, batch, head, rows.q_start + warpgroup * ROWS)
        k_place = k.fill(k_place, k_descs, batch, kv_head, rows.kv_start(0, TILE_KV))
        for step in range(1, rows.steps):
            k_place = k.fill(k_place, k_descs, batch, kv_head, rows.kv_start(step, TILE_KV))
            v_place = fill_values(v, v_place, v_descs, rows, batch, kv_head, step - 1, kv_len, TILE_KV)
        v_place = fill_values(v, v_place, v_descs, rows, batch, kv_head, rows.steps - 1, kv_len, TILE_KV)
    q.collect()
    k.collect()
    v.collect()
