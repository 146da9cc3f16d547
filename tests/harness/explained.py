"""Calls for `explain` that hold nothing: q, k and v on the device meta."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.tools.explain.command import GROUPS

ALL_CASES = {case.name: case for cases in GROUPS.values() for case in cases}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def attend(q_len: int = 4096, heads: int = 16, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list:
    return [meta(1, heads, q_len, dim, dtype=dtype) for _ in range(3)]


def prose(found: Any) -> str:
    """An explanation without line breaks."""
    return " ".join(str(found).split())
