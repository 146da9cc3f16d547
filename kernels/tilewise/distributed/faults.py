"""What an error says when another rank does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .group import Group


@contextmanager
def blaming(group: Group, peers: Sequence[int], what: str) -> Iterator[None]:
    """Turns an error of PyTorch's groups inside into a RuntimeError that says what was done, with which
    ranks, and what may have happened, from the original."""
    began = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, too: nobody else's fault
        raise
    except RuntimeError as error:
        others = sorted({peer for peer in peers if peer != group.rank})
        who = f"rank {in_words(others)}" if len(others) == 1 else f"one of ranks {in_words(others)}"
        processes = in_words(group.world[peer] for peer in others)
        raise RuntimeError(
            f"{what}: no answer to {group} from {who} (of all processes: {processes}) after "
            f"{time.monotonic() - began:.1f} s, with a time-out of {group.timeout:g} s: it, or a rank that "
            "it waited for, died, left the call or never made it; its own output says why. The process group "
            "cannot be used any more"
        ) from error


def in_words(numbers: Iterable[int]) -> str:
    """0, 1, 2 and 5 as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
