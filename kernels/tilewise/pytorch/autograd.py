"""Eager mode: what ties forward and backward together for PyTorch's autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..plan.passes import run_forward
from ..plan.repeated import Repeated
from ..plan.request import Request
from .derivatives import gradients
from .encoding import Encoded
from .replayed import backward_step, forward_step, known_backward

Tensor = torch.Tensor


class Attention(torch.autograd.Function):
    """The fast path of eager mode: no op dispatch between autograd and the kernels.

    step: what repeats the forward, if this call may be repeated. Without a request its replay is there."""

    @staticmethod
    def forward(
        ctx: Any, request: Request | None, encoded: Encoded, step: Repeated | None, *tensors: Tensor
    ) -> Any:
        found: Any = None
        if step is not None and step.replay is not None:
            found = step.replay(*tensors)
        if found is None and step is not None:
            found = step(tensors, partial(forward_step, encoded, True, for_backward=True))
        if found is None:
            assert request is not None
            found = run_forward(request, return_lse=True, for_backward=True)
        out, lse, statistics = found
        # Tensors are kept by autograd alone, so that its hooks (checkpointing, offloading) see them all.
        ctx.encoded, ctx.step = encoded._replace(tensors=[]), step
        ctx.save_for_backward(*tensors, out, statistics)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        needs, saved = ctx.needs_input_grad[3:], ctx.saved_tensors
        if do is None and dlse is None:  # a second derivative, which takes out and is not derived by it
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph=True
            *tensors, out, statistics = saved
            q, k, v, *others = tensors
            grads = gradients(ctx.encoded[1:], needs, do, dlse, q, k, v, out, statistics, *others)
            return None, None, None, *grads
        do = torch.zeros_like(saved[-2]) if do is None else do
        tensors = (*saved, do) if dlse is None else (*saved, do, dlse)
        found: Any
        step = None if ctx.step is None else known_backward(ctx.step, needs, tensors)
        found = None if step is None or step.replay is None else step.replay(*tensors)
        if found is None:
            run = partial(backward_step, ctx.encoded, needs)
            found = run(*tensors) if step is None else step(tensors, run)
        grads = iter(found)
        result = [next(grads) if needed else None for needed in needs]
        return None, None, None, *result
