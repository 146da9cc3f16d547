"""A consumer: a warpgroup that owns 64 rows of a tile of rows, and all that is computed for them.

In the steady state, step j of its walk over keys has two products in flight, and its softmax under the
second:

    turn   S_j = Q K_jᵀ   O += P_{j-1} V_{j-1}   next turn
           wait for S_j   scores, mask, row_max, P_j, row_sum   wait for O   O · rescale
                          └──────── O += P_{j-1} V_{j-1} ──────────────┘

P never leaves the registers: it is the left operand of the second product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma_wait,
)

from ...parts.intervals import intersect_intervals
from ...parts.numerics import round_to, widen
from ...parts.scores.score import apply_scores
from ...parts.softmax import softmax_end, softmax_join, softmax_step
from .channels import columns_before, first_place, place_at, tile_at
from .instructions import arrive, pack_pairs, store_async, sync, unpack_pairs, wait_for_role
from .pieces import (
    accumulator,
    left_operand,
    load_pieces,
    rows_of_product,
    scaled,
    start_product,
    start_products,
    wait_products,
    zero_pieces,
)
from .plan import ROWS, WARPGROUP_THREADS
from .schedule import rows_of

CHUNK = gl.constexpr(16)  # rows of V that are cleaned at once


# ---- What a consumer does in a step


@gluon.jit
def finish_scores(
    s,
    rows,
    row,
    lo,
    hi,
    kv_start,
    kv_len,
    score_args,
    SCORES: gl.constexpr,
    IS_CUT: gl.constexpr,
):
    """S = scores(Q Kᵀ), and -inf where the mask says so."""
    kv_idx = kv_start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))  # [TILE_KV]
    kv_row = gl.minimum(kv_idx, kv_len - 1)
    s, _ = apply_scores(s, rows.batch, rows.head, row[:, None], kv_row[None, :], SCORES, score_args)
    if IS_CUT:
        kept = (kv_idx[None, :] >= lo[:, None]) & (kv_idx[None, :] < hi[:, None])
        s = gl.where(kept, s, float("-inf"))
    return s


@gluon.jit
def zero_unseen(v_tile, kv_start, rows):
    """Zero the rows of a piece of V that lie outside start..stop."""
    COLUMNS: gl.constexpr = v_tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (COLUMNS // 8), COLUMNS // 8], [gl.num_warps(), 1], [1, 0]
    )
    for chunk in gl.static_range(v_tile.shape[0] // CHUNK):
        part = v_tile.slice(chunk * CHUNK, CHUNK)  # [CHUNK, COLUMNS]
        kv_idx = kv_start + chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
        seen = (kv_idx >= rows.start) & (kv_idx < rows.stop)
        values = part.load(LAYOUT)
        part.store(gl.where(seen[:, None], values, gl.zeros_like(values)))


@gluon.jit
def hide_unseen(v_ring, v_place, phases, kv_start, rows, kv_len):
    """Zero the rows of a step's V that lie outside start..stop: 0 · NaN is NaN, and a key that no row sees
    may hold one. What lies beyond kv_len is 0 already. One warpgroup does it, before V is full for anybody;
    returns its phases of tiles that were not clean."""
    TILE_KV: gl.constexpr = v_ring.buffers[0].shape[3]
    if rows.has_unseen(kv_start, kv_len, TILE_KV):
        phases = v_ring.wait_unclean(v_place, phases)
        v = v_ring.tile(v_place)
        for i in gl.static_range(len(v)):
            zero_unseen(v[i], kv_start, rows)
        v_ring.share(v_place)
        wait_for_role()  # Triton would put it into the loops, before they wait for the same mbarrier
    return phases


# ---- A consumer


@gluon.jit
def consume(asked, WARPGROUP: gl.constexpr):
    """Everything for the rows of one warpgroup, tile after tile. asked: the arguments of the kernel."""
    plan, channels, out_descs, lse, statistics, sink, order, sizes, unit, mask_args, score_args = asked
    q_heads, q_len, kv_len = sizes
    q_ring, k_ring, v_ring = channels.q, channels.k, channels.v
    TILE_KV: gl.constexpr = plan.TILE_KV
    MY_TURN: gl.constexpr = plan.TURN + WARPGROUP
    NEXT_TURN: gl.constexpr = plan.TURN + (WARPGROUP + 1) % plan.WARPGROUPS
    TURN_THREADS: gl.constexpr = 2 * WARPGROUP_THREADS
    DTYPE: gl.constexpr = q_ring.buffers[0].dtype
    S_LAYOUT: gl.constexpr = accumulator(TILE_KV)
    O_COLUMNS: gl.constexpr = v_ring.buffers[0].shape[4]  # of its first piece
    P_LAYOUT: gl.constexpr = left_operand(O_COLUMNS)
    S_ROWS: gl.constexpr = rows_of_product(TILE_KV)  # a number a row, where S has the row
    O_ROWS: gl.constexpr = rows_of_product(O_COLUMNS)

    q_ring.release(place_at(WARPGROUP))
    k_ring.release_all()
    v_ring.release_all()
    if plan.HAS_TURNS and WARPGROUP == plan.WARPGROUPS - 1:  # the first turn is the first warpgroup's
        arrive(NEXT_TURN, TURN_THREADS)
    q_place, k_place, v_place = place_at(WARPGROUP), first_place(), first_place()
    phases = gl.to_tensor(0)

    for tile in range(gl.program_id(0), order[0], gl.num_programs(0)):
        rows = rows_of(tile, order, sizes, mask_args, plan.INTERVALS, plan.TILE_Q, TILE_KV)
        q_start = rows.q_start + WARPGROUP * ROWS
        q_idx = q_start + gl.arange(0, ROWS, S_ROWS)  # [ROWS]
        row = gl.minimum(q_idx, q_len - 1)  # masks and scores are asked about valid rows only
        lo, hi, _ = intersect_intervals(row, kv_len, rows.batch, rows.head, plan.INTERVALS, mask_args)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
        row_sum = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
        o = zero_pieces(ROWS, v_ring.buffers)  # [ROWS, VALUE_TILE]

        # Step 0 has no product with V to run under.
        q_ring.wait_full(q_place)
        q = q_ring.tile(q_place)  # [ROWS, HEAD_TILE]
        if plan.IS_Q_IN_REGISTERS:
            q = load_pieces(q, left_operand(TILE_KV))
            fence_async_shared()  # the copy engine overwrites it only after that
        k_ring.wait_full(k_place)
        # S = Q Kᵀ
        s = warpgroup_mma_wait(0, deps=[start_product(q, k_ring.tile(k_place), S_LAYOUT)])
        k_place = k_ring.release(k_place)
        kv_start = rows.kv_start(0, TILE_KV)
        s = finish_scores(s, rows, row, lo, hi, kv_start, kv_len, score_args, plan.SCORES, True)
        row_max, row_sum, p, rescale = softmax_step(s, row_max, row_sum, unit[0] if len(unit) != 0 else None)
        pairs = pack_pairs(p, DTYPE)
        k_ring.wait_full(k_place, rows.steps > 1)

        for IS_FULL in gl.static_range(2):
            begin, end = 1, rows.cut_steps
            if IS_FULL:
                begin, end = gl.maximum(rows.cut_steps, 1), rows.steps
            for step in range(begin, end):
                if not IS_FULL and WARPGROUP == 0:  # the step before
                    phases = hide_unseen(v_ring, v_place, phases, kv_start, rows, kv_len)
                p = unpack_pairs(pairs, DTYPE, P_LAYOUT)  # [ROWS, TILE_KV]
                if plan.HAS_TURNS:
                    sync(MY_TURN, TURN_THREADS)
                s_later = start_product(q, k_ring.tile(k_place), S_LAYOUT)
                v_ring.wait_full(v_place)
                # O = O + P V
                o_later = start_products(p, v_ring.tile(v_place), o)  # [ROWS, VALUE_TILE]
                if plan.HAS_TURNS:
                    arrive(NEXT_TURN, TURN_THREADS)

                s = warpgroup_mma_wait(len(o), deps=[s_later])
                # Triton puts a barrier of the role between two waits for one mbarrier; here all its warps are
                # together anyway.
                wait_for_role()
                k_place = k_ring.release(k_place)
                kv_start = rows.kv_start(step, TILE_KV)
                s = finish_scores(
                    s, rows, row, lo, hi, kv_start, kv_len, score_args, plan.SCORES, not IS_FULL
                )
                row_max, row_sum, p, rescale = softmax_step(
                    s, row_max, row_sum, unit[0] if len(unit) != 0 else None
                )
                # This wait is a loop, and so a boundary that ptxas moves nothing across: without it, the wait
                # for O moves up, in front of the exponentials.
                k_ring.wait_full(k_place, step + 1 < rows.steps)
                o = wait_products(o_later)
                v_place = v_ring.release(v_place)
                pairs = pack_pairs(p, DTYPE)
                o = scaled(o, rescale)
            if not IS_FULL and WARPGROUP == 0:  # the last cut step
                phases = hide_unseen(v_ring, v_place, phases, kv_start, rows, kv_len)

        if plan.HAS_OUT_BUFFER:
            q_place = q_ring.release_slot(q_place)  # the next tile's Q may come while this one is finished
        p = unpack_pairs(pairs, DTYPE, P_LAYOUT)
        v_ring.wait_full(v_place)
        # O = O + P V
        o = wait_products(start_products(p, v_ring.tile(v_place), o))
        v_place = v_ring.release(v_place)

        row_max = gl.convert_layout(row_max, O_ROWS, assert_trivial=True)
        row_sum = gl.convert_layout(row_sum, O_ROWS, assert_trivial=True)
        if len(sink) != 0:
            # A sink is the state of one more key, whose value is 0.
            gl.static_assert(len(unit) == 0, "a sink's logit is in natural units")
            sink_max = gl.zeros_like(row_max) + widen(gl.load(sink[0] + rows.head.to(gl.int64) * sink[1]))
            sink_sum = gl.full([ROWS], 1.0, gl.float32, O_ROWS)
            row_max, row_sum, rescale, _ = softmax_join(row_max, row_sum, sink_max, sink_sum)
            o = scaled(o, rescale)
        natural_max = row_max
        if len(unit) != 0:
            natural_max = row_max * unit[0]
        factor, row_lse, sum_log2 = softmax_end(natural_max, row_sum)
        o = scaled(o, factor)

        q_idx = q_start + gl.arange(0, ROWS, O_ROWS)
        valid = q_idx < q_len
        at = (rows.batch.to(gl.int64) * q_heads + rows.head) * q_len + q_idx
        if len(lse) != 0:
            gl.store(lse[0] + at, row_lse, mask=valid)
        if len(statistics) != 0:
            gl.store(statistics[0] + at, row_max, mask=valid)
            gl.store(statistics[1] + at, sum_log2, mask=valid)

        if plan.HAS_OUT_BUFFER:
            tma.store_wait(0)  # the copy engine has read the last tile's
            wait_for_role()
        for i in gl.static_range(len(o)):
            tile_at(channels.out[i], WARPGROUP).store(round_to(o[i], DTYPE))
        fence_async_shared()
        wait_for_role()
        for i in gl.static_range(len(o)):
            corner = [rows.batch, rows.head, q_start, columns_before(out_descs, i)]
            store_async(out_descs[i], corner, channels.out[i].index(WARPGROUP))
        if not plan.HAS_OUT_BUFFER:
            tma.store_wait(0)
            q_place = q_ring.release_slot(q_place)
    tma.store_wait(0)
    if plan.HAS_TURNS and WARPGROUP == 0:  # nobody else takes the last turn
        sync(MY_TURN, TURN_THREADS)
