"""Memory that shows whoever leaves it unwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` is filled with NaN (integers: with the largest), so that what a kernel leaves
    unwritten shows in the result. PyTorch ties this to its deterministic mode."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with properties, of which type checkers know nothing
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
