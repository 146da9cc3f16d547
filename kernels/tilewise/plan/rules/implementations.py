"""Rules on who answers, and what that costs: kernels, twins, memory, gradients."""

from __future__ import annotations

import torch

from ...parts.hints import nearest, with_hint
from ...parts.numerics import INTERPRETED
from ...parts.shape import computed_in
from ..implementation import IMPLEMENTATIONS, implementation, is_watched
from ..quadratic import score_matrix_words, stored_pairs
from ..request import Request
from . import hopper as hopper_rules

PORTABLE, HOPPER = "the Triton kernels are 'portable'", "the forward for Hopper GPUs is 'hopper'"
TORCH, CHOOSE = "plain PyTorch is 'torch'", "leave impl=None: where a GPU is, a fused kernel answers"
# What an implementation is called elsewhere, and what it is here.
ELSEWHERE = {
    "triton": PORTABLE, "portable": PORTABLE, "flash": PORTABLE, "flash_attention": PORTABLE,
    "flash_attention_2": PORTABLE, "fa2": PORTABLE, "fused": PORTABLE, "kernel": PORTABLE,
    "interpreter": "leave impl=None, and set TRITON_INTERPRET=1 in the environment before the import",
    "hopper": HOPPER, "gluon": HOPPER, "flash_attention_3": HOPPER, "fa3": HOPPER, "sm90": HOPPER,
    "torch": TORCH, "pytorch": TORCH, "sdpa": TORCH, "math": TORCH, "eager": TORCH, "reference": TORCH,
    "naive": TORCH,
    "cuda": CHOOSE, "gpu": CHOOSE, "cpu": CHOOSE, "auto": CHOOSE, "default": CHOOSE, "fast": CHOOSE,
}  # fmt: skip


def implementation_is_known(r: Request) -> str | None:
    if r.impl is None or r.impl in IMPLEMENTATIONS:
        return None
    near = nearest(r.impl, ELSEWHERE) if isinstance(r.impl, str) else None
    wanted = f"impl={r.impl!r} must be None (choose for me) or one of {IMPLEMENTATIONS}"
    return with_hint(wanted, ELSEWHERE[near] if near else "")


def kernel_can_run(r: Request) -> str | None:
    device, impl = r.q.device.type, implementation(r)
    if impl == "torch" or device in ("cuda", "meta") or (INTERPRETED and device == "cpu"):
        return None
    if device == "cpu":
        return (
            f"{impl=} on CPU tensors runs in Triton's interpreter: set TRITON_INTERPRET=1 in the "
            "environment before tilewise is imported, or leave impl=None for plain PyTorch"
        )
    return f"{impl=} cannot run on {r.q.device}: it needs a CUDA or ROCm GPU; give impl='torch'"


def hopper_can_answer(r: Request) -> str | None:
    if r.impl != "hopper":
        return None
    found = "; ".join(hopper_rules.reasons(r))
    return f"impl='hopper': {found}; leave impl=None for the portable kernel" if found else None


def twins_exist(r: Request) -> str | None:
    """The plain PyTorch path needs every user function in PyTorch too."""
    if implementation(r) != "torch":
        return None
    for part in r.plugs:
        try:
            part.twin(r.whole)
        except ValueError as error:
            return str(error)
    return None


def memory_is_linear(r: Request) -> str | None:
    """strict=True refuses whatever holds a number for every pair of query and key. Plain PyTorch does where a
    graph is made of it, and where something watches each step of a call whose gradients are asked for."""
    if not r.strict:
        return None
    is_whole = torch.compiler.is_compiling() or (r.needs_gradient and is_watched())
    if is_whole and implementation(r) == "torch":
        return (
            f"strict=True, and under torch.compile or a function transform plain PyTorch (impl={r.impl!r} on "
            f"{r.q.device.type}) may hold {score_matrix_words(r.shape, computed_in(r.q.dtype))}: call it "
            "without, or leave strict out"
        )
    return stored_pairs(r.plugs, r.whole)


def gradients_exist(r: Request) -> str | None:
    """The plain PyTorch path differentiates what its twins compute; the kernels need the derivatives."""
    if implementation(r) == "torch" or not r.needs_gradient:
        return None
    for part in r.masks:
        for name, tensor in part.tensors().items():
            if tensor.requires_grad:
                return f"{part.called(name)} requires a gradient, and a mask has none: detach() it"
    for score in r.scores:
        why_not, trained = score.no_gradient(), score.parameters(r.whole)
        if why_not is not None:
            return why_not
        for name, tensor in score.tensors().items():
            if tensor.requires_grad and name not in trained:
                given = score.called(name)
                return (
                    f"{given} requires a gradient, and no derivative with respect to it is known: give "
                    "UserScore(..., parameters={position: (axes, derivative)}), or detach() it"
                )
    return None
