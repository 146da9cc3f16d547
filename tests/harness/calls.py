"""A call that breaks no rule, with every argument present, and what tests of messages change in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

import tilewise

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 2, 5, 7, 8
Q, K = (BATCH, Q_HEADS, Q_LEN, DIM), (BATCH, KV_HEADS, KV_LEN, DIM)
HALF, BOOL, INT = dict(dtype=torch.float16), dict(dtype=torch.bool), dict(dtype=torch.int32)
# Nothing beside q, k and v.
BARE = dict(mask=None, bias=None, score=None, scale=None, similarity="dot", sink=None)


@triton.jit
def even_keys(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx % 2 == 0)


@triton.jit
def doubled(s, batch, head, q_idx, kv_idx, args):
    return s * 2.0


def good(device: torch.device) -> dict[str, Any]:
    """A call that breaks no rule, with every argument present."""
    return dict(
        q=torch.randn(BATCH, Q_HEADS, Q_LEN, DIM, device=device),
        k=torch.randn(BATCH, KV_HEADS, KV_LEN, DIM, device=device),
        v=torch.randn(BATCH, KV_HEADS, KV_LEN, DIM, device=device),
        mask=tilewise.Causal("bottom_right") & tilewise.Padding(torch.tensor([7, 3], device=device)),
        bias=torch.zeros(Q_HEADS, 1, KV_LEN, device=device),
        score=[tilewise.Softcap(5.0), tilewise.ALiBi(tilewise.alibi_slopes(Q_HEADS, device), "top_left")],
        scale=torch.tensor(0.5, device=device),
        similarity=tilewise.Cosine(torch.ones(Q_HEADS, device=device)),
        sink=torch.zeros(Q_HEADS, device=device),
        impl=None,
    )


def zeros(*shape: int, **options: Any) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.zeros(shape, **({"device": device} | options))
