"""The forward pass on Hopper (sm_90): how FlashAttention-3 is possible in Python.

The equations are those of `kernels/forward.py`, and so are the masks, the scores and the softmax. What is new
is who does what, and when. A program is a producer and two or three warpgroups of consumers:

    producer   has tiles of Q, K and V copied into shared memory by the chip's copy engine (TMA):  producer.py
    consumer   owns 64 rows of a tile of rows, and runs its softmax under matmuls (WGMMA):         consumer.py

    in shared memory                           the producer waits for     a consumer waits for
    q    [WARPGROUPS, 64, HEAD_TILE]           its warpgroup, "free"      the copy engine, "full"
    k    [STAGES, TILE_KV, HEAD_TILE]          all consumers, "free"      the copy engine, "full"
    v    [STAGES, TILE_KV, VALUE_TILE]         all consumers, "free"      the copy engine, "full"
    out  [WARPGROUPS, 64, VALUE_TILE]          -                          the copy engine, which reads it
    turn                                       -                          the warpgroup before

"full" is an mbarrier a buffer (channels.py); the others are named barriers, of which a multiprocessor has 16:

    0 .. WARPGROUPS + 1    Triton's own: the default role, the switch between roles, one for each other role
    WARPGROUPS             turn
    WARPGROUPS             q free
    STAGES                 k free
    STAGES                 v free

docs/hopper.md has the picture in time. Method: FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .channels import make_ring
from .consumer import consume
from .plan import NAMED_BARRIERS, ROWS, WARPGROUP_THREADS, Channels, Plan
from .producer import produce


@gluon.jit
def hopper_forward_kernel(
    q_desc,  # [batch, q_heads, q_len, head_dim] in pieces of [1, 1, ROWS, HEAD_TILE]
    k_desc,  # [batch, kv_heads, kv_len, head_dim] in pieces of [1, 1, TILE_KV, HEAD_TILE]
    v_desc,  # [batch, kv_heads, kv_len, value_dim] in pieces of [1, 1, TILE_KV, VALUE_TILE]
    out_desc,  # [batch, q_heads, q_len, value_dim] in pieces of [1, 1, ROWS, VALUE_TILE]
    lse,  # ([batch, q_heads, q_len] contiguous,), or () where nobody asks for it
    statistics,  # (row_max, log2 row_sum), each as lse, or ()
    sink,  # (pointer, stride) of [q_heads], or ()
    order,  # (tiles of rows, batch · q_heads, heads_together): schedule.py
    sizes,  # (q_heads, q_len, kv_len)
    group,  # query heads that share a head of keys and values
    unit,  # (the portable kernel's,), or () where that is None
    mask_args,  # as in the portable kernel, and so are the next three
    score_args,
    INTERVALS: gl.constexpr,
    SCORES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    TILE_KV: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_TURNS: gl.constexpr,
    HAS_OUT_BUFFER: gl.constexpr,  # False: O leaves through Q's place
    IS_Q_IN_REGISTERS: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    PRODUCER_THREADS: gl.constexpr = 32 * PRODUCER_WARPS
    THREADS: gl.constexpr = WARPGROUPS * WARPGROUP_THREADS + PRODUCER_THREADS
    TURN: gl.constexpr = WARPGROUPS + 2
    Q_FREE: gl.constexpr = TURN + WARPGROUPS
    K_FREE: gl.constexpr = Q_FREE + WARPGROUPS
    V_FREE: gl.constexpr = K_FREE + STAGES
    gl.static_assert(V_FREE + STAGES <= NAMED_BARRIERS, "a multiprocessor has no more named barriers")
    q = make_ring(q_desc, Q_FREE, WARPGROUPS, WARPGROUP_THREADS + PRODUCER_THREADS)
    k = make_ring(k_desc, K_FREE, STAGES, THREADS)
    v = make_ring(v_desc, V_FREE, STAGES, THREADS, IS_CLEANED=True)
    out = q.buffers
    if HAS_OUT_BUFFER:
        columns: gl.constexpr = out_desc.block_type.shape[3]
        shape: gl.constexpr = [WARPGROUPS, 1, 1, ROWS, columns]
        out = gl.allocate_shared_memory(out_desc.dtype, shape, out_desc.layout)
    fence_async_shared()
    channels = Channels(q, k, v, out)
    plan = Plan(INTERVALS, SCORES, WARPGROUPS, TILE_KV, TURN, HAS_TURNS, HAS_OUT_BUFFER, IS_Q_IN_REGISTERS)

    gl.static_assert(WARPGROUPS == 2 or WARPGROUPS == 3)
    asked = (plan, channels, out_desc, lse, statistics, sink, order, sizes, unit, mask_args, score_args)
    producer = (plan, channels, q_desc, k_desc, v_desc, order, sizes, group, mask_args)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(consume, (asked, 0)), (consume, (asked, 1)), (produce, producer)],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (asked, 0)),
                (consume, (asked, 1)),
                (consume, (asked, 2)),
                (produce, producer),
            ],
            [4, 4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
