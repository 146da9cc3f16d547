"""Device functions that ask others, which are not known before a call.

Which function is asked stands in a global of the function that asks, as Triton wants it: TARGET, or whatever
name its file gives it there. `asking` makes a function of its own for each that is asked.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import triton


@functools.cache
def asking(ask: Callable[..., Any], **targets: Any) -> Any:
    """`ask` as a device function in whose globals these targets stand, by name. One for each, so that a
    kernel that was compiled with it is found again."""
    function = types.FunctionType(ask.__code__, {**ask.__globals__, **targets}, ask.__name__)
    function.__module__, function.__qualname__ = ask.__module__, ask.__qualname__
    return triton.jit(function)
