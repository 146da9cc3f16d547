"""What a consumer does for one tile of rows: five products, and what runs under them.

    start Sᵀ = K Qᵀ, dPᵀ = V dOᵀ
    wait for Sᵀ         Pᵀ = softmax                          under dPᵀ
    start dV += Pᵀ dO   Pᵀ from registers
    wait for dPᵀ        dSᵀ = Pᵀ · (dPᵀ - delta), written     under dV
    wait until the other warpgroup has written its own
    start dQ = dS K     over the keys of both, one piece each
    start dK += dSᵀ Q   dSᵀ from registers
    wait for dQ         dQ to the reducer                     under dK
    wait for dK

Everything is the transpose of what the forward has, so that Pᵀ and dSᵀ come out of one product as the left
operands of the next, which tensor cores take from registers. dQ alone needs dS the other way round, and that
of the other warpgroup too; so dSᵀ is in shared memory as well, from which either way can be read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ....parts.intervals import intersect_intervals
from ....parts.numerics import round_to
from ....parts.scores.score import apply_scores, pull_back
from ....parts.softmax import softmax_probabilities
from ..instructions import arrive, sync, wait_for_role
from .cleaning import clean_step
from .plan import KEYS, PIECE, WARPGROUP_THREADS, WARPGROUPS


@gluon.constexpr_function
def accumulator(columns):
    """A warpgroup's 64 rows of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def load_numbers(numbers, first_row, q_start, q_len, TILE_Q: gl.constexpr):
    """row_max, sum_log2 and delta of a step's rows, a row a thread."""
    max_ptr, sum_ptr, delta_ptr = numbers
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    q_idx = q_start + gl.arange(0, TILE_Q, LAYOUT)
    valid = q_idx < q_len
    at = first_row + q_idx
    return (
        gl.load(max_ptr + at, mask=valid, other=0.0),
        gl.load(sum_ptr + at, mask=valid, other=0.0),
        gl.load(delta_ptr + at, mask=valid, other=0.0),
    )


@gluon.jit
def product_of_dq(channels, place, which_k, plan, WARPGROUP: gl.constexpr):
    """dQ = dS K over all keys of the program: of two pieces, this warpgroup's, rows or columns of it."""
    WIDTH: gl.constexpr = plan.DQ_COLUMNS
    dq = gl.full([PIECE, WIDTH], 0.0, gl.float32, accumulator(WIDTH))
    for half in gl.static_range(WARPGROUPS):
        ds = channels.ds.index(place.stage * WARPGROUPS + half)
        k = channels.k.index(which_k * WARPGROUPS + half).reshape([KEYS, plan.COLUMNS])
        if plan.TILE_Q > PIECE:
            ds = ds.slice(WARPGROUP * PIECE, PIECE, 1)
        else:
            k = k.slice(WARPGROUP * WIDTH, WIDTH, 1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def take_step(
    asked,
    head,
    q_tile,
    dk,
    dv,
    place,
    WARPGROUP: gl.constexpr,
    IS_CUT: gl.constexpr,
):
    """One tile of rows: dK and dV with its share, and where the rings are."""
    plan, channels, keys, numbers, ranges, sizes, unit, mask_args, score_args = asked
    q_heads, _group, q_len, kv_len = sizes
    TILE_Q: gl.constexpr = plan.TILE_Q
    COLUMNS: gl.constexpr = plan.COLUMNS
    DTYPE: gl.constexpr = channels.q.buffers.dtype
    S_LAYOUT: gl.constexpr = accumulator(TILE_Q)
    S_ROWS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)  # a number a row, where Sᵀ has it
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, accumulator(COLUMNS), 2)
    BOTH: gl.constexpr = WARPGROUPS * WARPGROUP_THREADS
    DQ_THREADS: gl.constexpr = WARPGROUP_THREADS + 32
    batch = keys.batch
    q_start = q_tile * TILE_Q
    kv_start = keys.kv_start + WARPGROUP * KEYS
    first_row = (batch.to(gl.int64) * q_heads + head) * q_len
    row_max_1, sum_log2_1, delta_1 = load_numbers(numbers, first_row, q_start, q_len, TILE_Q)

    channels.q.wait_full(place)
    q, do = channels.q.tile(place), channels.do.tile(place)  # [TILE_Q, COLUMNS]
    which_k = 0
    if IS_CUT:
        channels.do.wait_full(place)
        which_k = clean_step(plan, channels, keys, q, do, head, q_tile, ranges, sizes, mask_args, WARPGROUP)
    k = channels.k.index(WARPGROUP).reshape([KEYS, COLUMNS])
    v = channels.v.index(WARPGROUP).reshape([KEYS, COLUMNS])
    zeros = gl.full([KEYS, TILE_Q], 0.0, gl.float32, S_LAYOUT)
    s_later = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if not IS_CUT:
        channels.do.wait_full(place)
    dp_later = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)

    channels.row_max.index(WARPGROUP).store(row_max_1)
    channels.sum_log2.index(WARPGROUP).store(sum_log2_1)
    channels.delta.index(WARPGROUP).store(delta_1)
    q_idx = q_start + gl.arange(0, TILE_Q, S_ROWS)  # [TILE_Q]
    row = gl.minimum(q_idx, q_len - 1)
    kv_idx = kv_start + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT))  # [KEYS]
    kv_row = gl.minimum(kv_idx, kv_len - 1)
    wait_for_role()

    s_t = warpgroup_mma_wait(1, deps=[s_later])
    s_t, inputs = apply_scores(s_t, batch, head, row[None, :], kv_row[:, None], plan.SCORES, score_args)
    row_max = channels.row_max.index(WARPGROUP).load(S_ROWS)
    sum_log2 = channels.sum_log2.index(WARPGROUP).load(S_ROWS)
    p_t = softmax_probabilities(s_t, row_max[None, :], sum_log2[None, :], unit[0] if len(unit) != 0 else None)
    if IS_CUT:
        lo, hi, _ = intersect_intervals(row, kv_len, batch, head, plan.INTERVALS, mask_args)
        kept = (kv_idx[:, None] >= lo[None, :]) & (kv_idx[:, None] < hi[None, :]) & (q_idx < q_len)[None, :]
        p_t = gl.where(kept, p_t, 0.0)
    p = gl.convert_layout(round_to(p_t, DTYPE), A_LAYOUT, assert_trivial=True)
    # dV = dV + Pᵀ dO
    dv_later = warpgroup_mma(p, do, dv, is_async=True)

    dp_t = warpgroup_mma_wait(1, deps=[dp_later])
    delta = channels.delta.index(WARPGROUP).load(S_ROWS)
    ds_t = p_t * (dp_t - delta[None, :])
    ds_t = pull_back(
        ds_t, inputs, batch, head, row[None, :], kv_row[:, None], plan.DERIVATIVES, score_args, 0
    )
    if IS_CUT:
        ds_t = gl.where(kept, ds_t, 0.0)
    ds_t = round_to(ds_t, DTYPE)
    channels.ds.index(place.stage * WARPGROUPS + WARPGROUP).store(ds_t)
    fence_async_shared()
    sync(plan.TOGETHER, BOTH)
    dq_later = product_of_dq(channels, place, which_k, plan, WARPGROUP)
    # dK = dK + dSᵀ Q
    ds = gl.convert_layout(ds_t, A_LAYOUT, assert_trivial=True)
    dk_later = warpgroup_mma(ds, q, dk, is_async=True)

    dv, dq = warpgroup_mma_wait(1, deps=[dv_later, dq_later])
    sync(plan.DQ_FREE + WARPGROUP, DQ_THREADS)
    channels.dq.index(WARPGROUP).reshape([PIECE, plan.DQ_COLUMNS]).store(dq)
    fence_async_shared()
    arrive(plan.DQ_FULL + WARPGROUP, DQ_THREADS)
    # It landed long ago. But the wait is a loop, a boundary that ptxas moves nothing across: without it, the
    # wait for dK moves up, and dQ leaves under no product.
    channels.do.wait_full(place)
    dk = warpgroup_mma_wait(0, deps=[dk_later])
    place = channels.q.release(place)
    return dk, dv, place
