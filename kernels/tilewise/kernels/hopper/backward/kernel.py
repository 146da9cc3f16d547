"""The backward pass on Hopper (sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..channels import make_ring
from .consumer import consume
from .plan import (
    KEYS,
    NAMED_BARRIERS,
    PIECE,
    WARPGROUP_THREADS,
    WARPGROUPS,
    Channels,
    Plan,
)
from .producer import produce
from .reducer import reduce
from .walk import keys_of


@gluon.jit
def hopper_backward_kernel(
    q_desc,  # [batch, q_heads, q_len, head_dim] in pieces of [1, 1, TILE_Q, COLUMNS]
    k_desc,  # [batch, kv_heads, kv_len, head_dim] in pieces of [1, 1, KEYS, COLUMNS]
    v_desc,
    do_desc,
    dk_desc,  # as k
    dv_desc,
    dq_desc,  # [batch, q_heads, tiles · TILE_Q, head_dim] fp32 in pieces of [1, 1, PIECE, DQ_COLUMNS]
    numbers,  # row_max, sum_log2 and delta, each [batch, q_heads, q_len] contiguous
    ranges,  # [batch, q_heads, tiles, 4] int32: prepare.py
    counters,  # [batch, q_heads, tiles] int32
    tickets,  # [1] int32, and behind it a counter of no tile
    sizes,  # (q_heads, group, q_len, kv_len)
    unit,
    mask_args,
    score_args,
    INTERVALS: gl.constexpr,
    SCORES: gl.constexpr,
    DERIVATIVES: gl.constexpr,
    TILE_Q: gl.constexpr,
    STAGES: gl.constexpr,
    IS_ORDERED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    COLUMNS: gl.constexpr = q_desc.block_type.shape[3]
    DQ_COLUMNS: gl.constexpr = dq_desc.block_type.shape[3]
    gl.static_assert(TILE_Q * COLUMNS == WARPGROUPS * PIECE * DQ_COLUMNS, "dQ of a step is two pieces")
    THREADS: gl.constexpr = WARPGROUPS * WARPGROUP_THREADS + 32
    Q_FREE: gl.constexpr = WARPGROUPS + 3
    TOGETHER: gl.constexpr = Q_FREE + STAGES
    DQ_FREE: gl.constexpr = TOGETHER + 1
    DQ_FULL: gl.constexpr = DQ_FREE + WARPGROUPS
    gl.static_assert(STAGES >= 2, "dS of a step is read while that of the next is written")
    gl.static_assert(DQ_FULL + WARPGROUPS <= NAMED_BARRIERS, "a multiprocessor has no more named barriers")
    DTYPE: gl.constexpr = q_desc.dtype
    q = make_ring(q_desc, Q_FREE, STAGES, THREADS)
    do = make_ring(do_desc, Q_FREE, STAGES, THREADS)
    k = gl.allocate_shared_memory(DTYPE, [2 * WARPGROUPS, 1, 1, KEYS, COLUMNS], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [WARPGROUPS, 1, 1, KEYS, COLUMNS], v_desc.layout)
    landed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for signal in gl.static_range(2):
        mbarrier.init(landed.index(signal), count=1)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, TILE_Q], DTYPE)
    ds = gl.allocate_shared_memory(DTYPE, [STAGES * WARPGROUPS, KEYS, TILE_Q], DS_LAYOUT)
    dq = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, 1, 1, PIECE, DQ_COLUMNS], dq_desc.layout)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_max = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, TILE_Q], NUMBERS)
    sum_log2 = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, TILE_Q], NUMBERS)
    delta = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, TILE_Q], NUMBERS)
    fence_async_shared()
    channels = Channels(q, do, k, v, landed, ds, dq, row_max, sum_log2, delta)
    plan = Plan(
        INTERVALS, SCORES, DERIVATIVES, TILE_Q, COLUMNS, DQ_COLUMNS, IS_ORDERED, TOGETHER, DQ_FREE, DQ_FULL
    )  # fmt: skip
    if IS_ORDERED:
        number = gl.atomic_add(tickets, 1)
    else:
        number = gl.program_id(0)
    keys = keys_of(number, sizes)
    nobodys = tickets + 1

    asked = (plan, channels, keys, numbers, ranges, sizes, unit, mask_args, score_args)
    gl.warp_specialize(
        [
            (consume, (asked, dk_desc, dv_desc, 0)),
            (consume, (asked, dk_desc, dv_desc, 1)),
            (produce, (plan, channels, keys, q_desc, k_desc, v_desc, do_desc, ranges, sizes)),
            (reduce, (plan, channels, keys, dq_desc, ranges, (nobodys, counters), sizes)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )
