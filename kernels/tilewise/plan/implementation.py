"""Who answers a call: the portable kernels, Hopper's forward, or plain PyTorch?"""

from __future__ import annotations

from ..parts.numerics import INTERPRETED
from .request import Request
from .rules import hopper as hopper_rules

IMPLEMENTATIONS = ("portable", "hopper", "torch")


def implementation(request: Request) -> str:
    """The implementation that answers: the one asked for, else a fused kernel wherever one can run."""
    if request.impl is not None:
        return request.impl
    if not INTERPRETED and request.q.device.type not in ("cuda", "meta"):
        return "torch"
    return "hopper" if hopper_rules.is_default(request) else "portable"
