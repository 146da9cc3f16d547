"""What becomes of a run when a kernel hangs, crashes, is wrong or lacks memory? Such a kernel, to see.

A rehearsal plants them; nothing else does.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch

import tilewise


@dataclass(frozen=True)
class Fault:
    """What goes wrong in every call that asks for `impl`."""

    kind: Literal["hang", "crash", "wrong", "memory"]
    impl: str


def perform(fault: Fault, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) with the fault in place."""
    attention = tilewise.attention

    def faulty(*given: Any, **options: Any) -> Any:
        if options.get("impl") != fault.impl:
            return attention(*given, **options)
        if fault.kind == "hang":
            time.sleep(3600)
        if fault.kind == "crash":
            ctypes.string_at(0)
        if fault.kind == "memory":
            raise torch.OutOfMemoryError("planted: no memory is left")
        found = attention(*given, **options)
        return (found[0] + 1, *found[1:]) if isinstance(found, tuple) else found + 1

    with mock.patch.object(tilewise, "attention", faulty):
        return function(*arguments)
