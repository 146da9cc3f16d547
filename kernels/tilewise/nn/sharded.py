"""Modules whose heads lie on several devices: what `parallelize_module` has made of their projections.

`ColwiseParallel` cuts the rows of a Linear, heads one behind the other, into one piece a device. Its output
comes as a DTensor, or by default as this rank's columns in a plain tensor: then it is made a DTensor again,
so that attention knows which heads these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..parts.dtensors import dim_of, from_part, is_dtensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
TENSOR_PARALLEL = "tilewise.distributed.tensor_parallel(module, mesh)"


def on_devices(x: Any, name: str, linear: nn.Linear, heads: int, width: int) -> Any:
    """What a projection has made, [batch, length, width] of all devices together, so that heads can be split:
    a DTensor where each has some of the columns, along heads wherever these are as many or a multiple of the
    devices, else whole. Raises ValueError where queries are not."""
    weight: Any = linear.weight
    if not is_dtensor(x) and x.shape[-1] == width:
        return x
    from torch.distributed.tensor import Replicate, Shard

    found: Any = x
    if not is_dtensor(x):
        if not is_dtensor(weight) or weight.device_mesh.ndim != 1:
            raise ValueError(
                f"{name} made {x.shape[-1]} of {width} columns, and {name}.weight does not say which: give "
                f"ColwiseParallel(use_local_output=False), or call {TENSOR_PARALLEL}"
            )
        found = from_part(x, weight.device_mesh, [Shard(x.dim() - 1)], (*x.shape[:-1], width))
    last = [dim_of(placement) == x.dim() - 1 for placement in found.placements]
    ranks = 1
    for dim, is_cut in enumerate(last):
        ranks *= found.device_mesh.size(dim) if is_cut else 1
    if heads % ranks == 0:
        return found
    if name == "q":
        raise ValueError(f"{heads=} must be a multiple of the {ranks} devices that {name}.weight is cut over")
    return found.redistribute(
        placements=[Replicate() if is_cut else p for p, is_cut in zip(found.placements, last, strict=True)]
    )


def check_not_cut(parts: str, made: Any, width: int) -> None:
    """Raise ValueError where a Linear that makes several of q, k and v has made a part of its columns: these
    are cut across the three."""
    if is_dtensor(made):
        mesh, last = made.device_mesh, made.dim() - 1
        is_cut = any([dim_of(p) == last and mesh.size(dim) > 1 for dim, p in enumerate(made.placements)])
    else:
        is_cut = made.shape[-1] != width
    if is_cut:
        raise ValueError(
            f"{parts}.weight is cut along its rows, which hold {' and '.join(parts)} one behind the other: "
            f"call split_projections() before parallelize_module, or {TENSOR_PARALLEL}, which does"
        )


def check_plain(parts: str, linear: nn.Linear) -> None:
    """Raise ValueError for a Linear that lies on several devices."""
    if is_dtensor(linear.weight):
        raise ValueError(
            f"{parts}.weight is a DTensor: split or fuse projections before the module is cut over devices"
        )


def check_norms(q: Tensor, *norms: nn.Module | None) -> None:
    """Raise ValueError for norms that are plain beside queries that are not."""
    if is_dtensor(q) and any(
        [not is_dtensor(p) for norm in norms if norm is not None for p in norm.parameters()]
    ):
        raise ValueError(
            "the weights of q_norm and k_norm are plain tensors beside heads that lie on several devices: "
            f"{TENSOR_PARALLEL} makes DTensors of them"
        )


def locally(turn: Turn, x: Any, cos: Tensor, sin: Tensor) -> Any:
    """turn(x, cos, sin) of a DTensor x [batch, heads, length, head_dim], each rank of its own part; cos and
    sin [(batch,) length, 1, pairs] are whole on each."""
    mesh, placements, along = x.device_mesh, x.placements, [dim_of(each) for each in x.placements]
    if not all([each.is_replicate() or dim in (0, 1) for each, dim in zip(placements, along, strict=True)]):
        raise ValueError(
            f"rotary turns heads that are {placements} on their mesh, and can only where they are sharded "
            "along batch and heads: redistribute them"
        )
    if cos.dim() == 4 and cos.shape[0] > 1:
        cos, sin = own_sequences(cos, x), own_sequences(sin, x)
    return from_part(turn(x.to_local(), cos, sin), mesh, placements, x.shape)


def own_sequences(numbers: Tensor, x: Any) -> Tensor:
    """Of numbers [batch, ...], whole on each rank, those of the sequences that this rank has of x."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    everywhere = [Replicate()] * x.device_mesh.ndim
    rows = [Shard(0) if dim_of(each) == 0 else Replicate() for each in x.placements]
    whole = DTensor.from_local(numbers, x.device_mesh, everywhere, run_check=False)
    return whole.redistribute(placements=rows).to_local()


def write_rows(x: Any, new: Any, rows: Tensor) -> None:
    """new [batch, heads, count, dim] into x [batch, heads, capacity, dim], at rows [batch, count]; where x is
    a DTensor, each rank into its own part."""
    if is_dtensor(x):
        new, rows = new.redistribute(placements=x.placements).to_local(), own_sequences(rows, x)
        x = x.to_local()
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    x.transpose(1, 2)[batch, rows] = new.transpose(1, 2)
