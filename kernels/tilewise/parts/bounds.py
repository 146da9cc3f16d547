"""Which keys does each row see? The host's answer, in plain PyTorch, for tools that look at a call without
running it: what a mask's `bounds` is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .shape import POSITIONS, Align, Shape

UNLIMITED = 1 << 30  # further than any sequence is long
FIRST_KEY = torch.zeros((), dtype=torch.int64, device="cpu")


class Bounds(NamedTuple):
    """What an interval says of every row: the keys lo..hi, and whether all of these count. int64, int64 and
    bool, on the CPU; each broadcasts to [batch, q_heads, q_len]."""

    lo: torch.Tensor
    hi: torch.Tensor
    whole: torch.Tensor = torch.ones((), dtype=torch.bool, device="cpu")


def positions(shape: Shape, align: Align) -> torch.Tensor:
    """The key position at which each row stands; [q_len], or where sequences differ [batch, 1, q_len]."""
    rows, shift = torch.arange(shape.q_len, device="cpu"), shape.shift(align)
    if isinstance(shift, torch.Tensor):
        return rows + on_host(shift).clamp(-POSITIONS, POSITIONS)[..., None, None]
    return rows + shift


def on_host(x: int | torch.Tensor) -> torch.Tensor:
    """x on the CPU, in int64; what lies further out than any sequence is long stays further out."""
    if isinstance(x, torch.Tensor):
        return x.to("cpu", torch.int64).clamp(-UNLIMITED, UNLIMITED)
    return FIRST_KEY + min(x, UNLIMITED)
