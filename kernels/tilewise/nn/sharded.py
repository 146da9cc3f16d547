"""Modules whose heads lie on several devices: what `parallelize_module` has made of their projections.

`ColwiseParallel` cuts the rows of a Linear, heads one behind the other, into one piece a device. Its output
comes as a DTensor, or by default as this rank's columns in a plain tensor: then it is made a DTensor again,
so that attention knows which heads these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..parts.dtensors import dim_of, from_part, is_dtensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
TENSOR_PARALLEL = "tilewise.distributed.tensor_parallel(module, mesh)"


def on_devices(x: Any, name: str, linear: nn.Linear, heads: int, width: int) -> Any:
    """What a projection has made, [batch, length, width] of all devices together, so that heads can be split:
    a DTensor if the Linear is cut, along heads wherever these are as many or a multiple of the devices, else
    whole. Raises ValueError where queries are not."""
    weight: Any = linear.weight
    if not is_dtensor(weight) and not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate, Shard

    found: Any = x
    if not is_dtensor(x):
        mesh, cut = weight.device_mesh, [dim_of(placement) == 0 for placement in weight.placements]
        is_whole = x.shape[-1] == width  # as with output_layouts=Replicate()
        placements = [Shard(x.dim() - 1) if each and not is_whole else Replicate() for each in cut]
        found = from_part(x, mesh, placements, (*x.shape[:-1], width))
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


def check_whole_parts(parts: str, linear: nn.Linear) -> None:
    """Raise ValueError for a Linear that makes several of q, k and v and is cut across them."""
    weight: Any = linear.weight
    if is_dtensor(weight) and weight.device_mesh.size() > 1:
        several = ", which hold " + " and ".join(parts) + " one behind the other" if len(parts) > 1 else ""
        raise ValueError(
            f"{parts}.weight is a DTensor, {weight.placements}, cut along its rows{several}: call "
            f"split_projections() before parallelize_module, or {TENSOR_PARALLEL}, which does"
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
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements, along = x.device_mesh, x.placements, [dim_of(each) for each in x.placements]
    if not all([each.is_replicate() or dim in (0, 1) for each, dim in zip(placements, along, strict=True)]):
        raise ValueError(
            f"rotary turns heads that are {placements} on their mesh, and can only where they are sharded "
            "along batch and heads: redistribute them"
        )
    if cos.dim() == 4 and cos.shape[0] > 1:
        rows = [Shard(0) if dim == 0 else Replicate() for dim in along]
        cos, sin = (
            DTensor.from_local(each, mesh, [Replicate()] * mesh.ndim, run_check=False)
            .redistribute(placements=rows)
            .to_local()
            for each in (cos, sin)
        )
    return from_part(turn(x.to_local(), cos, sin), mesh, placements, x.shape)
