"""What decides about a launch and is no argument of the call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tilewise.plan import tiles


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """As PyTorch's setting of float32's products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """As PyTorch's switch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


AROUND = {
    "precision": lambda: precision("high"),
    "deterministic mode": lambda: deterministic(False),
    "a forced tile": lambda: tiles.use(tiles.Tile(16, 32)),
    "another": lambda: tiles.use(tiles.Tile(32, 16)),
    "of one pass": lambda: tiles.use(tiles.Tile(16, 32), ["dq"]),
    "one walk": lambda: tiles.use_walks(1),
    "no gradients": torch.no_grad,
}
