"""When is a ring done, if messages travel under the computation?

A rank posts what it receives next, and what it sends meanwhile, when it begins to compute a step: two
buffers. It begins the next step when it has computed this one and both are done. In the backward the
gradients of a step's keys go back to their owner when they are computed; sender and owner wait for them
before the step after the next one. Links carry one message after another each way. So it is in
`distributed.walk`.
"""

from __future__ import annotations

import torch


def ring_seconds(
    compute: torch.Tensor, keys: torch.Tensor, gradients: torch.Tensor, link: float
) -> torch.Tensor:
    """When each rank is done, float64 [ranks].

    Each [ranks of queries, ranks of keys]: the seconds of their kernels; the bytes of keys and values that
    travel from the second to the first, and those of gradients that travel back.
    """
    ranks = len(compute)
    rank = torch.arange(ranks, device="cpu")
    of_step = (rank[:, None] - rank) % ranks  # [rank, step]: whose keys
    computing, arriving, returning = (
        x.double().gather(1, of_step).T.contiguous() for x in (compute, keys / link, gradients / link)
    )
    links = Links(ranks)
    begin, late = (torch.zeros(ranks, dtype=torch.float64, device="cpu") for _ in range(2))
    for step in range(ranks):
        done = begin + computing[step]
        come = links.carry(arriving[step + 1], begin, step + 1) if step + 1 < ranks else done
        # The gradients go from a rank to the one whose keys it had: the other way round.
        back = links.carry(returning[step].roll(-step), done, -step)
        begin, late = torch.maximum(torch.maximum(done, come), late), back
    return torch.maximum(begin, late)


class Links:
    """From when on the link of each rank is free, inwards and outwards."""

    def __init__(self, ranks: int) -> None:
        self.inwards, self.outwards = (torch.zeros(ranks, dtype=torch.float64, device="cpu") for _ in "io")

    def carry(self, seconds: torch.Tensor, ready: torch.Tensor, step: int) -> torch.Tensor:
        """When each rank has received a message from that `step` before it, and sent its own. seconds: that
        it takes, 0 for none, by receiver; ready: from when on a rank sends and receives."""
        if not bool(seconds.any()):
            return torch.zeros_like(seconds)
        receiver, sender = torch.maximum(ready, self.inwards), torch.maximum(ready, self.outwards)
        stop = torch.where(seconds > 0, torch.maximum(receiver, sender.roll(step)) + seconds, 0.0)
        sent = stop.roll(-step)
        self.inwards, self.outwards = torch.maximum(self.inwards, stop), torch.maximum(self.outwards, sent)
        return torch.maximum(stop, sent)
