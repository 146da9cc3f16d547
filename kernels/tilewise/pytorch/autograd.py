"""Eager mode: what ties forward and backward together for PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import torch

from ..plan.passes import run_backward, run_forward
from ..plan.request import Request
from .encoding import Encoded, decode

Tensor = torch.Tensor

SECOND_ORDER = (
    "tilewise.attention has no second-order gradients: its gradient was differentiated again. Give "
    "impl='torch' for the plain PyTorch path, which has them, or drop create_graph=True"
)


class Attention(torch.autograd.Function):
    """The fast path of eager mode: no op dispatch between autograd and the kernels."""

    @staticmethod
    def forward(ctx: Any, request: Request, encoded: Encoded, *tensors: Tensor) -> Any:
        out, lse, statistics = run_forward(request, return_lse=True, for_backward=True)
        # Tensors are kept by autograd alone, so that its hooks (checkpointing, offloading) see them all.
        ctx.encoded = encoded._replace(tensors=[])
        ctx.save_for_backward(*tensors, out, statistics)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, *others, out, statistics = ctx.saved_tensors
        request = decode(q, k, v, ctx.encoded._replace(tensors=others))
        needs = list(ctx.needs_input_grad[2:])
        with torch.no_grad():
            do = torch.zeros_like(out) if do is None else do
            grads = iter(run_backward(request, out, statistics, do, dlse, needs))
        result = [next(grads) if needed else None for needed in needs]
        if torch.is_grad_enabled():  # create_graph=True
            result = Undifferentiable.apply(len(result), *result, do, dlse, *ctx.saved_tensors)
        return None, None, *result


class Undifferentiable(torch.autograd.Function):
    """The first tensors as they are, with all the others as what they depend on; its own gradient raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(SECOND_ORDER)
