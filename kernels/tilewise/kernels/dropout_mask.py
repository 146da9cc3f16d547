"""The pairs that dropout keeps, as a mask: for tests and for looking."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..parts.dropout import Dropout, dropout_keep
from ..parts.shape import Shape, ceil_div
from .launch import launch


@triton.jit
def dropout_mask_kernel(
    keep_ptr, q_heads, q_len, kv_len, dropout, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr
):
    q_tiles, kv_tiles = tl.cdiv(q_len, TILE_Q), tl.cdiv(kv_len, TILE_KV)
    program = tl.program_id(0)
    kv_tile, q_tile = program % kv_tiles, program // kv_tiles % q_tiles
    head, batch = program // kv_tiles // q_tiles % q_heads, program // kv_tiles // q_tiles // q_heads
    q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)
    kv_idx = kv_tile * TILE_KV + tl.arange(0, TILE_KV)
    keep = dropout_keep(batch, head, q_idx, kv_tile * TILE_KV, dropout, TILE_KV, False)
    row = (batch.to(tl.int64) * q_heads + head) * q_len + q_idx
    inside = (q_idx < q_len)[:, None] & (kv_idx < kv_len)[None, :]
    tl.store(keep_ptr + row[:, None] * kv_len + kv_idx[None, :], keep.to(tl.uint8), mask=inside)


def launch_dropout_mask(dropout: Dropout, shape: Shape) -> torch.Tensor:
    """The pairs that the kernels keep, bool [batch, q_heads, q_len, kv_len]."""
    keep = torch.empty(shape.scores, dtype=torch.uint8, device=dropout.seed.device)
    programs = ceil_div(shape.q_len, 32) * ceil_div(shape.kv_len, 32) * shape.q_heads * shape.batch
    if programs:
        sizes = shape.q_heads, shape.q_len, shape.kv_len
        launch(dropout_mask_kernel, (programs,), keep, keep, *sizes, dropout.args(), TILE_Q=32, TILE_KV=32)
    return keep.view(torch.bool)
