"""From a DeviceMesh to the process groups that messages go through.

A rank is called by its place in the mesh, from 0, in row-major order: not by its number among all processes,
nor by its number in PyTorch's group, which may both be others.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

MAKE_ONE = 'init_device_mesh("cuda", (ranks,))'


class Group(NamedTuple):
    """The ranks along a dimension of a mesh, or of a whole mesh, and this process among them.

    handle:  PyTorch's group
    rank:    of this process
    world:   by rank, the number among all processes
    members: by rank, the number in PyTorch's group
    timeout: the seconds after which an operation fails
    """

    handle: dist.ProcessGroup
    rank: int
    world: tuple[int, ...]
    members: tuple[int, ...]
    timeout: float

    @property
    def size(self) -> int:
        return len(self.world)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def check_mesh(mesh: Any, name: str = "mesh") -> DeviceMesh:
    """The mesh, of one or two dimensions, with this process in it; else ValueError."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            f"{name}={mesh!r} must be a torch.distributed.device_mesh.DeviceMesh, as {MAKE_ONE} makes one"
        )
    if mesh.ndim not in (1, 2):
        names = mesh.mesh_dim_names
        some = f"{name}[{names[-1]!r}]" if names else f"one made with names, and then {name}[NAME]"
        raise ValueError(
            f"{name}={mesh} has {mesh.ndim} dimensions and must have one or two: give the part that the "
            f"sequence is split over, such as {some}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name}={mesh} has the processes {mesh.mesh.flatten().tolist()}, and this one is "
            f"{dist.get_rank()}: only those of the mesh may call"
        )
    return mesh


def rank_in(mesh: DeviceMesh) -> int:
    """This process' rank in the mesh, row-major."""
    rank = 0
    for size, place in zip(mesh.shape, coordinate(mesh), strict=True):
        rank = rank * size + place
    return rank


def coordinate(mesh: DeviceMesh) -> tuple[int, ...]:
    found = mesh.get_coordinate()
    assert found is not None  # `check_mesh` has seen to it
    return tuple(found)


def group_along(mesh: DeviceMesh, dim: int) -> Group:
    """The ranks that differ from this one in dimension `dim` of the mesh alone."""
    place = coordinate(mesh)
    line = mesh.mesh[tuple(slice(None) if d == dim else place[d] for d in range(mesh.ndim))]
    return as_group(mesh.get_group(dim), place[dim], line.tolist(), mesh.device_type)


def as_group(handle: dist.ProcessGroup, rank: int, world: list[int], device_type: str) -> Group:
    members = tuple(dist.get_group_rank(handle, process) for process in world)
    return Group(handle, rank, tuple(world), members, timeout_of(handle, device_type).total_seconds())


def timeout_of(handle: dist.ProcessGroup, device_type: str) -> timedelta:
    found: timedelta = handle._get_backend(torch.device(device_type)).options._timeout
    return found
