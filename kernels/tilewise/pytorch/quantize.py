"""Making fp8 numbers: the library op `tilewise::quantize`, by the kernel and in plain PyTorch."""

from __future__ import annotations

import torch

from tilewise_reference.fp8 import quantize as definition

from ..kernels.quantize import SMALLEST_SCALE, launch_quantize
from ..parts.fp8 import empty_numbers
from ..parts.shape import ceil_div
from .ops import library

Tensor = torch.Tensor
MEASURED_ROWS = 128  # that a program measures of a longer stretch

# rows: of a tile; 0: a number for each head, -1: for the tensor.
library.define(
    "quantize(Tensor x, int rows, bool is_rotated, bool along_rows, str impl) -> (Tensor x8, Tensor scale)"
)


def quantize(x: Tensor, rows: int, is_rotated: bool, along_rows: bool, impl: str) -> tuple[Tensor, Tensor]:
    """x [blocks, heads, length, dim] as e4m3 numbers and their scales."""
    x8, scale = empty_numbers(x, rows, along_rows)
    if impl == "torch":
        per = rows if rows > 0 else "head" if rows == 0 else "tensor"
        found = definition(x, per, is_rotated)
        return x8.copy_(found.x8), scale.copy_(found.scale)
    if rows > 0:
        launch_quantize(x, x8, scale, rows, is_rotated, is_measured=False)
        return x8, scale
    tiles = ceil_div(x.shape[2], MEASURED_ROWS)
    measured = scale.new_empty(*x.shape[:2], tiles)
    launch_quantize(x, None, measured, MEASURED_ROWS, is_rotated, is_measured=False)
    if 0 not in measured.shape:
        most = measured.amax(2) if rows == 0 else measured.amax()
        scale.copy_(torch.where(most > 0, most.clamp_min(SMALLEST_SCALE.value), 1.0))
    spread = scale.expand(x.shape[:2])[..., None].expand(-1, -1, tiles)
    launch_quantize(x, x8, spread, MEASURED_ROWS, is_rotated, is_measured=True)
    return x8, scale


def quantize_shapes(
    x: Tensor, rows: int, is_rotated: bool, along_rows: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return empty_numbers(x, rows, along_rows)


for key in ("CPU", "CUDA"):
    library.impl("quantize", quantize, key)
torch.library.register_fake("tilewise::quantize", quantize_shapes, lib=library)
