"""K and V as the copy engine takes them: descriptors, where a tile asks for them and the tensors lie so.

A thread that loads a tile computes addresses, a few instructions a row; the copy engine (TMA) is told the
corner. It moves whole tiles, so it is asked only for steps in which every pair counts.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..parts.pieces import pieces_of
from .call import Call
from .hopper.limits import ALIGNMENT, FARTHEST
from .tile import CopiedTile, Tile


def copies_of(call: Call, tile: Tile) -> dict[str, TensorDescriptor | None]:
    """Descriptors of K and of V for each of at most two pieces of columns, by the names of the kernel's
    arguments: Triton 3.6 launches no kernel that is given them in a tuple. None where threads load, as they
    do of fp8, whose values lie along the keys."""
    found: dict[str, TensorDescriptor | None] = dict.fromkeys(("k_copy", "k_copy_2", "v_copy", "v_copy_2"))
    in_pages = call.shape.cache is not None and call.shape.cache.pages is not None
    if (
        not isinstance(tile, CopiedTile)
        or in_pages
        or call.v_scales.largest is not None
        or not (can_be_copied(call.k) and can_be_copied(call.v))
    ):
        return found
    for name, x in (("k_copy", call.k), ("v_copy", call.v)):
        found |= dict(zip((name, f"{name}_2"), descriptors(x, tile.tile_kv), strict=False))
    return found


def can_be_copied(x: torch.Tensor) -> bool:
    """Whether there is anything in x [batch, heads, length, dim], and the copy engine can read it."""
    return x.numel() > 0 and why_not_copied(x) is None


def why_not_copied(x: torch.Tensor, name: str = "x") -> str | None:
    """Why x [batch, heads, length, dim], so called, does not lie so that the copy engine can read it."""
    size = x.element_size()
    if x.shape[3] > 1 and x.stride(3) != 1:
        return f"{name}.stride(3)={x.stride(3)} must be 1: its rows must lie in one piece"
    for axis in range(3):
        step = x.stride(axis) * size
        if x.shape[axis] > 1 and (step % ALIGNMENT or not 0 < step < FARTHEST):
            return (
                f"{name}.stride({axis})={x.stride(axis)} is {step} bytes, which must be a multiple of "
                f"{ALIGNMENT}, above 0 and below 2⁴⁰"
            )
    if torch.compiler.is_compiling():  # the address is looked at when the graph runs
        return None
    if start_of(x) % ALIGNMENT:
        return f"{name} starts at an address that is not a multiple of {ALIGNMENT} bytes: .clone() it"
    return None


def start_of(x: torch.Tensor) -> int:
    """The address of the first element; its place in memory, where there is none behind it."""
    if is_without_memory(x):
        return int(x.storage_offset()) * x.element_size()
    return x.data_ptr()


def is_without_memory(x: torch.Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def descriptors(x: torch.Tensor, rows: int) -> tuple[TensorDescriptor, ...]:
    """x in pieces of [1, 1, rows, columns], one for each of `pieces_of` its columns."""
    return tuple(
        TensorDescriptor(x, list(x.shape), described_strides(x), [1, 1, rows, columns])
        for columns in pieces_of(x.shape[3])
    )


def described_strides(x: torch.Tensor) -> list[int]:
    """The strides of x [batch, heads, length, dim] as a descriptor has them."""
    aligned = ALIGNMENT // x.element_size()
    # Along a dimension of size 1 nobody steps, and PyTorch may say anything.
    strides = [stride if size > 1 else aligned for size, stride in zip(x.shape[:3], x.stride(), strict=False)]
    return [*strides, 1]
