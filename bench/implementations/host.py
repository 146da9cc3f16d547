"""What a call costs the host: the same implementation through torch.compile, or with kernels replaced by
nothing, so that only the work above Triton's launch is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config  # not imported with torch
from triton.runtime import KernelInterface

from tilewise.kernels import backward, forward, launch, parameters, prepare
from tilewise.parts import dropout
from tilewise.plan import repeated
from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared

MODULES = (forward, prepare, backward, parameters, dropout)


class Wrapped(Implementation):
    """Another implementation, with something around it."""

    def __init__(self, inner: Implementation, words: str) -> None:
        self.inner, self.name = inner, f"{inner.name}, {words}"
        self.needs_gpu, self.seeded = inner.needs_gpu, inner.seeded
        self.differentiates_once, self.statistics = inner.differentiates_once, inner.statistics

    def unavailable(self, device: torch.device) -> str | None:
        return self.inner.unavailable(device)

    def unsupported(self, case: Case, work: Work) -> str | None:
        return self.inner.unsupported(case, work)


class Unlaunched(Wrapped):
    """Its Triton kernels are replaced by nothing while it is timed; its answer is checked with them."""

    def __init__(self, inner: Implementation) -> None:
        super().__init__(inner, "no launch")
        self.steps: dict[Any, Any] = {}  # that are repeated: entered anew for each sample

    def unavailable(self, device: torch.device) -> str | None:
        if device.type == "cpu" and self.inner.name == "tilewise hopper":
            return "on a CPU an emulator runs in the place of a launch"
        return super().unavailable(device)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        return replace(self.inner.prepare(case, inputs, work), during=partial(no_launch, self.steps))


class Compiled(Wrapped):
    """Through torch.compile: by inductor on a GPU, else by what needs no C++ compiler."""

    def __init__(self, inner: Implementation) -> None:
        super().__init__(inner, "compiled")

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        prepared = self.inner.prepare(case, inputs, work)
        backend = "inductor" if inputs.q.device.type == "cuda" else "aot_eager"
        torch._functorch.config.donated_buffer = False  # as in flex.py
        compiled = torch.compile(prepared.call, fullgraph=True, dynamic=False, backend=backend)
        return replace(prepared, call=compiled)


@contextmanager
def no_launch(steps: dict[Any, Any] | None = None) -> Iterator[None]:
    """Every kernel of tilewise does nothing when launched, but for the launches that are written down to be
    repeated: those know which kernel it is. Calls are repeated in the interpreter too. steps: those that are
    known, for the next time."""
    steps = {} if steps is None else steps
    found = [value for module in MODULES for value in vars(module).values()]
    # By class: an instance would have to be replaced in every module that imported it.
    classes = {type(value) for value in found if isinstance(value, KernelInterface)}
    with ExitStack() as stack:
        for each in classes:
            stack.enter_context(patch.object(each, "run", while_written_down(each.run)))
        stack.enter_context(patch.object(launch, "way", to_nothing(launch.way)))
        stack.enter_context(patch.dict(repeated.known, steps, clear=True))  # none that launches
        stack.enter_context(patch.object(repeated.Where, "cpu", True))
        yield
        steps.update(repeated.known)


def while_written_down(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's launch, where somebody writes it down; nothing else."""

    def instead(kernel: Any, *args: Any, **options: Any) -> Any:
        return run(kernel, *args, **options) if launch.is_told() else None

    return instead


def to_nothing(way: Callable[..., Any]) -> Callable[..., Any]:
    """The way to a repeated launch, but for the last step."""
    return lambda compiled: (nothing, *way(compiled)[1:])


def nothing(*_: Any) -> None:
    pass
