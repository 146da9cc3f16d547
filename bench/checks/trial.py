"""What is one check?"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class NotApplicable(Exception):
    """The machine lacks what the check needs; the text says what."""


@dataclass(frozen=True)
class Trial:
    """A function of the device and the seed that raises AssertionError where something is wrong. What it
    returns says how much it looked at, which differs between a GPU and the interpreter."""

    name: str
    function: Callable[[torch.device, int], str | None]
    needs_gpu: bool = False
    alone: bool = False  # it needs much of the GPU's memory, or would be in the others' way
    width: int = 0  # of the row of the tile table with which it runs Hopper's forward; 0: it does not


def from_tests(module: str, test: str, *arguments: Any) -> Callable[[torch.device, int], str | None]:
    """The check that is the function `test` of a module of tests. Imported when it runs: some of them can
    only be imported where there is a GPU."""
    return functools.partial(_run_test, module, test, arguments)


def _run_test(module: str, test: str, arguments: tuple[Any, ...], device: torch.device, seed: int) -> str:
    getattr(importlib.import_module(module), test)(*arguments)
    return f"{module}.{test}"
