"""tilewise itself, each of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tilewise
from tilewise import Stats
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import STATISTICS, Implementation, Known, Prepared, is_backward
from .caches import why_no_cache


class Tilewise(Implementation):
    needs_gpu = False
    seeded = True
    statistics = STATISTICS["statistics"]

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
        asked = dict(return_stats=stats_of(work)) if work in STATISTICS else {}
        return "; ".join(tilewise.why_not(q, k, v, **given, **asked, impl=self.impl)) or None

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        q, k, v, arguments, learned = inputs
        leaves = {name: x for name, x in dict(q=q, k=k, v=v, **learned).items() if x.requires_grad}
        attend: Callable[..., Any] = tilewise.attention
        if case.lengths is not None:
            attend = tilewise.packed_attention
        elif case.cache is not None:
            attend = tilewise.cached_attention
        if work in STATISTICS:
            stats = stats_of(work)

            def call() -> Known:
                out, found = attend(q, k, v, **arguments, return_stats=stats, impl=self.impl)
                return Known(out, found.max_logit, found.entropy, found.key_mass)

            return Prepared(call, leaves)
        return Prepared(lambda: attend(q, k, v, **arguments, impl=self.impl), leaves)


def stats_of(work: Work) -> Stats:
    has_all = work == "statistics"
    return Stats(max_logit=True, entropy=has_all, key_mass=has_all)
