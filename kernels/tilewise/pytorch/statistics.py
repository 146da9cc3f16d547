"""Attention with what its softmax knows beside the result: what ties it together for PyTorch's autograd.

Every call goes the long way: it is made for looking at a model and for losses of a few of its layers. Under
torch.compile it is left to eager mode, a break in the graph. There is no second derivative through the
kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from ..parts.stats import Statistics, Stats
from ..plan import statistics as passes
from ..plan.implementation import implementation, is_watched
from ..plan.request import Request
from ..plan.statistics import Arrived, Kept
from .encoding import Encoded, decode, encode
from .plain import run_torch
from .plain_statistics import plain_statistics

Tensor = torch.Tensor
GRADIENTS = 5  # those that arrive: of out, lse, max_logit, entropy and key_mass

SECOND_ORDER = (
    "tilewise.attention with return_stats has no second-order gradients: its gradient was differentiated "
    "again. Give impl='torch' for the plain PyTorch path, which has them, or drop create_graph=True"
)
WATCHED = (
    "return_stats under torch.func, forward mode, a dispatch mode or with tensors of a subclass is not built "
    "for the kernels: call it outside, or give impl='torch'"
)


def answer_with_statistics(request: Request, stats: Stats) -> tuple[Tensor, Tensor, Statistics]:
    """out, lse and statistics [blocks, heads, ...] of a request that has been checked."""
    if torch.compiler.is_compiling():
        from .uncompiled import uncompiled

        found: tuple[Tensor, Tensor, Statistics] = uncompiled(answered, request, stats)
        return found
    return answered(request, stats)


def answered(request: Request, stats: Stats) -> tuple[Tensor, Tensor, Statistics]:
    if implementation(request) == "torch":
        out, lse = run_torch(request, return_lse=True)
        assert lse is not None
        return out, lse, plain_statistics(request, stats)
    inputs = [*request.qkv().values(), *[x for _, x in request.other_tensors]]
    if is_watched() or any([type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in inputs]):
        raise NotImplementedError(WATCHED)
    if not request.needs_gradient or torch.is_inference_mode_enabled():
        return passes.forward(request, stats, for_backward=False)[:3]
    out, lse, *found = WithStatistics.apply(request, stats, *inputs)
    return out, lse, Statistics(*found)


class WithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, request: Request, stats: Stats, *tensors: Tensor) -> Any:
        out, lse, found, kept = passes.forward(request, stats, for_backward=True)
        ctx.stats, ctx.encoded, ctx.count = stats, encode(request)._replace(tensors=[]), len(tensors)
        # Tensors are kept by autograd alone, so that its hooks (checkpointing, offloading) see them all.
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in found[3:] if x is not None])
        return out, lse, *found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        tensors, kept, arrived = saved[: ctx.count], Kept(*saved[ctx.count :]), Arrived(*grads[:GRADIENTS])
        with torch.no_grad():
            request = decoded(ctx.encoded, tensors)
            found = iter(passes.backward(request, ctx.stats, kept, arrived, list(needs)))
        result = [next(found) if needed else None for needed in needs]
        if torch.is_grad_enabled():  # create_graph=True
            result = Undifferentiable.apply(len(result), *result, *arrived, *tensors)
        return None, None, *result


def decoded(encoded: Encoded, tensors: tuple[Tensor, ...]) -> Request:
    q, k, v, *others = tensors
    return decode(q, k, v, encoded._replace(tensors=others))


class Undifferentiable(torch.autograd.Function):
    """The first tensors as they are, with all the others as what they depend on; its own gradient raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(SECOND_ORDER)
