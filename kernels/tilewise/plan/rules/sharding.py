"""Rules on DTensors: how q, k and v may be sharded, and what may stand beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...parts.dtensors import dim_of, is_dtensor
from ..request import Request
from ..shards import BATCH, HEADS, asks_where, is_cut, shards_of

SEQUENCE, DIM = 2, 3
CONTEXT = "hold sequences in parts with tilewise.distributed.context_parallel_attention"


def sharding_fits(r: Request) -> str | None:
    return "; ".join(sharding_misfits(r)) or None


def looks(r: Request) -> Any:
    """What these rules look at; hashable. None of plain tensors alone."""
    tensors = [r.q, r.k, r.v, *[x for _, x in r.other_tensors]]
    if not any([is_dtensor(x) for x in tensors]):
        return None
    return tuple([(x.device_mesh, x.placements) if is_dtensor(x) else None for x in tensors])  # type: ignore[attr-defined]


def sharding_misfits(r: Request) -> Iterator[str]:
    """What is wrong with the DTensors of a request, and with the plain tensors beside them."""
    named: dict[str, Any] = {called(r, name): x for name, x in r.qkv().items()}
    sharded = [name for name, x in named.items() if is_dtensor(x)]
    if not sharded:
        for name, x in r.other_tensors:
            if is_dtensor(x):
                yield (
                    f"{name} is a DTensor, and {', '.join(named)} are not: make DTensors of them, "
                    f"DTensor.from_local(q, mesh, placements), or give {name}.full_tensor()"
                )
        return
    if len(sharded) < len(named):
        plain = [name for name in named if name not in sharded]
        yield (
            f"{', '.join(sharded)} came as DTensor and {', '.join(plain)} as a plain tensor: make it one, "
            f"distribute_tensor({plain[0]}, {sharded[0]}.device_mesh, placements) of the whole or "
            "DTensor.from_local of a part"
        )
        return
    found = [why for name, x in named.items() for why in placement_misfits(r, name, x)]
    found += [why for name, x in r.other_tensors for why in beside_misfits(r, name, x)]
    mesh = named["q"].device_mesh
    found += [other_mesh(name, x, r.q) for name, x in named.items() if x.device_mesh != mesh]
    yield from found or (*cache_misfits(r), *hopper_misfits(r))


def called(r: Request, name: str) -> str:
    return name if r.cache is None or name == "q" else f"cache_{name}"


def placement_misfits(r: Request, name: str, x: Any) -> Iterator[str]:
    """What is wrong with the placements of one of q, k and v [batch, heads, length, dim]."""
    rows, columns = "queries" if name == "q" else "keys", "value_dim" if name[-1] == "v" else "head_dim"
    for mesh_dim, placement in enumerate(x.placements):
        dim = dim_of(placement)
        if placement.is_replicate() or dim in (BATCH, HEADS):
            continue
        where = f"along dimension {mesh_dim} of its mesh"
        if dim is None:
            what = "Partial, a sum that is still to be made" if placement.is_partial() else "no plain Shard"
            yield f"{name} is {what}, {where}: redistribute it to Replicate(), or Shard(...) along heads"
            continue
        given = f"{name} is Shard({given_dim(r, name, dim)}) {where}, a part of "
        if dim == SEQUENCE:
            yield f"{given}the {rows}: redistribute it along heads or batch, or {CONTEXT}"
        else:
            yield f"{given}{columns}: redistribute it along heads or batch, or to Replicate()"


def given_dim(r: Request, name: str, dim: int) -> int:
    """A dimension of what the caller gave: packed [tokens, heads, dim], or pages [pages, page_size, heads,
    dim]."""
    if name.startswith("cache_"):
        return (0, 2, 1, 3)[dim] if r.cache is not None and r.cache.pages is not None else dim
    return (0, 1, 0, 2)[dim] if r.packing is not None else dim


def beside_misfits(r: Request, name: str, x: Any) -> Iterator[str]:
    q: Any = r.q
    if is_dtensor(x):
        if x.device_mesh != q.device_mesh:
            yield other_mesh(name, x, q)
    elif x.requires_grad and torch.is_grad_enabled():
        yield (
            f"{name} requires a gradient and is a plain tensor beside q, a DTensor, so that each rank would "
            f"have a gradient of its own: make it a DTensor, distribute_tensor({name.rpartition('.')[2]}, "
            "q.device_mesh, [Replicate()] * q.device_mesh.ndim)"
        )


def new_misfits(r: Request, name: str, new: Any, cache: Any) -> Iterator[str]:
    """What is wrong with keys or values that are to be written into a cache, by where they lie."""
    if is_dtensor(new) != is_dtensor(cache):
        what = (
            "a DTensor, and the cache is not"
            if is_dtensor(new)
            else "a plain tensor, and the cache a DTensor"
        )
        yield f"{name} is {what}: give both as one of the two"
    elif is_dtensor(new):
        if new.device_mesh != cache.device_mesh:
            yield other_mesh(name, new, r.q)
        yield from placement_misfits(r, name, new)


def other_mesh(name: str, x: Any, q: Any) -> str:
    return f"{name} lies on {x.device_mesh} and q on {q.device_mesh}: all must lie on one mesh"


def hopper_misfits(r: Request) -> Iterator[str]:
    if r.impl == "hopper" and asks_where(r) and is_cut(r.q, r.k, r.v):
        yield (
            "impl='hopper' does not know where a rank's part lies in the whole call, which dropout and what "
            "has numbers a sequence or head ask for: leave impl=None"
        )


def cache_misfits(r: Request) -> Iterator[str]:
    """A cache stays where it is: what a rank needs of it, it must have."""
    if r.cache is None:
        return
    k: Any = r.k
    v: Any = r.v
    dims_k, dims_v = ([dim_of(each) for each in x.placements] for x in (k, v))
    if dims_k != dims_v:
        yield "cache_k and cache_v must have the same placements"
        return
    shards = shards_of(r.q, k, v)
    for mesh_dim, (dim, has) in enumerate(zip(dims_k, shards.kv_axes, strict=True)):
        where = (
            f"the cache is Shard({given_dim(r, 'cache_k', dim or 0)}) along dimension {mesh_dim} of its mesh"
        )
        if dim == BATCH and (r.cache.pages is not None or r.packing is not None):
            what = (
                "a part of the pages" if r.cache.pages is not None else "along batch, beside packed queries"
            )
            yield f"{where}, {what}: shard it along heads, or give each rank's own call plain tensors"
        elif dim is not None and dim != has:
            yield (
                f"{where}, and with q_heads={r.q.shape[1]}, kv_heads={k.shape[1]} and q as it is sharded a "
                "rank would need what another has: redistribute the cache to Replicate() there, or q"
            )
