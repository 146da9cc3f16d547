"""Who answers a call: the portable kernels, Hopper's, or plain PyTorch?"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from ..parts.numerics import INTERPRETED
from .request import Request
from .rules import hopper as hopper_rules

IMPLEMENTATIONS = ("portable", "hopper", "torch")


def implementation(request: Request) -> str:
    """The implementation that answers: the one asked for, else a fused kernel wherever one can run. None
    computes in fp64."""
    if request.impl is not None:
        return request.impl
    if request.q.dtype == torch.float64:
        return "torch"
    if not INTERPRETED and request.q.device.type not in ("cuda", "meta"):
        return "torch"
    return "hopper" if hopper_rules.is_default(request) else "portable"


def backward_implementation(request: Request) -> str:
    """The one that answers the backward of a fused forward: Hopper's where it is asked for and takes the
    call. No GPU has shown yet that it is right and faster."""
    if request.impl == "hopper" and not any(hopper_rules.backward_reasons(request)):
        return "hopper"
    return "portable"


def is_watched() -> bool:
    """Whether a function transform, a level of forward mode or a dispatch mode looks at every step."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
