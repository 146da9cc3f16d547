"""The parts of a sequence: from the whole, on every rank, to this rank's rows and back.

The rows of a rank are those of `order.Order`; ranks of a mesh of two dimensions count row by row. What goes
with the rows, such as positions for rotary embeddings, targets and padding, is split the same way.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .agree import agreed, word
from .faults import blaming
from .group import Group, check_mesh, group_along, rank_in
from .hosts import host_group
from .order import Order, order_of

Tensor = torch.Tensor


def split(x: Tensor, mesh: DeviceMesh, *, dim: int = -2, order: str = "zigzag") -> Tensor:
    """This rank's rows of a tensor that every rank has whole. Nothing is sent.

    x:     any dtype. dim: the dimension of the sequence: -2 for [batch, heads, length, dim] and
           [batch, length, width], 1 for tokens [batch, length].
    mesh:  of one or two dimensions, with this process in it
    order: "zigzag", for causal masks and any other, or "contiguous": `order`

    Returns a new tensor [..., length / ranks, ...], the rows in rising order. Differentiable: the gradient of
    x is that of this rank's rows, and 0 in the others'.

    Raises ValueError for a length that does not divide (by twice the ranks in the zig-zag) and other
    arguments that do not fit.
    """
    check_mesh(mesh)
    at = dimension(x, dim)
    chunks = order_of(x.shape[at], mesh.size(), order, name=f"x.shape[{dim}]")
    return torch.cat([x.narrow(at, start, stop - start) for start, stop in chunks.rows(rank_in(mesh))], at)


def join(x: Tensor, mesh: DeviceMesh, *, dim: int = -2, order: str = "zigzag") -> Tensor:
    """The whole sequence, on every rank, of the rows that each rank has: what undoes `split`. All ranks of
    the mesh must call it, and run its backward.

    x: [..., rows, ...], of one shape and dtype on all ranks; the rest as in `split`.

    Returns [..., rows * ranks, ...]. Differentiable, once: the gradient of x is the sum, over the ranks, of
    what each has for these rows of its own whole, as of one loss that is the sum of all ranks' losses. So a
    loss that every rank computes alike, from the whole, counts as often as there are ranks: divide it by
    them. Half precision is summed in fp32, in the order of the ranks: the same bits each time.

    Raises ValueError, on every rank, for arguments that do not fit or that ranks have different ones of;
    RuntimeError, within the group's time-out, if a rank died or did not call.
    """
    check_mesh(mesh)
    with agreed(host_group(mesh), "join") as given:
        at = dimension(x, dim)
        given.update(x=word(x), dim=str(at - x.dim()), order=repr(order))
        length = x.shape[at] * mesh.size()
        chunks = order_of(length, mesh.size(), order, name=f"x.shape[{dim}] * ranks")
    groups = [group_along(mesh, d) for d in range(mesh.ndim)]
    joined: Tensor = Join.apply(x, groups, at, chunks)
    return joined


def positions(
    length: int, mesh: DeviceMesh, *, order: str = "zigzag", device: torch.device | str | None = None
) -> Tensor:
    """The numbers, in the whole sequence of `length`, of this rank's rows: int64 [length / ranks], on
    `device` (None: that of the mesh). Raises ValueError as `split` does."""
    check_mesh(mesh)
    if not isinstance(length, int) or length < 0:
        raise ValueError(f"{length=} must be an int, at least 0: the rows of the whole sequence")
    rows = order_of(length, mesh.size(), order).rows(rank_in(mesh))
    device = mesh.device_type if device is None else device
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])


def dimension(x: Any, dim: int) -> int:
    """`dim` counted from the first. Raises ValueError if x is no local tensor or has no such dimension."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x={x!r} must be a tensor")
    distributed = sys.modules.get("torch.distributed.tensor")  # not imported: then it is no DTensor
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise ValueError("x is a DTensor and must be a plain tensor: give x.full_tensor(), or x.to_local()")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{dim=} is no dimension of x, whose shape is {tuple(x.shape)}")
    return dim % x.dim()


# ---- What join sends


class Join(torch.autograd.Function):
    """The rows of all ranks, in the places of `order`; backward, their gradients to where they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[Group], dim: int, order: Order) -> Tensor:
        ctx.groups, ctx.dim, ctx.order = groups, dim, order
        parts = x.detach().contiguous()[None]
        for group in reversed(groups):  # along the last dimension of the mesh first: ranks in row-major order
            parts = gather(parts, group)
        whole = x.new_empty([*x.shape[:dim], order.length, *x.shape[dim + 1 :]])
        for rank, part in enumerate(parts):
            pieces = part.split([stop - start for start, stop in order.rows(rank)], dim)
            for (start, stop), piece in zip(order.rows(rank), pieces, strict=True):
                whole.narrow(dim, start, stop - start).copy_(piece)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, order = ctx.dim, ctx.order
        parts = torch.stack(
            [
                torch.cat([grad.narrow(dim, start, stop - start) for start, stop in order.rows(rank)], dim)
                for rank in range(order.ranks)
            ]
        )
        for group in ctx.groups:
            parts = summed(parts, group)
        return parts[0].to(grad.dtype), None, None, None


def gather(parts: Tensor, group: Group) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...] of all, in the order of the ranks."""
    found = [torch.empty_like(parts) for _ in group.world]
    with blaming(group, range(group.size), "join, gathering"):
        dist.all_gather(found, parts, group=group.handle)
    return torch.cat([found[member] for member in group.members])


def summed(parts: Tensor, group: Group) -> Tensor:
    """[ranks * n, ...], where the r-th n are for rank r -> [n, ...]: the sum of what all ranks have for this
    one, in fp32 at least, in the order of the ranks. Each part is sent once, as in a reduce-scatter, whose
    order of sums would be the library's."""
    sends = parts.unflatten(0, (group.size, -1))
    to_members = torch.empty_like(sends)
    for rank, member in enumerate(group.members):
        to_members[member] = sends[rank]
    found = torch.empty_like(to_members)
    with blaming(group, range(group.size), "the backward of join"):
        dist.all_to_all_single(found, to_members, group=group.handle)
    total = torch.zeros_like(found[0], dtype=torch.promote_types(parts.dtype, torch.float32))
    for member in group.members:
        total += found[member]
    return total
