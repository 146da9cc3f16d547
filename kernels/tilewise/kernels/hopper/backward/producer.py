"""The producer: a warp that has K and V copied into shared memory once, Q and dO of each step in advance."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..channels import first_place
from ..instructions import load_async
from .plan import KEYS, WARPGROUPS
from .walk import visits_of


@gluon.jit
def fill_kept(descriptor, keys, buffers, signal):
    """Have the program's own tile of K or V copied, in a piece for each warpgroup."""
    mbarrier.expect(signal, WARPGROUPS * descriptor.block_type.nbytes)
    for warpgroup in gl.static_range(WARPGROUPS):
        corner = [keys.batch, keys.kv_head, keys.kv_start + warpgroup * KEYS, 0]
        load_async(descriptor, corner, signal, buffers.index(warpgroup))


@gluon.jit
def produce(plan, channels, keys, q_desc, k_desc, v_desc, do_desc, ranges, sizes):
    """K, then Q and dO of each step, in the order in which consumers need them; V before the first dO."""
    group = sizes[1]
    TILE_Q: gl.constexpr = plan.TILE_Q
    fill_kept(k_desc, keys, channels.k, channels.landed.index(0))
    fill_kept(v_desc, keys, channels.v, channels.landed.index(1))
    place = first_place()
    for member in range(group):
        head = keys.kv_head * group + member
        first, _full_first, _full_last, last = visits_of(keys, head, ranges, sizes, TILE_Q)
        for step in range(last - first):
            q_start = (last - 1 - step) * TILE_Q
            channels.q.fill(place, (q_desc,), keys.batch, head, q_start)
            place = channels.do.fill_free(place, (do_desc,), keys.batch, head, q_start)
    channels.q.collect()
