"""A step that is done again and again: gone the long way, then written down, then repeated.

Only the second time is worth a tape: what comes once, keys that grow by a row with each call, never pays for
one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .replay import Replay, program
from .tape import Results, record

Tensor = torch.Tensor
MOST = 4096  # steps that are known at a time


def is_wanted(environment: Mapping[str, str]) -> bool:
    """With TILEWISE_REPLAY=0 every call goes the long way, as for debugging."""
    return environment.get("TILEWISE_REPLAY") != "0"


class Where:
    """Whose calls are repeated. On a CPU the kernels are interpreted, beside which the host's work is
    nothing: tests alone ask for it there."""

    cuda = is_wanted(os.environ)
    cpu = False

    def holds(self, x: Tensor) -> bool:
        return self.cuda if x.is_cuda else self.cpu and x.is_cpu


where = Where()


class Repeated:
    """One step, by what it looks like. replay: there once it has been written down. encoded: of a forward
    with gradients, the request without its tensors."""

    __slots__ = ("encoded", "replay", "times")

    def __init__(self) -> None:
        self.encoded: Any = None
        self.replay: Replay | None = None
        self.times = 0

    @property
    def is_in_vain(self) -> bool:
        """Whether this step cannot be repeated."""
        return self.times >= 2 and self.replay is None

    def __call__(self, inputs: Sequence[Tensor], step: Callable[..., Results]) -> Any:
        """The results of `step(*inputs)`."""
        if self.replay is not None:
            results = self.replay(*inputs)
            return step(*inputs) if results is None else results
        self.times += 1
        if self.times != 2:
            return step(*inputs)
        results, tape = record(step, inputs)
        self.replay = program(tape, results)
        return results


known: dict[Any, Repeated] = {}


def repeated(key: Any) -> Repeated:
    """The step with this key."""
    found = known.get(key)
    if found is None:
        if len(known) >= MOST:
            known.clear()
        found = known[key] = Repeated()
    return found
