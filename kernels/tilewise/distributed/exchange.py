"""Messages between ranks that travel while others are computed with: sent and received without waiting, and
waited for when they are needed.

On GPUs a wait does not hold up the host: it makes the current stream wait for the messages. A buffer may be
received into as soon as the kernels that read it have been launched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from weakref import WeakSet

import torch
import torch.distributed as dist

from .group import Group, timeout_of

Tensor = torch.Tensor
Message = tuple[int, Tensor]  # the rank that it goes to or comes from, and what is in it

_opened: WeakSet[dist.ProcessGroup] = WeakSet()


class Channel:
    """What the ranks of a group send one another. All ranks make one at the same time. `sent` and `received`
    count the bytes of tensors since."""

    def __init__(self, group: Group, method: str, device: torch.device) -> None:
        self.group, self.method, self.device = group, method, device
        self.sent = self.received = 0
        if group.handle not in _opened:
            # NCCL: messages between some ranks alone are defined after a collective of all.
            with blaming(self, range(group.size), "opening the channel"):
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
        for rank, buffer in (*sends, *receives):
            if rank == self.group.rank or not 0 <= rank < self.group.size:
                raise ValueError(f"{self.method}, step {step}: no message between {self.group} and {rank}")
            if not buffer.is_contiguous():
                raise ValueError(
                    f"{self.method}, step {step}: the buffer {tuple(buffer.shape)} for rank {rank} must be "
                    f"contiguous, and has strides {buffer.stride()}"
                )
        for way, messages in ((dist.isend, sends), (dist.irecv, receives)):
            count = sum(x.numel() * x.element_size() for _, x in messages)
            if way is dist.isend:
                self.sent += count
            else:
                self.received += count
        pending = Pending(self, sends, receives, f"step {step}")
        pending.start()
        return pending


class Pending:
    """Messages under way."""

    def __init__(self, channel: Channel, sends: list[Message], receives: list[Message], what: str) -> None:
        self.channel, self.sends, self.receives, self.what = channel, sends, receives, what
        self.works: list[dist.Work] = []

    def start(self) -> None:
        group = self.channel.group
        messages = [
            (rank, dist.P2POp(way, x, group=group.handle, group_peer=group.members[rank]))
            for way, those in ((dist.isend, self.sends), (dist.irecv, self.receives))
            for rank, x in those
        ]
        if not messages:
            return  # PyTorch refuses an empty list
        self.peers = [rank for rank, _ in messages]
        with blaming(self.channel, self.peers, self.what):
            self.works = dist.batch_isend_irecv([message for _, message in messages])

    def wait(self) -> None:
        """Until all is sent and received (on a GPU: for its current stream). Once; more does nothing."""
        works, self.works = self.works, []
        for number, work in enumerate(works):
            # NCCL gives one work for them all, gloo one each.
            peers = [self.peers[number]] if len(works) == len(self.peers) else self.peers
            with blaming(self.channel, peers, self.what):
                work.wait()
        self.sends, self.receives = [], []  # kept alive until here


class blaming:
    """Says of what fails inside which ranks it was between, in which step, and what may have happened."""

    def __init__(self, channel: Channel, peers: Sequence[int], what: str) -> None:
        self.channel, self.peers, self.what, self.began = channel, peers, what, time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError):
            channel, group = self.channel, self.channel.group
            others = sorted({peer for peer in self.peers if peer != group.rank})
            processes = [group.world[peer] for peer in others]
            limit = timeout_of(group.handle, channel.device.type).total_seconds()
            raise RuntimeError(
                f"{channel.method}, {self.what}: {group} has no answer from rank {', '.join(map(str, others))} "
                f"(process {', '.join(map(str, processes))}) after {time.monotonic() - self.began:.1f} s, with "
                f"a time-out of {limit:g} s: that rank, or one that it waited for, died or left the call. "
                "Its own output says why; the process group cannot be used any more"
            ) from error
