"""Rules on DTensors: how q, k and v may be sharded, and what may stand beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..request import Request
from ..shards import BATCH, HEADS, asks_where, is_cut, is_dtensor, shards_of

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
    named = {called(r, name): x for name, x in r.qkv().items()}
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
    mesh = r.q.device_mesh
    found += [other_mesh(name, x, r.q) for name, x in named.items() if x.device_mesh != mesh]
    yield from found or (*cache_misfits(r), *hopper_misfits(r))


def called(r: Request, name: str) -> str:
    return name if r.cache is None or name == "q" else f"cache_{name}"


def placement_misfits(r: Request, name: str, x: Any) -> Iterator[str]:
    """What is wrong with the placements of one of q, k and v [batch, heads, length, dim]."""
    rows, columns = "queries" if name == "q" else "keys", "value_dim" if name[-1] == "v" else "head_dim"
    for mesh_dim, placement in enumerate(x.placements):
        where = f"{name} has {in_given_dims(r, name, placement)!r} along dimension {mesh_dim} of its mesh"
        if placement.is_replicate():
            continue
        if not placement.is_shard():
            kind = "a sum that is still to be made" if placement.is_partial() else "no plain Shard"
            yield f"{where}, {kind}: give {name}.redistribute(placements=[Replicate()]), or along heads"
        elif placement.dim == SEQUENCE:
            yield (
                f"{where}, a part of the {rows}: shard {name} along heads or batch, as "
                f"{name}.redistribute(placements=...) does, or {CONTEXT}"
            )
        elif placement.dim == DIM:
            yield (
                f"{where}, a part of {columns}: shard {name} along heads or batch, or "
                f"{name}.redistribute(placements=[Replicate()])"
            )


def in_given_dims(r: Request, name: str, placement: Any) -> Any:
    """A placement by the dimensions of what the caller gave: packed [tokens, heads, dim], or pages [pages,
    page_size, heads, dim]."""
    if not placement.is_shard():
        return placement
    if name.startswith("cache_"):
        paged = r.cache is not None and r.cache.pages is not None
        return type(placement)((0, 2, 1, 3)[placement.dim]) if paged else placement
    return type(placement)((0, 1, 0, 2)[placement.dim]) if r.packing is not None else placement


def beside_misfits(r: Request, name: str, x: torch.Tensor) -> Iterator[str]:
    if is_dtensor(x):
        if x.device_mesh != r.q.device_mesh:  # type: ignore[attr-defined]
            yield other_mesh(name, x, r.q)
    elif x.requires_grad and torch.is_grad_enabled():
        yield (
            f"{name} requires a gradient and is a plain tensor beside q, a DTensor, so that each rank would "
            f"have a gradient of its own: make it a DTensor, distribute_tensor({name.rpartition('.')[2]}, "
            "q.device_mesh, [Replicate()] * q.device_mesh.ndim)"
        )


def new_misfits(r: Request, name: str, new: Any, cache: Any) -> Iterator[str]:
    """What is wrong with keys or values that are to be written into a cache, by where they lie."""
    if is_dtensor(new) != is_dtensor(cache):
        what = "a DTensor, and the cache is not" if is_dtensor(new) else "a plain tensor, and the cache a DTensor"
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
    k, v = r.k, r.v
    if k.placements != v.placements:  # type: ignore[attr-defined]
        yield f"cache_k.placements={k.placements} and cache_v.placements={v.placements} must be equal"  # type: ignore[attr-defined]
        return
    shards = shards_of(r.q, k, v)
    wanted = shards.kv_axes
    for dim, placement in enumerate(k.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        if placement.dim == BATCH and (r.cache.pages is not None or r.packing is not None):
            what = "its pages" if r.cache.pages is not None else "batch, beside packed queries"
            yield (
                f"the cache is sharded along {what} over dimension {dim} of its mesh: shard it along heads, or "
                "give each rank's part as plain tensors"
            )
        elif wanted[dim] != placement.dim:
            kind = "batch" if placement.dim == BATCH else "heads"
            why = f"with kv_heads={k.shape[1]} and q_heads={r.q.shape[1]} over {shards.mesh.size(dim)} ranks, a "
            why = why if placement.dim == HEADS and shards.axes[dim] == HEADS else "beside q as it is sharded, a "
            yield (
                f"the cache is sharded along {kind} over dimension {dim} of its mesh, and {why}rank would need "
                "what another has: replicate the cache there, or redistribute q"
            )
