"""What a call costs the host: the same implementation through torch.compile, or with kernels replaced by
nothing, so that only the work above Triton's launch is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
import torch._functorch.config  # not imported with torch
from triton.runtime import KernelInterface

from tilewise.kernels import backward, forward, parameters, prepare
from tilewise.parts import dropout
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

    def unavailable(self, device: torch.device) -> str | None:
        return self.inner.unavailable(device)

    def unsupported(self, case: Case, work: Work) -> str | None:
        return self.inner.unsupported(case, work)


class Unlaunched(Wrapped):
    """Its Triton kernels are replaced by nothing while it is timed; its answer is checked with them."""

    def __init__(self, inner: Implementation) -> None:
        super().__init__(inner, "no launch")

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        return replace(self.inner.prepare(case, inputs, work), during=no_launch)


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
def no_launch() -> Iterator[None]:
    """Every kernel of tilewise does nothing when launched."""
    found = [value for module in MODULES for value in vars(module).values()]
    # By class: an instance would have to be replaced in every module that imported it.
    classes = {type(value) for value in found if isinstance(value, KernelInterface)}
    patches = [patch.object(cls, "run", lambda *args, **options: None) for cls in classes]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
