"""DTensors, PyTorch's tensors that several devices hold together: which they are, and making them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def is_dtensor(x: Any) -> bool:
    """Without importing DTensor's module: who has one has imported it."""
    if type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def dim_of(placement: Any) -> int | None:
    """The dimension along which a placement shards; None for all others."""
    return int(placement.dim) if placement.is_shard() else None


def whole_of(x: Any) -> Any:
    """All of a tensor that has no gradient, on each rank."""
    return x.full_tensor() if is_dtensor(x) else x


def from_part(x: torch.Tensor, mesh: Any, placements: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The DTensor of these sizes of which x is this rank's part, in the order of memory that x has."""
    from torch.distributed.tensor import DTensor

    strides, stride = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda d: (x.stride(d), -d)):
        strides[dim] = stride
        stride *= max(sizes[dim], 1)
    return DTensor.from_local(
        x, mesh, placements, run_check=False, shape=torch.Size(sizes), stride=tuple(strides)
    )
