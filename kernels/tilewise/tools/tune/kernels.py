"""What do launches become on this GPU? Seen as they happen, or compiled ahead, many at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.runtime.jit import JITFunction

KERNELS = {
    "forward": "forward_kernel",
    "dkv": "dkv_kernel",
    "dq": "dq_kernel",
    "dqkv": "dqkv_kernel",
    "hopper": "hopper_forward_kernel",
    "hopper_backward": "hopper_backward_kernel",
}
WORKERS = min(16, os.cpu_count() or 1)


class Usage(NamedTuple):
    """What a compiled kernel asks for."""

    kernel: str
    registers: int  # a thread's
    spills: int  # registers of a thread that live in memory
    shared_bytes: int  # a program's


@contextlib.contextmanager
def _every_launch(changed: Callable[..., Any]) -> Iterator[None]:
    """Launches go through changed(launch, kernel, *args, **kwargs). The interpreter's do not."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return changed(launch, self, *args, **kwargs)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch


@contextlib.contextmanager
def watched() -> Iterator[list[Usage]]:
    """Yields a list that gets every kernel launched inside, once it has been loaded."""
    seen: list[Usage] = []

    def watch(launch: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = launch(kernel, *args, **kwargs)
        name, shared = compiled.metadata.name, compiled.metadata.shared
        seen.append(Usage(name, compiled.n_regs, compiled.n_spills, shared))
        return compiled

    with _every_launch(watch):
        yield seen


@contextlib.contextmanager
def compiling_ahead(workers: int = WORKERS) -> Iterator[None]:
    """Kernels launched inside do not run; they are compiled side by side, and are there when this returns.
    One that does not compile says so when it is launched for good."""

    def compile_only(launch: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(kernel, *args, **kwargs | {"warmup": True})

    with (
        ThreadPoolExecutor(workers) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _every_launch(compile_only),
    ):
        yield
