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

dkv_kernel works on the transposes Sᵀ, Pᵀ and dSᵀ [TILE_KV, TILE_Q], so that Pᵀ and dSᵀ are left operands of
its products, which tensor cores take from registers.

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2; LSE's gradient joins delta.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.addressing import head_of, load_rows, load_tile, rows_of, store_tile, tensors_of
from ..parts.dropout import drop, dropout_keep
from ..parts.intervals import cut_tile, intersect_intervals, kept_pairs, kv_range, q_range
from ..parts.numerics import matmul, round_to
from ..parts.scores.score import apply_scores, pull_back
from ..parts.sequences import first_tile, tiles_of
from ..parts.softmax import softmax_probabilities
from .call import programs, shared_arguments
from .launch import launch
from .prepare import BackwardCall
from .tile import Tile
from .walk import load_keys, own_keys, own_rows, step_keys, steps_of


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
    ranges_ptr,
    dkeys,  # (pointer, strides), as for dvalues
    dvalues,
    DERIVATIVES: tl.constexpr,  # of SCORES, a function or None (it is 1) for each
    OPERAND: tl.constexpr,  # what Q and K become before they are multiplied: similarity.py
    PROJECT: tl.constexpr,  # what finishes dQ and dK
    HAS_GAPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    pointers, strides, sizes, layout, unit, dropout, mask_args, score_args = call
    queries, keys, values = tensors_of(pointers, strides)
    dout, max_ptr, sum_ptr, delta_ptr = rows
    q_heads, group, q_rows, _kv_rows = sizes
    batch, kv_head, kv_start, where = own_keys(sizes, layout, TILE_KV)
    q_place, kv_place, q_len, kv_len = where
    q_tiles = tl.cdiv(q_len, TILE_Q)
    range_tiles, range_first = tiles_of(q_rows, layout[0], TILE_Q), first_tile(q_place, batch, layout, TILE_Q)

    kv_idx = kv_start + tl.arange(0, TILE_KV)  # [TILE_KV]
    kv_row = tl.minimum(kv_idx, kv_len - 1)
    k_head, v_head = head_of(keys, kv_place, kv_head), head_of(values, kv_place, kv_head)
    k = load_tile(k_head, kv_idx, kv_idx < kv_len, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
    v = load_tile(v_head, kv_idx, kv_idx < kv_len, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]
    dk = tl.zeros([TILE_KV, HEAD_TILE], tl.float32)
    dv = tl.zeros([TILE_KV, VALUE_TILE], tl.float32)

    for member in range(group):
        head = kv_head * group + member
        rows_ptr = rows_of(q_place, head, q_heads, q_rows)
        head_tiles = (q_place[0].to(tl.int64) * q_heads + head) * range_tiles + range_first
        head_ranges_ptr = ranges_ptr + head_tiles * 4
        first, full_first, full_last, last = q_range(
            head_ranges_ptr, q_tiles, kv_start, kv_start + TILE_KV, 128
        )
        q_head, do_head = head_of(queries, q_place, head), head_of(dout, q_place, head)

        for IS_CUT in tl.static_range(2):
            tiles = full_last - full_first
            if IS_CUT:
                tiles = last - first - tiles
            for step in range(tiles):
                if IS_CUT:
                    q_tile = cut_tile(step, first, full_first, full_last)
                    q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
                    row = tl.minimum(q_idx, q_len - 1)
                    lo, hi, _ = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
                    # 0 · NaN is NaN: a row that sees none of these keys must not enter the sums.
                    q_mask = (q_idx < q_len) & (tl.maximum(lo, kv_start) < tl.minimum(hi, kv_start + TILE_KV))
                else:
                    q_idx = (full_first + step) * TILE_Q + tl.arange(0, TILE_Q)
                    q_mask = None
                    row = q_idx

                q = load_tile(q_head, q_idx, q_mask, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
                do = load_tile(do_head, q_idx, q_mask, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
                row_max = load_rows(max_ptr + rows_ptr, q_idx, q_mask)[None, :]  # [1, TILE_Q]
                sum_log2 = load_rows(sum_ptr + rows_ptr, q_idx, q_mask)[None, :]

                # Sᵀ = scores(K Qᵀ)
                sT = matmul(k, tl.trans(q), tl.zeros([TILE_KV, TILE_Q], tl.float32), PRECISION)
                sT, inputs = apply_scores(
                    sT, batch, head, row[None, :], kv_row[:, None], SCORES, score_args
                )  # [TILE_KV, TILE_Q]
                pT = softmax_probabilities(sT, row_max, sum_log2, unit)
                keep = dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, True)
                if IS_CUT:
                    kept = q_mask[None, :] & kept_pairs(
                        row[None, :], kv_idx[:, None], kv_len, lo[None, :], hi[None, :], batch, head, KEEPS,
                        mask_args,
                    )  # fmt: skip
                    pT = tl.where(kept, pT, 0.0)
                    if HAS_GAPS:  # nor a row whose interval has keys here, none of which it sees
                        sees = tl.max(kept.to(tl.int32), 0) != 0
                        q = tl.where(sees[:, None], q, tl.zeros_like(q))
                        do = tl.where(sees[:, None], do, tl.zeros_like(do))
                # dV = dV + Pᵀ dO
                dv = matmul(round_to(drop(pT, keep, dropout), do.dtype), do, dv, PRECISION)
                # dPᵀ = V dOᵀ
                dpT = matmul(v, tl.trans(do), tl.zeros([TILE_KV, TILE_Q], tl.float32), PRECISION)
                # Loaded only here, delta takes no registers before: 244, not 255 and spills (sm_90, 128).
                delta = load_rows(delta_ptr + rows_ptr, q_idx, q_mask)[None, :]
                # dSᵀ = Pᵀ · (dPᵀ - delta), and back to the dot products
                dsT = pT * (drop(dpT, keep, dropout) - delta)
                dsT = pull_back(
                    dsT, inputs, batch, head, row[None, :], kv_row[:, None], DERIVATIVES, score_args, 0
                )
                if IS_CUT:
                    dsT = tl.where(kept, dsT, 0.0)
                # dK = dK + dSᵀ Q
                dk = matmul(round_to(dsT, q.dtype), OPERAND(q), dk, PRECISION)

    if unit is not None:
        dk *= unit
    dk = PROJECT(dk, k)
    dk_head, dv_head = head_of(dkeys, kv_place, kv_head), head_of(dvalues, kv_place, kv_head)
    dk, dv = round_to(dk, dkeys[0].dtype.element_ty), round_to(dv, dvalues[0].dtype.element_ty)
    store_tile(dk_head, dk, kv_idx, kv_idx < kv_len, HEAD_DIM, HEAD_TILE)
    store_tile(dv_head, dv, kv_idx, kv_idx < kv_len, VALUE_DIM, VALUE_TILE)


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
    batch, head, q_idx, row, where, _tile, _q_tile = own_rows(sizes, layout, TILE_Q)
    q_place, kv_place, q_len, kv_len = where
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    span = kv_range(lo, hi, whole, kv_len, TILE_KV)

    q_head, do_head = head_of(queries, q_place, head), head_of(dout, q_place, head)
    k_head, v_head = head_of(keys, kv_place, head // group), head_of(values, kv_place, head // group)
    q = load_tile(q_head, q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    do = load_tile(do_head, q_idx, q_idx < q_len, VALUE_DIM, VALUE_TILE)  # [TILE_Q, VALUE_TILE]
    rows_ptr = rows_of(q_place, head, q_heads, q_rows)
    row_max = tl.load(max_ptr + rows_ptr + row)[:, None]  # [TILE_Q, 1]
    sum_log2 = tl.load(sum_ptr + rows_ptr + row)[:, None]
    delta = tl.load(delta_ptr + rows_ptr + row)[:, None]
    dq = tl.zeros([TILE_Q, HEAD_TILE], tl.float32)

    for IS_CUT in tl.static_range(2):
        for step in range(steps_of(span, IS_CUT)):
            kv_start, kv_idx, kv_row = step_keys(step, span, kv_len, IS_CUT, TILE_KV)
            k = load_keys(k_head, kv_idx, span, IS_CUT, HEAD_DIM, HEAD_TILE)  # [TILE_KV, HEAD_TILE]
            v = load_keys(v_head, kv_idx, span, IS_CUT, VALUE_DIM, VALUE_TILE)  # [TILE_KV, VALUE_TILE]

            # S = scores(Q Kᵀ)
            s = matmul(q, tl.trans(k), tl.zeros([TILE_Q, TILE_KV], tl.float32), PRECISION)
            s, inputs = apply_scores(s, batch, head, row[:, None], kv_row[None, :], SCORES, score_args)
            p = softmax_probabilities(s, row_max, sum_log2, unit)  # [TILE_Q, TILE_KV]
            # dP = dO Vᵀ
            dp = matmul(do, tl.trans(v), tl.zeros([TILE_Q, TILE_KV], tl.float32), PRECISION)
            dp = drop(dp, dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV, False), dropout)
            # dS = P · (dP - delta), and back to the dot products
            ds = p * (dp - delta)
            ds = pull_back(ds, inputs, batch, head, row[:, None], kv_row[None, :], DERIVATIVES, score_args, 0)
            if IS_CUT:
                kept = kept_pairs(
                    row[:, None], kv_idx[None, :], kv_len, lo[:, None], hi[:, None], batch, head, KEEPS,
                    mask_args,
                )  # fmt: skip
                ds = tl.where(kept, ds, 0.0)
                if HAS_GAPS:  # 0 · NaN is NaN: a key that no row sees must not enter the sum
                    seen = tl.max(kept.to(tl.int32), 0) != 0
                    k = tl.where(seen[:, None], k, tl.zeros_like(k))

            # dQ = dQ + dS K
            dq = matmul(round_to(ds, k.dtype), OPERAND(k), dq, PRECISION)  # [TILE_Q, HEAD_TILE]

    if unit is not None:
        dq *= unit
    dq = PROJECT(dq, q)
    dq = round_to(dq, dqueries[0].dtype.element_ty)
    store_tile(head_of(dqueries, q_place, head), dq, q_idx, q_idx < q_len, HEAD_DIM, HEAD_TILE)


def backward_arguments(backward: BackwardCall, tile: Tile) -> dict[str, Any]:
    """What the kernels that recompute scores take alike. `rows` is dO, with its strides, and what is known of
    each row, contiguous: row_max, sum_log2 and delta."""
    call = backward.call
    return shared_arguments(call) | dict(
        rows=((backward.do, backward.do.stride()), backward.row_max, backward.sum_log2, backward.delta),
        DERIVATIVES=tuple([score.derivative for score in call.scores]),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_dkv(backward: BackwardCall, dk: torch.Tensor, dv: torch.Tensor, tile: Tile) -> None:
    """Fill dk [batch, kv_heads, kv_len, head_dim] and dv [batch, kv_heads, kv_len, value_dim].
    tile.tile_q is that of `prepare`."""
    shape = backward.call.shape
    arguments = backward_arguments(backward, tile) | dict(
        ranges_ptr=backward.ranges,
        dkeys=(dk, dk.stride()),
        dvalues=(dv, dv.stride()),
        OPERAND=backward.call.operand,
        PROJECT=backward.call.project,
        HAS_GAPS=backward.call.has_gaps,
    )
    grid = programs(shape, shape.kv_len, tile.tile_kv, shape.kv_heads)
    if grid:
        launch(dkv_kernel, (grid,), dk, **arguments)


def launch_dq(backward: BackwardCall, dq: torch.Tensor, tile: Tile) -> None:
    """Fill dq [batch, q_heads, q_len, head_dim]."""
    shape = backward.call.shape
    arguments = backward_arguments(backward, tile) | dict(
        dqueries=(dq, dq.stride()),
        OPERAND=backward.call.operand,
        PROJECT=backward.call.project,
        HAS_GAPS=backward.call.has_gaps,
    )
    grid = programs(shape, shape.q_len, tile.tile_q, shape.q_heads)
    if grid:
        launch(dq_kernel, (grid,), dq, **arguments)
