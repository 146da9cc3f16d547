"""From the sizes that a caller names to all sizes of an attention module, and the checks of its inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .core import check_positive


class Sizes(NamedTuple):
    """The widths of an attention module: `output_dim` in all, the other two a head."""

    output_dim: int
    head_dim: int
    value_dim: int


def resolve_sizes(
    input_dim: int,
    output_dim: int | None,
    heads: int,
    head_dim: int | None,
    value_dim: int | None,
    out_projection: bool,
) -> Sizes:
    """All sizes, from those given. Without a projection out the result is the heads side by side, so
    output_dim = heads · value_dim; with one it is free. Raises ValueError where the sizes disagree."""
    given = {"output_dim": output_dim, "head_dim": head_dim, "value_dim": value_dim}
    sizes = {name: size for name, size in given.items() if size is not None}
    check_positive(input_dim=input_dim, heads=heads, **sizes)

    def share(name: str) -> int:
        """A head's share of the model's width."""
        width = input_dim if output_dim is None else output_dim
        if width % heads:
            source = "input_dim" if output_dim is None else "output_dim"
            raise ValueError(f"{source}={width} must be a multiple of {heads=}, or give {name}=")
        return width // heads

    if value_dim is None:
        heads_fill_output = output_dim is not None and not out_projection
        value_dim = share("value_dim") if heads_fill_output or head_dim is None else head_dim
    if head_dim is None:
        head_dim = share("head_dim")
    if output_dim is None:
        output_dim = input_dim if out_projection else heads * value_dim
    if not out_projection and output_dim != heads * value_dim:
        raise ValueError(
            f"{output_dim=} must be heads * value_dim = {heads} * {value_dim} = {heads * value_dim} "
            "without out_projection=True"
        )
    return Sizes(output_dim, head_dim, value_dim)


def check_input(name: str, x: Tensor, width: int, weight: Tensor) -> None:
    """Raise ValueError unless x can be projected: [length, width] or [batch, length, width], floating."""
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name}.shape={tuple(x.shape)} must be [length, {width}] or [batch, length, {width}]"
        )
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise ValueError(
            f"{name}.dtype={x.dtype} must be the module's, {weight.dtype}; convert one with .to(dtype)"
        )
    if x.device != weight.device:
        raise ValueError(f"{name}.device={x.device} must be the module's, {weight.device}; use .to(device)")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads · dim] as [batch, heads, length, dim]: a view."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, length, dim] as [batch, length, heads · dim], a view where memory has that order."""
    return x.transpose(1, 2).flatten(2)
