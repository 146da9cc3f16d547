"""Rules on q, k and v in float8_e4m3fn: their scales, the chips that multiply them, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

from ...kernels.copies import is_without_memory
from ...parts.dtensors import is_dtensor
from ...parts.fp8 import FP8, Scales, scale_sizes
from ...parts.shape import FLOATS, fits
from .. import tiles
from ..implementation import implementation
from ..request import Request

QUANTIZE = "tilewise.quantize(q, k, v) makes both"
FORWARD_ALONE = "and fp8 has a forward alone: call it under torch.no_grad(), or give q, k and v in 16 bits"


def scales_are_given(r: Request) -> str | None:
    """fp8 numbers come with what they stand for, and nothing else does."""
    if r.scales is None:
        return (
            f"q.dtype={FP8} goes with scales=tilewise.Scales(...): {QUANTIZE}" if r.q.dtype == FP8 else None
        )
    if not isinstance(r.scales, Scales):
        return f"scales={type(r.scales).__name__} must be tilewise.Scales(q, k, v): {QUANTIZE}"
    if r.q.dtype != FP8:
        return f"scales go with q, k and v in {FP8}, and q is {r.q.dtype}: {QUANTIZE}"
    return None


def scales_fit(r: Request) -> str | None:
    return ("; ".join(scale_misfits(r)) or None) if isinstance(r.scales, Scales) else None


def scale_misfits(r: Request) -> Iterator[str]:
    scales = r.scales
    assert scales is not None
    rows = scales.rows
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        yield f"Scales(rows={rows!r}) must be None or a number of rows from 1 on"
        return
    if scales.dtype not in FLOATS:
        yield f"Scales(dtype={scales.dtype!r}) must be one of {', '.join(map(str, FLOATS))}"
    q_sizes, kv_sizes = scale_sizes(r.shape, rows)
    for name, scale, sizes in (
        ("q", scales.q, q_sizes),
        ("k", scales.k, kv_sizes),
        ("v", scales.v, kv_sizes),
    ):
        if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
            given = scale.dtype if isinstance(scale, torch.Tensor) else repr(scale)
            yield f"scales.{name}={given} must be a tensor of dtype torch.float32"
        elif not fits(tuple(scale.shape), sizes):
            axes = "[batch, heads]" if rows is None else f"[batch, heads, tiles of {rows} rows]"
            yield f"scales.{name}.shape={tuple(scale.shape)} must broadcast to {axes} = {list(sizes)}"


def chip_multiplies_fp8(r: Request) -> str | None:
    if r.scales is None or implementation(r) == "torch" or r.q.device.type != "cuda":
        return None
    if is_without_memory(r.q) and not torch.cuda.is_available():  # a fake tensor, on a chip that is not here
        return None
    why = why_no_fp8(r.q.device)
    return why and f"{why}; give impl='torch' for plain PyTorch, or q, k and v in 16 bits"


def why_no_fp8(device: torch.device) -> str | None:
    """Why a GPU has no tensor cores for e4m3; None if it has: NVIDIA's of sm_90 and newer."""
    arch = tiles.architecture(device)
    if tiles.multiplies_fp8(arch):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{FP8} needs an NVIDIA GPU of sm_90 or newer, and {device} is {name} ({arch})"


def fp8_has_no_gradient(r: Request) -> str | None:
    if r.scales is None or not r.needs_gradient:
        return None
    name = next(name for name, x in (*r.qkv().items(), *r.other_tensors) if x.requires_grad)
    return f"{name} requires a gradient, {FORWARD_ALONE}"


def fp8_is_plain(r: Request) -> str | None:
    """No part of a sharded tensor, and under no transform of functions."""
    if r.scales is None:
        return None
    if any([is_dtensor(x) for x in (*r.qkv().values(), *[x for _, x in r.other_tensors])]):
        return "scales of DTensors are not built: give each rank its own part, with .to_local()"
    if is_transformed():
        return f"torch.func and forward mode see a call of {FP8}, {FORWARD_ALONE}"
    return None


def is_transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
