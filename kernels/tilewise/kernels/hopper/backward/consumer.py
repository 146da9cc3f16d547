"""A consumer: a warpgroup that owns 64 keys, and dK and dV of them, which it sums in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ....parts.numerics import round_to
from ..channels import first_place
from ..instructions import store_async, sync, wait_for_role
from ..pieces import accumulator
from .plan import KEYS, WARPGROUP_THREADS, WARPGROUPS
from .step import take_step
from .walk import visits_of


@gluon.jit
def consume(asked, dk_desc, dv_desc, WARPGROUP: gl.constexpr):
    """Everything for the keys of one warpgroup."""
    plan, channels, keys, _numbers, ranges, sizes, unit, _mask_args, _score_args = asked
    group = sizes[1]
    DTYPE: gl.constexpr = channels.q.buffers[0].dtype
    LAYOUT: gl.constexpr = accumulator(plan.COLUMNS)
    channels.q.release_all()
    place = first_place()
    dk = gl.full([KEYS, plan.COLUMNS], 0.0, gl.float32, LAYOUT)
    dv = gl.full([KEYS, plan.COLUMNS], 0.0, gl.float32, LAYOUT)
    mbarrier.wait(channels.landed.index(0), 0)
    mbarrier.wait(channels.landed.index(1), 0)

    for member in range(group):
        head = keys.kv_head * group + member
        first, full_first, full_last, last = visits_of(keys, head, ranges, sizes, plan.TILE_Q)
        # From the last tile of rows to the first: those that a mask cuts, the full ones, and again cut ones.
        for part in range(2):
            for IS_FULL in gl.static_range(2):
                begin, end = gl.where(part == 0, full_last, first), gl.where(part == 0, last, full_first)
                if IS_FULL:
                    begin, end = gl.where(part == 0, full_first, full_last), full_last
                for step in range(end - begin):
                    dk, dv, place = take_step(
                        asked, head, end - 1 - step, dk, dv, place, WARPGROUP, not IS_FULL
                    )

    if len(unit) != 0:
        dk = dk * unit[0]
    sync(plan.TOGETHER, WARPGROUPS * WARPGROUP_THREADS)  # nobody multiplies by K any more
    k_out, v_out = channels.k.index(WARPGROUP), channels.v.index(WARPGROUP)
    k_out.reshape([KEYS, plan.COLUMNS]).store(round_to(dk, DTYPE))
    v_out.reshape([KEYS, plan.COLUMNS]).store(round_to(dv, DTYPE))
    fence_async_shared()
    wait_for_role()
    corner = [keys.batch, keys.kv_head, keys.kv_start + WARPGROUP * KEYS, 0]
    store_async(dk_desc, corner, k_out)
    store_async(dv_desc, corner, v_out)
    tma.store_wait(0)
    # The reducer says once more than there are steps that dQ has left.
    sync(plan.DQ_FREE + WARPGROUP, WARPGROUP_THREADS + 32)
