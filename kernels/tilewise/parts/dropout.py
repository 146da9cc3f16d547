"""Which probabilities are kept under dropout? A random bit a pair, drawn from a counter and never stored.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key and a counter
into four 32-bit words. The key is the seed; the counter is (kv_idx div 4, q_idx, head, batch), and the word
kv_idx mod 4 decides about the pair. So forward and backward draw the same bits by construction, whatever
their tiles are, and neither lengths nor neighbours play a part. The seed is read on the device: a CUDA graph
that is replayed draws anew if the seed was drawn inside it.

    P_dropped = P · keep / (1 - dropout_p)        keep: word div 2 ≥ dropout_p · 2³¹

For dropout_p = 1 no pair is kept, and the result is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """The probability of dropping a pair, above 0 and at most 1, and the seed [1] int64 on the device."""

    p: float
    seed: torch.Tensor

    def args(self, asked: tuple[int, int, int, int, int] | None = None) -> tuple[Any, ...]:
        """What the device functions below take as `dropout`; without dropout it is (). asked: where the call
        begins in one that it is a part of, `Place.asked`, along keys a multiple of 4."""
        args = self.seed, round(self.p * 2**31), 1.0 / (1.0 - self.p) if self.p < 1 else 0.0
        return args if asked is None else (*args, asked)


@triton.jit
def dropout_keep(batch, head, q_idx, kv_start, dropout, TILE_KV: tl.constexpr, IS_TRANSPOSED: tl.constexpr):
    """Whether each pair of rows q_idx [TILE_Q] and keys kv_start.. is kept: [TILE_Q, TILE_KV], or the
    transpose of it; without dropout (), which `drop` does not look at. kv_start is a multiple of 4; head may
    be one a row, [TILE_Q, 1]."""
    if len(dropout) == 0:
        return ()
    else:
        if len(dropout) == 4:  # a part of a larger call, whose pairs these are
            origin = dropout[3]
            batch, head = batch % origin[4] + origin[0], head + origin[1]
            q_idx, kv_start = q_idx + origin[2], kv_start + origin[3]
        zeros = q_idx[:, None] * 0 + tl.arange(0, TILE_KV // 4)[None, :] * 0  # [TILE_Q, TILE_KV / 4]
        quad = zeros + (kv_start // 4 + tl.arange(0, TILE_KV // 4))[None, :]
        row = zeros + q_idx[:, None]
        seed = tl.load(dropout[0])
        a, b, c, d = tl.philox(seed, quad, row, zeros + head, zeros + batch)
        words = tl.join(tl.join(a, c), tl.join(b, d))  # [TILE_Q, TILE_KV / 4, 2, 2]
        words = tl.reshape(words, [q_idx.shape[0], TILE_KV])
        keep = (words >> 1).to(tl.int32) >= dropout[1]
        if IS_TRANSPOSED:
            return tl.trans(keep.to(tl.int8)) != 0
        else:
            return keep


@triton.jit
def drop(x, keep, dropout):
    """x · keep / (1 - p); x without dropout."""
    if len(dropout) == 0:
        return x
    else:
        return tl.where(keep, x * dropout[2], 0.0)
