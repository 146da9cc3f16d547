"""What passes between the forward and the backward of aten's flash attention, and how it lies in memory."""

from __future__ import annotations

import torch

from ..parts.numerics import LOG2E

Tensor = torch.Tensor


def new_state(dropout_p: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of dropout, uint64 [2], drawn from PyTorch's generator if there is any, and what else the op
    returns, which nobody reads. A CUDA graph draws anew at each replay."""
    unused = torch.empty((), dtype=torch.uint64, device=device)
    if dropout_p == 0:
        return torch.empty(2, dtype=torch.uint64, device=device), unused
    drawn = torch.randint(-(1 << 62), 1 << 62, (2,), dtype=torch.int64, device=device)
    return drawn.view(torch.uint64), unused


def seed_of(state: Tensor) -> Tensor:
    """tilewise's seed, int64 [1], in the state."""
    return state.view(torch.int64)[:1]


def statistics_of(logsumexp: Tensor) -> Tensor:
    """lse [batch, heads, length] or [heads, tokens] as the statistics that the backward reads: a maximum of 0
    and the logarithm of the sum to base 2; rows that see no key have a maximum of -inf."""
    lse = logsumexp if logsumexp.dim() == 3 else logsumexp.unsqueeze(0)
    is_empty = lse.isinf()
    row_max = torch.zeros_like(lse).masked_fill_(is_empty, -torch.inf)
    return torch.stack([row_max, (lse * LOG2E.value).masked_fill_(is_empty, 0.0)])


def laid_out_as(given: Tensor, x: Tensor) -> Tensor:
    """x with the strides of `empty_like(given)`, on which PyTorch's compiler counts."""
    if x.stride() == torch.empty_like(given, device="meta").stride():
        return x
    return torch.empty_like(given).copy_(x)
