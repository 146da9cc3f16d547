"""Messages between ranks that travel while others are computed with: sent and received without waiting, and
waited for when they are needed.

On GPUs a wait does not hold up the host: it makes the current stream wait for the messages. A buffer may be
received into as soon as the kernels that read it have been launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
import torch.distributed as dist

from .faults import blaming
from .group import Group

Tensor = torch.Tensor
Message = tuple[int, Tensor]  # the rank that it goes to or comes from, and what is in it

_opened: WeakSet[dist.ProcessGroup] = WeakSet()


class Channel:
    """What the ranks of a group send one another. All ranks make one at the same time. `sent` and `received`
    count the bytes of tensors since."""

    def __init__(self, group: Group, method: str, device: torch.device) -> None:
        self.group, self.method = group, method
        self.sent = self.received = 0
        if group.handle not in _opened:
            # NCCL: messages between some ranks alone are defined after a collective of all.
            with blaming(group, range(group.size), f"{method}, before its first step"):
                dist.all_reduce(torch.zeros(1, device=device), group=group.handle)
            _opened.add(group.handle)

    def start(self, sends: Sequence[Message], receives: Sequence[Message], step: int) -> Pending:
        """Send tensors to ranks and receive into tensors from ranks, all at once. What goes from one rank to
        another arrives in the order in which it is listed, and needs a receive of its dtype and number of
        elements. What is sent must not change, nor what is received be read, before the `wait`.

        step: of the method, for errors. A tensor without elements is not sent. Raises ValueError for a buffer
        that is not contiguous, and for a rank that is not another one of the group; RuntimeError, here or in
        the wait, for a rank that died.
        """
        sends = [(rank, x.detach().contiguous()) for rank, x in sends if x.numel()]
        receives = [(rank, x) for rank, x in receives if x.numel()]
        group = self.group
        for rank, buffer in (*sends, *receives):
            if rank == group.rank or not 0 <= rank < group.size:
                raise ValueError(f"{self.method}, step {step}: no message between {group} and {rank}")
            if not buffer.is_contiguous():
                raise ValueError(
                    f"{self.method}, step {step}: the buffer {tuple(buffer.shape)} for rank {rank} must be "
                    f"contiguous, and has strides {buffer.stride()}"
                )
        self.sent += bytes_of(sends)
        self.received += bytes_of(receives)
        return Pending(group, sends, receives, f"{self.method}, step {step}")


def bytes_of(messages: Sequence[Message]) -> int:
    return sum([x.numel() * x.element_size() for _, x in messages])


class Pending:
    """Messages under way, from when it is made."""

    def __init__(self, group: Group, sends: list[Message], receives: list[Message], what: str) -> None:
        self.group, self.what = group, what
        self.messages = [*sends, *receives]  # kept alive until they are waited for
        self.works: list[dist.Work] = []
        operations = [
            dist.P2POp(way, x, group=group.handle, group_peer=group.members[rank])
            for way, those in ((dist.isend, sends), (dist.irecv, receives))
            for rank, x in those
        ]
        if operations:  # PyTorch refuses an empty list
            with blaming(group, self.peers, what):
                self.works = dist.batch_isend_irecv(operations)

    @property
    def peers(self) -> list[int]:
        return [rank for rank, _ in self.messages]

    def wait(self) -> None:
        """Until all is sent and received (on a GPU: for its current stream). Again, it does nothing."""
        works, self.works = self.works, []
        for number, work in enumerate(works):
            # NCCL gives one work for them all, gloo one each.
            peers = [self.peers[number]] if len(works) == len(self.messages) else self.peers
            with blaming(self.group, peers, self.what):
                work.wait()
        self.messages = []
