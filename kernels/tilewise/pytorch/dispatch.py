"""Eager, traced or transformed: which way does a call reach the kernels?"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from ..plan.look import look
from ..plan.passes import run_forward
from ..plan.repeated import known, where
from ..plan.request import Request
from .autograd import Attention
from .derivatives import COMPILED, Forward
from .encoding import encode
from .replayed import TENSORS, forward_step, is_observed, known_step

Tensor = torch.Tensor


def answer_again(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """out and lse, of a request like one that was written down; None: it goes the long way. Nothing that this
    leaves out decides anything: an eager call, which nobody watches, of tensors on a GPU."""
    if is_observed() or forward_ad._current_level >= 0:
        return None
    q = request.q
    if type(q) not in TENSORS or not where.holds(q):
        return None
    seen = request.look = look(request, return_lse)
    if seen is None:
        return None
    key, given = seen
    step = known.get(key)
    if step is None or step.replay is None:
        return None
    if step.encoded is not None:  # there are gradients
        out, lse = Attention.apply(None, step.encoded, step, *given)
        return out, lse if return_lse else None
    results: Any = step.replay(*given)
    return results


def run_portable(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The fused Triton kernels."""
    q, k, v = request.q, request.k, request.v
    if torch.compiler.is_compiling():
        tensors, *words = encode(request)
        return torch.ops.tilewise.attention_forward(q, k, v, tensors, *words)[:2]
    if not is_plain_eager(request) or has_tangents(request):
        refuse_transforms_of_a_compiler(request)
        tensors, *words = encode(request)
        # Not the op itself: PyTorch's function transforms do not see an op's autograd.
        return Forward.apply(q, k, v, tuple(words), *tensors)[:2]
    step = known_step(request, return_lse)
    if not request.needs_gradient or torch.is_inference_mode_enabled():
        if step is None:
            return run_forward(request, return_lse)[:2]
        encoded = encode(request)
        return step((q, k, v, *encoded.tensors), partial(forward_step, encoded, return_lse))
    encoded = encode(request)
    if step is not None:
        step.encoded = encoded._replace(tensors=[])
    return Attention.apply(request, encoded, step, q, k, v, *encoded.tensors)


def is_plain_eager(request: Request) -> bool:
    """Whether nobody watches or transforms this call: no dispatch mode, function transform or subclass."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or request.q.is_meta
        or any([type(x) not in (Tensor, torch.nn.Parameter) for x in (request.q, request.k, request.v)])
    )


def refuse_transforms_of_a_compiler(request: Request) -> None:
    """Raise where a compiler has given up on what transforms this call, and hands it over piece by piece."""
    if "torch._dynamo" not in sys.modules or torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:
        return
    if torch._C._functorch.peek_interpreter_stack() is not None or has_tangents(request):
        raise NotImplementedError(COMPILED)


def has_tangents(request: Request) -> bool:
    """Whether forward mode differentiates by one of the request's tensors."""
    if forward_ad._current_level < 0:
        return False
    tensors = [*request.qkv().values(), *[tensor for _, tensor in request.other_tensors]]
    return any([forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors])
