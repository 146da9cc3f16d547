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

HEAD_TILE and VALUE_TILE columns are in one piece or two, each with a buffer of its own: pieces.py.

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

from .channels import buffer_for, make_ring
from .consumer import consume
from .pieces import in_pieces
from .plan import NAMED_BARRIERS, WARPGROUP_THREADS, Channels, Plan
from .producer import produce


@gluon.jit
def place_as_wide(buffers, COLUMNS: gl.constexpr):
    """The one of these that has so many columns: no two pieces of a row have as many."""
    if buffers[0].shape[4] == COLUMNS:
        return buffers[0]
    else:
        return buffers[1]


@gluon.jit
def hopper_forward_kernel(
    # Each with another for the second piece of columns, or None.
    q_desc,  # [batch, q_heads, q_len, head_dim] in pieces of [1, 1, ROWS, HEAD_TILE]
    q_desc_2,
    k_desc,  # [batch, kv_heads, kv_len, head_dim] in pieces of [1, 1, TILE_KV, HEAD_TILE]
    k_desc_2,
    v_desc,  # [batch, kv_heads, kv_len, value_dim] in pieces of [1, 1, TILE_KV, VALUE_TILE]
    v_desc_2,
    out_desc,  # [batch, q_heads, q_len, value_dim] in pieces of [1, 1, ROWS, VALUE_TILE]
    out_desc_2,
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
    HAS_OUT_BUFFER: gl.constexpr,  # False: O leaves through the pieces of Q's place that are as wide
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
    q_descs, k_descs = in_pieces(q_desc, q_desc_2), in_pieces(k_desc, k_desc_2)
    v_descs, out_descs = in_pieces(v_desc, v_desc_2), in_pieces(out_desc, out_desc_2)
    q = make_ring(q_descs, Q_FREE, WARPGROUPS, WARPGROUP_THREADS + PRODUCER_THREADS)
    k = make_ring(k_descs, K_FREE, STAGES, THREADS)
    v = make_ring(v_descs, V_FREE, STAGES, THREADS, IS_CLEANED=True)
    out = ()
    for i in gl.static_range(len(out_descs)):
        if HAS_OUT_BUFFER:
            out = out + (buffer_for(out_descs[i], WARPGROUPS),)  # type: ignore[assignment]
        else:
            out = out + (place_as_wide(q.buffers, out_descs[i].block_type.shape[3]),)  # type: ignore[assignment]
    fence_async_shared()
    channels = Channels(q, k, v, out)
    plan = Plan(INTERVALS, SCORES, WARPGROUPS, TILE_KV, TURN, HAS_TURNS, HAS_OUT_BUFFER, IS_Q_IN_REGISTERS)

    gl.static_assert(WARPGROUPS == 2 or WARPGROUPS == 3)
    asked = (plan, channels, out_descs, lse, statistics, sink, order, sizes, unit, mask_args, score_args)
    producer = (plan, channels, q_descs, k_descs, v_descs, order, sizes, group, mask_args)
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
