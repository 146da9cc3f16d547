"""What the hosts of a mesh's ranks say to one another about a call: a few bytes, on the CPU, over gloo.

Where the mesh's groups have gloo for the CPU, as those of init_process_group("cpu:gloo,cuda:nccl") do, it is
used. Else each group gets one beside it, through the store in which its ranks have met. PyTorch's `new_group`
would not do: it is for all processes, also those that make no such call, or, between the ranks alone, it
names the group by how many groups a rank is in, and ranks that are in different numbers of them never meet.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .faults import blaming
from .group import Group, group_along, rank_in, timeout_of

Gloo = Any  # a dist.ProcessGroupGloo: PyTorch's types do not say what it can do
CPU = torch.device("cpu")

_beside: WeakKeyDictionary[dist.ProcessGroup, Gloo] = WeakKeyDictionary()


class Hosts(NamedTuple):
    """The hosts of a mesh's ranks. lines: those along each of its dimensions, and gloo between them."""

    rank: int
    size: int
    lines: list[tuple[Group, Gloo]]

    def gather(self, data: bytes, what: str) -> list[bytes]:
        """The bytes of each rank, as many from all, by rank. All must call. what: for errors.
        Raises RuntimeError, within the time-out of the mesh's groups, if a rank died or did not call."""
        parts = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
        for group, gloo in reversed(self.lines):  # along the last dimension first: ranks in row-major order
            found = [torch.empty_like(parts) for _ in group.world]
            with blaming(group, range(group.size), what):
                gloo.allgather([found], [parts]).wait()
            parts = torch.cat([found[member] for member in group.members])
        return [bytes(part.tolist()) for part in parts]


def host_group(mesh: DeviceMesh) -> Hosts:
    """The hosts of a mesh that `check_mesh` has let through. Nothing is sent, but by ranks that have to meet
    over gloo first: once for a mesh."""
    groups = [group_along(mesh, dim) for dim in range(mesh.ndim)]
    return Hosts(rank_in(mesh), mesh.size(), [(group, gloo_of(group, mesh.device_type)) for group in groups])


def gloo_of(group: Group, device_type: str) -> Gloo:
    """Gloo between the ranks of a group, with its numbers of ranks and its time-out."""
    handle = group.handle
    if "cpu:gloo" in str(dist.get_backend_config(handle)).split(","):
        return handle._get_backend(CPU)
    if handle not in _beside:
        store = dist.PrefixStore("tilewise.distributed", handle.get_group_store())  # type: ignore[attr-defined]
        timeout = timeout_of(handle, device_type)
        with blaming(group, range(group.size), "meeting over gloo"):
            _beside[handle] = dist.ProcessGroupGloo(store, handle.rank(), handle.size(), timeout)
    return _beside[handle]
