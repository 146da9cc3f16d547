"""Calls for `explain` that hold nothing: q, k and v on the device meta."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.interpreted import set_interpreted
from tilewise.tools.explain.command import GROUPS

ALL_CASES = {case.name: case for cases in GROUPS.values() for case in cases}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def attend(q_len: int = 4096, heads: int = 16, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list:
    return [meta(1, heads, q_len, dim, dtype=dtype) for _ in range(3)]


def leave_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where TRITON_INTERPRET is not set."""
    set_interpreted(monkeypatch, False)
    for module in ("explain", "coverage"):
        monkeypatch.setattr(f"tilewise.tools.explain.{module}.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def prose(found: Any) -> str:
    """An explanation without line breaks."""
    return " ".join(str(found).split())


class Launcher:
    """A kernel that only notes under its name how many programs it is launched with."""

    def __init__(self, name: str, grids: dict[str, int]) -> None:
        self.name, self.grids = name, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids[self.name] = math.prod(grid)
        return lambda *_, **__: None


TRAINING_KERNELS = {
    "forward": "forward.forward", "prepare": "prepare.prepare", "dq": "backward.dq", "dkv": "backward.dkv",
    "gradient of RelativePosition.table": "parameters.parameter",
}  # fmt: skip


def launched_grids(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, str]) -> dict[str, int]:
    """The programs of every launch, by these names of the kernels, as they are asked for from here on."""
    grids: dict[str, int] = {}
    for name, module in kernels.items():
        monkeypatch.setattr(f"tilewise.kernels.{module}_kernel", Launcher(name, grids))
    return grids
