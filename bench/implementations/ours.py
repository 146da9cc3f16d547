"""tilewise itself, each of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tilewise
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, is_backward
from .caches import why_no_cache


class Tilewise(Implementation):
    needs_gpu = False
    seeded = True

    def __init__(self, impl: str) -> None:
        self.impl, self.name = impl, f"tilewise {impl}"

    def unavailable(self, device: torch.device) -> str | None:
        x = torch.empty(1, 1, 1, 16, device=device, dtype=torch.float16)  # which all of them take
        return "; ".join(tilewise.why_not(x, x, x, impl=self.impl)) or None

    def unsupported(self, case: Case, work: Work) -> str | None:
        if reason := why_no_cache(case, work, self.name):
            return reason
        inputs = case_inputs(case, "meta", gradients=is_backward(work))
        q, k, v, given, _ = inputs
        return "; ".join(tilewise.why_not(q, k, v, **given, impl=self.impl)) or None

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        q, k, v, arguments, learned = inputs
        leaves = {name: x for name, x in dict(q=q, k=k, v=v, **learned).items() if x.requires_grad}
        attend: Callable[..., Any] = tilewise.attention
        if case.lengths is not None:
            attend = tilewise.packed_attention
        elif case.cache is not None:
            attend = tilewise.cached_attention
        return Prepared(lambda: attend(q, k, v, **arguments, impl=self.impl), leaves)
