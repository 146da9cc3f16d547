"""The forward pass: O = softmax(scores(Q Kᵀ)) V, a tile at a time; the score matrix never exists in memory.

    S   = scores(Q Kᵀ)              [TILE_Q, TILE_KV]    scale, similarity and modifiers: scores.py
    S   = -inf where masked                              only in tiles that a mask cuts:  intervals.py
    P   = exp(S - row_max)                               the softmax state:               softmax.py
    O   = (Σ P V) / row_sum         [TILE_Q, value_dim]
    LSE = row_max + ln row_sum      [TILE_Q]

Each program owns one tile of query rows of one head and walks the key tiles that its mask allows: first those
in which every pair counts (█), then those that the mask cuts (▒); the others (·) are never visited.

                     keys ──►
    q_tile 0         ▒ · · · ·
    q_tile 1         █ ▒ · · ·          causal, TILE_Q = TILE_KV
    q_tile 2         █ █ ▒ · ·
    q_tile 3         █ █ █ ▒ ·

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .addressing import head_ptr, load_tile, store_tile
from .intervals import intersect_intervals, kept_pairs, kv_range
from .masks import BoundMask
from .numerics import float32_precision, matmul, round_to, widen
from .problem import Shape, ceil_div, next_power_of_two
from .scores import BoundScore, apply_scores
from .softmax import softmax_finish, softmax_merge, softmax_start, softmax_step
from .tiles import Tile


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [batch, q_heads, q_len] contiguous, or None
    sink_ptr,  # [q_heads], or None
    q_strides,  # (batch, head, row, dim), as for the next three
    k_strides,
    v_strides,
    out_strides,
    sink_stride,
    q_heads,
    group,  # query heads that share a head of keys and values
    q_len,
    kv_len,
    unit,  # exp(score) = exp(s · unit) for the s that SCORES leave; None: they are in natural units
    mask_args,
    score_args,
    INTERVALS: tl.constexpr,  # a function or None for each mask
    KEEPS: tl.constexpr,  # a function or None for each mask
    SCORES: tl.constexpr,  # a function for each modifier
    HAS_GAPS: tl.constexpr,  # some key inside a row tile's range may be seen by none of its rows
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # HEAD_DIM rounded up to a power of two; the rest reads as 0
    VALUE_TILE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads are neighbours in the grid where they share keys; the last query tiles, the longest under a causal
    # mask, start first.
    q_tiles = tl.cdiv(q_len, TILE_Q)
    program = tl.program_id(0)
    q_tile = q_tiles - 1 - program % q_tiles
    head = (program // q_tiles) % q_heads
    batch = program // q_tiles // q_heads

    q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    row = tl.minimum(q_idx, q_len - 1)  # masks and scores are asked about valid rows only
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args)
    start, stop, first, full_first, full_last, last = kv_range(lo, hi, whole, kv_len, TILE_KV)

    q_head_ptr = head_ptr(q_ptr, batch, head, q_strides)
    q = load_tile(q_head_ptr, q_idx, q_idx < q_len, q_strides, HEAD_DIM, HEAD_TILE)  # [TILE_Q, HEAD_TILE]
    k_head_ptr = head_ptr(k_ptr, batch, head // group, k_strides)
    v_head_ptr = head_ptr(v_ptr, batch, head // group, v_strides)
    row_max, row_sum, o = softmax_start(TILE_Q, VALUE_TILE)

    for IS_CUT in tl.static_range(2):
        tiles = full_last - full_first
        if IS_CUT:
            tiles = last - first - tiles
        for step in range(tiles):
            if IS_CUT:  # first .. full_first, then full_last .. last
                tile = first + step
                kv_tile = tl.where(tile < full_first, tile, tile + (full_last - full_first))
                kv_idx = kv_tile * TILE_KV + tl.arange(0, TILE_KV)  # [TILE_KV]
                kv_mask = (kv_idx >= start) & (kv_idx < stop)
                kv_row = tl.minimum(kv_idx, kv_len - 1)
            else:
                kv_idx = (full_first + step) * TILE_KV + tl.arange(0, TILE_KV)
                kv_mask = None
                kv_row = kv_idx

            # k [TILE_KV, HEAD_TILE], v [TILE_KV, VALUE_TILE]
            k = load_tile(k_head_ptr, kv_idx, kv_mask, k_strides, HEAD_DIM, HEAD_TILE)
            v = load_tile(v_head_ptr, kv_idx, kv_mask, v_strides, VALUE_DIM, VALUE_TILE)

            # S = scores(Q Kᵀ)
            s = tl.zeros([TILE_Q, TILE_KV], tl.float32)
            s = matmul(q, tl.trans(k), s, PRECISION)  # [TILE_Q, TILE_KV]
            s = apply_scores(s, batch, head, row, kv_row, SCORES, score_args)
            if IS_CUT:
                kept = kept_pairs(row, kv_idx, kv_len, lo, hi, batch, head, KEEPS, mask_args)
                s = tl.where(kept, s, float("-inf"))
                if HAS_GAPS:  # 0 · NaN is NaN: the value of a key that no row sees must not enter the sum
                    seen = tl.max(kept.to(tl.int32), 0) != 0
                    v = tl.where(seen[:, None], v, tl.zeros_like(v))

            row_max, row_sum, p, rescale = softmax_step(s, row_max, row_sum, unit)
            # O = O · rescale + P V
            o = matmul(round_to(p, v.dtype), v, o * rescale[:, None], PRECISION)  # [TILE_Q, VALUE_TILE]

    if unit is not None:
        row_max *= unit
    if sink_ptr is not None:
        # A sink is the state of one more key, whose value is 0.
        sink_max = tl.zeros_like(row_max) + widen(tl.load(sink_ptr + head.to(tl.int64) * sink_stride))
        sink_sum = tl.full([TILE_Q], 1.0, tl.float32)
        sink_o = tl.zeros_like(o)
        row_max, row_sum, o = softmax_merge(row_max, row_sum, o, sink_max, sink_sum, sink_o)
    o, lse = softmax_finish(row_max, row_sum, o)

    out = round_to(o, out_ptr.dtype.element_ty)
    out_head_ptr = head_ptr(out_ptr, batch, head, out_strides)
    store_tile(out_head_ptr, out, q_idx, q_idx < q_len, out_strides, VALUE_DIM, VALUE_TILE)
    if lse_ptr is not None:
        lse_row = (batch.to(tl.int64) * q_heads + head) * q_len
        tl.store(lse_ptr + lse_row + q_idx, lse, mask=q_idx < q_len)


class ForwardCall(NamedTuple):
    """Everything that one launch of the forward needs; `api` has checked it."""

    shape: Shape
    q: torch.Tensor  # [batch, q_heads, q_len, head_dim]
    k: torch.Tensor  # [batch, kv_heads, kv_len, head_dim]
    v: torch.Tensor  # [batch, kv_heads, kv_len, value_dim]
    out: torch.Tensor  # [batch, q_heads, q_len, value_dim]
    lse: torch.Tensor | None  # [batch, q_heads, q_len] fp32, contiguous
    sink: torch.Tensor | None  # [q_heads]
    masks: tuple[BoundMask, ...]
    scores: tuple[BoundScore, ...]
    unit: float | None
    has_gaps: bool


def power_of_two_tile(dim: int) -> int:
    """The columns of a tile that holds rows of `dim`: a power of two, at least the 16 a matmul needs."""
    return max(16, next_power_of_two(dim))


def forward_launch(call: ForwardCall, tile: Tile) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The grid and the arguments with which `forward_kernel` answers `call`."""
    shape = call.shape
    q_tiles = ceil_div(shape.q_len, tile.tile_q)
    arguments = dict(
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        out_ptr=call.out,
        lse_ptr=call.lse,
        sink_ptr=call.sink,
        q_strides=call.q.stride(),
        k_strides=call.k.stride(),
        v_strides=call.v.stride(),
        out_strides=call.out.stride(),
        sink_stride=0 if call.sink is None else call.sink.stride(0),
        q_heads=shape.q_heads,
        group=shape.group,
        q_len=shape.q_len,
        kv_len=shape.kv_len,
        unit=call.unit,
        mask_args=tuple(mask.args for mask in call.masks),
        score_args=tuple(score.args for score in call.scores),
        INTERVALS=tuple(mask.interval for mask in call.masks),
        KEEPS=tuple(mask.keep for mask in call.masks),
        SCORES=tuple(score.score for score in call.scores),
        HAS_GAPS=call.has_gaps,
        HEAD_DIM=shape.head_dim,
        VALUE_DIM=shape.value_dim,
        HEAD_TILE=power_of_two_tile(shape.head_dim),
        VALUE_TILE=power_of_two_tile(shape.value_dim),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        PRECISION=float32_precision(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return (q_tiles * shape.q_heads * shape.batch,), arguments


def launch_forward(call: ForwardCall, tile: Tile) -> None:
    """Fill call.out and call.lse on the tensors' device."""
    if call.out.numel() == 0 and (call.lse is None or call.lse.numel() == 0):
        return
    grid, arguments = forward_launch(call, tile)
    if call.q.is_cuda:
        with torch.cuda.device(call.q.device):
            forward_kernel[grid](**arguments)
    else:
        forward_kernel[grid](**arguments)
