"""What the tests of `tilewise.sdpa` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import tilewise
from tilewise_reference.yardstick import allowed_error, difference, largest_difference

Tensor = torch.Tensor
KERNELS, PLAIN, PYTORCH = "tilewise portable", "tilewise plain PyTorch", "PyTorch"


@pytest.fixture(autouse=True)
def fresh_switch() -> Iterator[None]:
    """An empty report, small tiles, and no mode that a test leaves behind."""
    tilewise.sdpa.clear()
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield
    assert not _get_current_function_mode_stack()
    tilewise.sdpa.clear()


def qkv(*shape: int, device: Any = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shape = shape or (2, 3, 5, 8)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]


def wide(*tensors: Tensor) -> list[Tensor]:
    """Tensors of a head_dim that tilewise does not support."""
    return [x.repeat(1, 1, 1, 600 // x.shape[3] + 1) for x in tensors]


def who() -> list[str]:
    """Who answered, a name for each call; and the calls are forgotten."""
    entries = tilewise.sdpa.report().entries
    tilewise.sdpa.clear()
    return [entry.answered_by for entry in entries for _ in range(entry.calls)]


def reasons() -> str:
    """Every reason of the report, and the calls are forgotten."""
    entries = tilewise.sdpa.report().entries
    tilewise.sdpa.clear()
    return " ".join([reason for entry in entries for reason in entry.reasons])


def assert_no_further(got: Tensor, pytorchs: Tensor, exact: Tensor) -> None:
    """No element of a model's result may be further from float64's than the rule for a match allows."""
    assert got.shape == exact.shape and got.dtype == pytorchs.dtype
    error = largest_difference(pytorchs, exact)
    assert (difference(got, exact) <= allowed_error(exact, got.dtype, error)).all()


def assert_model_matches(model: torch.nn.Module, run: Any, switched: Any) -> None:
    """A model's result and gradients with the switch, as exact as without it. run(model, dtype) runs it;
    switched(model) runs it in fp32 with the switch on."""

    def results(model: torch.nn.Module, out: Tensor) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
        return [out.detach(), *[grad for grad in grads if grad is not None]]

    got, pytorchs = results(model, switched(model)), results(model, run(model, torch.float32))
    exact = results(model.double(), run(model, torch.float64))
    model.float()
    assert len(got) == len(pytorchs) == len(exact) > 1
    for one, theirs, exactly in zip(got, pytorchs, exact, strict=True):
        assert_no_further(one, theirs, exactly)
