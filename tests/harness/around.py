"""What decides about a launch and is no argument of the call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tilewise.plan import tiles
from tilewise.tools.compiled.variants import float32_precision


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
    "precision": lambda: float32_precision("high"),
    "deterministic mode": lambda: deterministic(False),
    "a forced tile": lambda: tiles.use(tiles.Tile(16, 32)),
    "another": lambda: tiles.use(tiles.Tile(32, 16)),
    "of one pass": lambda: tiles.use(tiles.Tile(16, 32), ["dq"]),
    "one walk": lambda: tiles.use_walks(1),
    "no gradients": torch.no_grad,
}
