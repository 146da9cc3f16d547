"""What became of the calls that reach tilewise through PyTorch's own functions: counted here by whoever
answers them or passes them on, for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .entry import PYTORCH, Entry
from .modules import calling_module
from .text import as_text

Tensor = torch.Tensor

LIMIT = 4096  # as many entries are kept apart; further ones no longer by their sizes


class Report(NamedTuple):
    """The calls so far. As text, a table; calls that differ only in the numbers of their module's path, as
    those of a model's layers do, share a line there."""

    entries: tuple[Entry, ...]

    @property
    def answered(self) -> int:
        """How many calls tilewise answered."""
        return sum([entry.calls for entry in self.entries if entry.answered_by != PYTORCH])

    @property
    def passed_on(self) -> int:
        """How many calls PyTorch answered."""
        return sum([entry.calls for entry in self.entries if entry.answered_by == PYTORCH])

    def __str__(self) -> str:
        return as_text(self.entries)


_calls: dict[Entry, int] = {}
_lock = threading.Lock()


def note(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    answered_by: str,
    reasons: Iterable[str] = (),
    mask: str = "no mask",
    options: str = "",
    compiled: bool = False,
    module: str | None = None,
) -> None:
    """Count one call of attention, for the report; for whoever stands behind another library's call.

    q, k, v:     the tensors of the call, of which the sizes and q's dtype are kept.
    answered_by: PYTORCH or one of ANSWERED_BY.
    reasons:     why tilewise does not answer, in the words of its rules.
    mask:        the mask in words, with what distinguishes it: a kind, a dtype, sizes in brackets.
    options:     what else was given, as "dropout_p=0.1, scale=0.5".
    compiled:    whether the call is only traced now, for a graph that runs it later.
    module:      the path of the module that calls; if None, it is looked for in the frames of this thread.
    """
    module = calling_module() if module is None else module
    q_sizes, k_sizes, v_sizes = [tuple([n if type(n) is int else "*" for n in x.shape]) for x in (q, k, v)]
    dtype = str(q.dtype).removeprefix("torch.")
    said = (dtype, mask, options, answered_by, tuple(reasons), compiled)
    entry = Entry(module, q_sizes, k_sizes, v_sizes, *said)
    with _lock:
        if entry not in _calls and len(_calls) >= LIMIT:
            entry = entry._replace(q=None, k=None, v=None, mask=mask.partition(" (")[0])
        _calls[entry] = _calls.get(entry, 0) + 1


def report() -> Report:
    with _lock:
        return Report(tuple([entry._replace(calls=calls) for entry, calls in _calls.items()]))


def clear() -> None:
    with _lock:
        _calls.clear()
