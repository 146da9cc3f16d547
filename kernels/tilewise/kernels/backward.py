"""The backward pass: dQ, dK and dV from dO, a tile at a time, in two walks without atomics.

    S     = scores(Q Kᵀ)                  recomputed, as in the forward
    P     = exp(S - row_max) / row_sum    what the forward kept of a row: softmax.py
    dP    = dO Vᵀ
    delta = Σ_d dO · O - dLSE             [rows]: Σ_j P dP of a row, without walking its keys
    dS    = P · (dP - delta)              then back through the modifiers, to the dot products
    dV    = Pᵀ dO        dK = dSᵀ Q        dQ = dS K

Under dropout P stands for P · keep / (1 - p) in dV, and dP for dP · keep / (1 - p): dropout.py.

`prepare.py` has written delta, and which keys each tile of rows visits. `dkv_kernel` owns a tile of keys of
one head of keys and values (█) and walks the tiles of rows that visit it (▒), for every query head of the
group; `dq_kernel` owns a tile of rows and walks the keys, as the forward does. Each result is summed by one
program in one order: the same inputs give the same bits.

                     keys ──►                              keys ──►
    rows             · █ · · ·          rows               · · · · ·
      │              · ▒ · · ·            │                · · · · ·
      ▼              · ▒ · · ·            ▼                ▒ ▒ ▒ █ ·
                   dkv_kernel, causal                    dq_kernel, causal

Of wide rows dK and dV together would fill a program's registers. There some programs sum dK and others dV:
S is computed once more, of much larger tiles.

dkv_kernel works on the transposes Sᵀ, Pᵀ and dSᵀ [TILE_KV, TILE_Q], so that Pᵀ and dSᵀ are left operands of
its products, which tensor cores take from registers.

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2; LSE's gradient joins delta.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, keys_of, load_rows, rows_of, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.intervals import intersect_intervals, kept_pairs, kv_range, q_range
from ..parts.numerics import round_to
from ..parts.pieces import (
    are_wide,
    load_pieces,
    padded_columns,
    product,
    products,
    rounded,
    scaled,
    store_pieces,
    where_rows,
    zero_pieces,
)
from ..parts.scores.score import apply_scores, pull_back
from ..parts.sequences import first_tile, tiles_of
from ..parts.softmax import softmax_probabilities
from ..parts.statistics import add_statistics, load_row_gradients
from .call import key_programs, programs, shared_arguments
from .coverage import list_keys, list_rows
from .launch import launch
from .prepare import BackwardCall
from .shares import add_share, finite
from .tile import Tile
from .turns import NOBODYS, pass_last_turn
from .walk import (
    listed_keys,
    listed_rows,
    load_keys,
    once_more,
    own_keys,
    own_rows,
    row_steps,
    row_tile,
    step_keys,
    steps_of,
    walked,
)


@triton.jit
def sum_over_rows(
    program,  # which tile of keys of which head
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    rows,  # dO and three numbers a row: `backward_arguments`
    of_rows,  # and those that statistics hand in: statistics.py
    ranges_ptr,
    lists,  # of the tiles of rows that visit each tile of keys: coverage.py; or ()
    dkeys,  # (pointer, strides), as for dvalues
    dvalues,
    shares,  # where dQ's shares are added, (sums_ptr, turns): one_walk.py; or None
    DERIVATIVES: tl.constexpr,  # of SCORES, a function or None (it is 1) for each
    OPERAND: tl.constexpr,  # what Q and K become before they are multiplied: similarity.py
    PROJECT: tl.constexpr,  # what finishes dQ and dK
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    SUMS: tl.constexpr,  # "dkv", or of a program that leaves out the other "dk" or "dv"
):
    """dK and dV of a tile of keys; with `shares`, also what it adds to dQ."""
    HAS_DK: tl.constexpr = SUMS != "dv"
    HAS_DV: tl.constexpr = SUMS != "dk"
    IN_TURNS: tl.constexpr = shares is not None
    FULL: tl.constexpr = 1 if IN_TURNS else 0  # the run over full tiles, of two
    HALVES: tl.constexpr = 2 if IN_TURNS else 1  # of a walk over the rows of a head: walk.py
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    dout, max_ptr, sum_ptr, delta_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    batch, kv_head, kv_start, where = own_keys(program, sizes, layout, TILE_KV)
    q_place, kv_place, q_len, kv_len = where
    q_tiles = tl.cdiv(q_len, TILE_Q)
    range_tiles, range_first = tiles_of(q_rows, layout[0], TILE_Q), first_tile(q_place, batch, layout, TILE_Q)

    kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
    kv_row = tl.minimum(kv_idx, kv_len - 1)
    k_head, v_head = keys_of(keys, kv_place, kv_head, layout), head_of(values, kv_place, kv_head)
    k = load_pieces(k_head, kv_idx, kv_idx < kv_len, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
    if HAS_DK:
        v = load_pieces(v_head, kv_idx, kv_idx < kv_len, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
        dk = zero_pieces(TILE_KV, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
    if HAS_DV:
        dv = zero_pieces(TILE_KV, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
    if IN_TURNS:
        finite_k = finite(OPERAND(k))
        before = kv_start * 0 + NOBODYS

    for part in range(group * HALVES):
        head, half = kv_head * group + part // HALVES, part % HALVES
        rows_ptr = rows_of(q_place, head, q_heads, q_rows)
        head_tiles = (q_place[0].to(tl.int64) * q_heads + head) * range_tiles + range_first
        head_ranges_ptr = ranges_ptr + head_tiles * 4
        if len(lists) > 0:
            span = listed_rows(lists, program * group + part // HALVES)
        else:
            span = q_range(head_ranges_ptr, q_tiles, kv_start, kv_start + TILE_KV, 128)
        q_head, do_head = head_of(queries, q_place, head), head_of(dout, q_place, head)

        for RUN in tl.static_range(2):
            for step in range(row_steps(span, half, RUN != FULL, IN_TURNS)):
                q_tile = row_tile(step, span, half, RUN != FULL, IN_TURNS)
                q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
                if RUN != FULL:
                    row = tl.minimum(q_idx, q_len - 1)
                    lo, hi, _ = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
                    # 0 · NaN is NaN: a row that sees none of these keys must not enter the sums.
                    q_mask = (q_idx < q_len) & (tl.maximum(lo, kv_start) < tl.minimum(hi, kv_start + TILE_KV))
                else:
                    q_mask = None
                    row = q_idx

                q = load_pieces(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
                do = load_pieces(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
                row_max = load_rows(max_ptr + rows_ptr, q_idx, q_mask)[None, :]  # [1, TILE_Q]
                sum_log2 = load_rows(sum_ptr + rows_ptr, q_idx, q_mask)[None, :]

                # Sᵀ = scores(K Qᵀ)
                sT = product(k, q, PRECISION)
                sT, inputs = apply_scores(
                    sT, batch, head, row[None, :], kv_row[:, None], SCORES, score_args
                )  # [TILE_KV, TILE_Q]
                pT = softmax_probabilities(sT, row_max, sum_log2, unit)
                keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, True)
                if RUN != FULL:
                    kept = q_mask[None, :] & kept_pairs(
                        row[None, :], kv_idx[:, None], kv_len, lo[None, :], hi[None, :], batch, head, KEEPS,
                        mask_args,
                    )  # fmt: skip
                    pT = tl.where(kept, pT, 0.0)
                    if HAS_GAPS:  # nor a row whose interval has keys here, none of which it sees
                        sees = tl.max(kept.to(tl.int32), 0) != 0
                        q, do = where_rows(sees, q), where_rows(sees, do)
                if HAS_DV:
                    # dV = dV + Pᵀ dO
                    dv = products(round_to(drop(pT, keep, dropout), do[0].dtype), do, dv, PRECISION)
                if HAS_DK:
                    # dPᵀ = V dOᵀ
                    dpT = product(v, do, PRECISION)
                    # Loaded only here, delta takes no registers before: 244, not 255 and spills (sm_90, 128).
                    delta = load_rows(delta_ptr + rows_ptr, q_idx, q_mask)[None, :]
                    # dSᵀ = Pᵀ · (dPᵀ - delta), and back to the dot products
                    dsT = pT * (drop(dpT, keep, dropout) - delta)
                    dsT = add_statistics(
                        dsT, pT, sT, kv_idx[:, None], row_max, sum_log2, unit,
                        load_row_gradients(of_rows, rows_ptr, q_idx, q_mask), True,
                    )  # fmt: skip
                    dsT = pull_back(
                        dsT, inputs, batch, head, row[None, :], kv_row[:, None], DERIVATIVES, score_args, 0
                    )
                    if RUN != FULL:
                        dsT = tl.where(kept, dsT, 0.0)
                    dsT = round_to(dsT, q[0].dtype)
                    # dK = dK + dSᵀ Q
                    dk = products(dsT, OPERAND(q), dk, PRECISION)
                if IN_TURNS:
                    tile = head_tiles + q_tile
                    before = add_share(
                        dsT, finite_k, kv_start // TILE_KV, ranges_ptr + tile * 4, shares, tile, before,
                        HEAD_DIM, HEAD_TILE, TILE_Q, TILE_KV, PRECISION,
                    )  # fmt: skip

    if IN_TURNS:
        pass_last_turn(shares[1], before)

    if HAS_DK:
        if unit is not None:
            dk = scaled(dk, unit)
        dk = PROJECT(dk, k)
    if IN_TURNS:  # the same keys, as `once_more` has them
        kv_idx = kv_start + tl.minimum(before, 0) + tl.arange(0, TILE_KV)
    elif SUMS != "dkv":
        kv_idx = once_more(kv_start // TILE_KV, kv_len, TILE_KV)
    dk_head, dv_head = head_of(dkeys, kv_place, kv_head), head_of(dvalues, kv_place, kv_head)
    if HAS_DK:
        dk = rounded(dk, dkeys[0].dtype.element_ty)
    if HAS_DV:
        dv = rounded(dv, dvalues[0].dtype.element_ty)
    if HAS_DK:
        store_pieces(dk_head, dk, kv_idx, kv_idx < kv_len, HEAD_DIM, HEAD_TILE)
    if HAS_DV:
        store_pieces(dv_head, dv, kv_idx, kv_idx < kv_len, VALUE_DIM, VALUE_TILE)


@triton.jit
def dkv_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    rows,  # dO and three numbers a row: `backward_arguments`
    of_rows,  # and those that statistics hand in: statistics.py
    ranges_ptr,
    lists,  # of the tiles of rows that visit each tile of keys: coverage.py; or ()
    dkeys,  # (pointer, strides), as for dvalues
    dvalues,
    DERIVATIVES: tl.constexpr,  # of SCORES, a function or None (it is 1) for each
    OPERAND: tl.constexpr,  # what Q and K become before they are multiplied: similarity.py
    PROJECT: tl.constexpr,  # what finishes dQ and dK
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    SUMS: tl.constexpr,
):
    sum_over_rows(
        tl.program_id(0), call, INTERVALS, KEEPS, SCORES, HEAD_DIM, VALUE_DIM, HEAD_TILE, VALUE_TILE,
        PRECISION, rows, of_rows, ranges_ptr, lists, dkeys, dvalues, None, DERIVATIVES, OPERAND, PROJECT,
        HAS_GAPS, TILE_Q, TILE_KV, SUMS,
    )  # fmt: skip


@triton.jit
def dq_kernel(
    call,  # tensors, sizes and what acts on scores: `shared_arguments`
    INTERVALS: tl.constexpr,
    KEEPS: tl.constexpr,
    SCORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    rows,  # dO and three numbers a row: `backward_arguments`
    of_rows,  # and those that statistics hand in: statistics.py
    lists,  # of the tiles of keys that each tile of rows visits: coverage.py; or ()
    dqueries,  # (pointer, strides)
    DERIVATIVES: tl.constexpr,
    OPERAND: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    dout, max_ptr, sum_ptr, delta_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    batch, head, q_idx, row, where, _tile, q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, kv_place, q_len, kv_len = where
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    if len(lists) > 0:
        span = listed_keys(lo, hi, kv_len, lists, ())
    else:
        span = kv_range(lo, hi, whole, kv_len, TILE_KV)

    q_head, do_head = head_of(queries, q_place, head), head_of(dout, q_place, head)
    k_walk = walked(keys, (), kv_place, head // group, layout)
    v_walk = walked(values, (), kv_place, head // group, layout)
    q = load_pieces(q_head, q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    do = load_pieces(do_head, q_idx, q_idx < q_len, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
    rows_ptr = rows_of(q_place, head, q_heads, q_rows)
    row_max = tl.load(max_ptr + rows_ptr + row)[:, None]  # [TILE_Q, 1]
    sum_log2 = tl.load(sum_ptr + rows_ptr + row)[:, None]
    delta = tl.load(delta_ptr + rows_ptr + row)[:, None]
    gradients = load_row_gradients(of_rows, rows_ptr, row, None)
    dq = zero_pieces(TILE_Q, HEAD_TILE)  # [TILE_Q, HEAD_TILE]

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(k_walk, kv_start, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_keys(
                v_walk, kv_start, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE
            )  # [TILE_KV, VALUE_TILE]

            # S = scores(Q Kᵀ)
            s = product(q, k, PRECISION)
            s, inputs = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            # dP = dO Vᵀ
            dp = product(do, v, PRECISION)
            dp = drop(dp, dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False), dropout)
            # dS = P · (dP - delta), and back to the dot products
            ds = p * (dp - delta)
            ds = add_statistics(ds, p, s, kv_idx[None, :], row_max, sum_log2, unit, gradients, False)
            ds = pull_back(ds, inputs, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, score_args, 0)
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                    mask_args,
                )  # fmt: skip
                ds = tl.where(kept, ds, 0.0)
                if HAS_GAPS:  # 0 · NaN is NaN: a key that no row sees must not enter the sum
                    seen = tl.max(kept.to(tl.int32), 0) != 0
                    k = where_rows(seen, k)

            # dQ = dQ + dS K
            dq = products(round_to(ds, k[0].dtype), OPERAND(k), dq, PRECISION)  # [TILE_Q, HEAD_TILE]

    if unit is not None:
        dq = scaled(dq, unit)
    dq = PROJECT(dq, q)
    if are_wide(HEAD_TILE):
        q_idx = once_more(q_tile, kv_len, TILE_Q)
    dq = rounded(dq, dqueries[0].dtype.element_ty)
    store_pieces(head_of(dqueries, q_place, head), dq, q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE)


def backward_arguments(backward: BackwardCall, tile: Tile) -> dict[str, Any]:
    """What the kernels that recompute scores take alike. `rows` is dO, with its strides, and what is known of
    each row, contiguous: row_max, sum_log2 and delta."""
    call = backward.call
    return shared_arguments(call) | dict(
        rows=((backward.do, backward.do.stride()), backward.row_max, backward.sum_log2, backward.delta),
        of_rows=backward.of_rows,
        DERIVATIVES=tuple([score.derivative for score in call.scores]),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


TOGETHER = 512  # columns of dK and dV that one program sums, of 16-bit rows


def sums_of(head_dim: int, value_dim: int, element_bytes: int) -> tuple[str, ...]:
    """What programs of dK and dV's pass sum: both, or each one of them, for which it is launched twice. fp32
    is multiplied by what also computes all else: there S once more costs more than it gains."""
    columns = padded_columns(head_dim) + padded_columns(value_dim)
    return ("dk", "dv") if element_bytes == 2 and columns > TOGETHER else ("dkv",)


def launch_dkv(
    backward: BackwardCall,
    dk: torch.Tensor,
    dv: torch.Tensor,
    tile: Tile,
    sums: tuple[str, ...] | None = None,
) -> None:
    """Fill dk [batch, kv_heads, kv_len, head_dim] and dv [batch, kv_heads, kv_len, value_dim]; of ("dv",)
    only dv, for which v is not read. tile.tile_q is that of `prepare`."""
    shape = backward.call.shape
    sums = sums or sums_of(shape.head_dim, shape.value_dim, dk.element_size())
    arguments = backward_arguments(backward, tile) | dict(
        ranges_ptr=backward.ranges,
        lists=list_rows(backward.call, tile),
        dkeys=(dk, dk.stride()),
        dvalues=(dv, dv.stride()),
        OPERAND=backward.call.operand,
        PROJECT=backward.call.project,
        HAS_GAPS=backward.call.has_gaps,
    )
    grid = key_programs(shape, tile.tile_kv, shape.kv_heads)
    for each in sums if grid else ():
        launch(dkv_kernel, (grid,), dk, **arguments, SUMS=each)


def launch_dq(backward: BackwardCall, dq: torch.Tensor, tile: Tile) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim]."""
    shape = backward.call.shape
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    arguments = backward_arguments(backward, tile) | dict(
        lists=list_keys(backward.call, tile, grid),
        dqueries=(dq, dq.stride()),
        OPERAND=backward.call.operand,
        PROJECT=backward.call.project,
        HAS_GAPS=backward.call.has_gaps,
    )
    if grid:
        launch(dq_kernel, (grid,), dq, **arguments)
