"""Forward and backward of a request, and what ties them together for PyTorch's autograd in eager mode."""

from __future__ import annotations

import math
from typing import Any

import torch

from .backward import launch_dkv, launch_dq
from .call import Call, bind
from .checks import Request
from .encoding import Encoded, decode
from .forward import launch_forward
from .hopper import rules as hopper_rules
from .parameters import parameter_gradient
from .prepare import BackwardCall, prepare
from .scores import Parameter
from .tile_table import HopperTile
from .tiles import choose_tile, square_tile

Tensor = torch.Tensor


def run_forward(
    request: Request, return_lse: bool, for_backward: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [batch, q_heads, q_len, value_dim] in q's dtype and memory order, lse [batch, q_heads, q_len], and
    the statistics [2, batch, q_heads, q_len] of `launch_forward`."""
    q, shape = request.q, request.shape
    rows = shape.scores[:3]
    out = empty_in_order_of(q, shape.value_dim)
    lse = q.new_empty(rows, dtype=torch.float32) if return_lse else None
    statistics = q.new_empty((2, *rows), dtype=torch.float32) if for_backward else None
    call = bind(request)
    if request.implementation == "hopper":
        launch_hopper(request, call, out, lse, statistics)
    else:
        launch_forward(call, out, lse, statistics, choose_tile(q, shape, "forward"))
    return out, lse, statistics


def launch_hopper(
    request: Request, call: Call, out: Tensor, lse: Tensor | None, statistics: Tensor | None
) -> None:
    """The forward of Hopper's kernel, which Gluon is imported for. Where a graph was compiled before, it is
    only now that the chip and the addresses are known."""
    from .hopper.launch import launch_forward

    for rule in (hopper_rules.chip_is_hopper, hopper_rules.tensors_can_be_copied):
        if (reason := rule(request)) is not None:
            raise ValueError(f"impl='hopper': {reason}")
    tile = choose_tile(request.q, request.shape, "hopper")
    if not isinstance(tile, HopperTile):  # forced on all passes by `tiles.use`
        raise ValueError(f"impl='hopper' needs a HopperTile, not {tile}")
    launch_forward(call, out, lse, statistics, tile)


def run_backward(
    request: Request, out: Tensor, statistics: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """The gradients of those of (q, k, v, *other tensors) that `needs` names, in order."""
    q, k, v, shape = request.q, request.k, request.v, request.shape
    tile = choose_tile(q, shape, "dkv")
    # The kernels index statistics and dlse as dense arrays.
    dlse = None if dlse is None else dlse.contiguous()
    backward = prepare(bind(request), out, statistics.contiguous(), do, dlse, tile.tile_q)
    grads: dict[int, Tensor] = {}
    if needs[0]:
        grads[0] = empty_in_order_of(q, shape.head_dim)
        launch_dq(backward, grads[0], choose_tile(q, shape, "dq"))
    if needs[1] or needs[2]:
        grads[1], grads[2] = empty_in_order_of(k, shape.head_dim), empty_in_order_of(v, shape.value_dim)
        launch_dkv(backward, grads[1], grads[2], tile)
    others = request.other_tensors
    for slot, modifier, parameter in parameter_slots(request):
        if needs[3 + slot]:
            grad = parameter_gradient(backward, modifier, parameter, others[slot][1], square_tile(tile))
            grads[3 + slot] = grad
    for slot, (name, tensor) in enumerate(others):
        if name == "sink" and needs[3 + slot]:
            grads[3 + slot] = sink_gradient(tensor, backward)
    return [grads[i] for i, needed in enumerate(needs) if needed]


def parameter_slots(request: Request) -> list[tuple[int, int, Parameter]]:
    """Each parameter of a score: its place in `other_tensors`, its modifier's place in `chain`, itself."""
    names = [name for name, _ in request.other_tensors]
    found = []
    own = len(request.similarity_scores.scores)
    for modifier, score in enumerate(request.chain[:own]):
        for name, parameter in score.parameters(request.shape).items():
            found.append((names.index(name), modifier, parameter))
    slot = len(names) - sum(len(score.tensors()) for score in request.scores)
    for modifier, score in enumerate(request.scores, start=own):
        parameters = score.parameters(request.shape)
        for name in score.tensors():
            if name in parameters:
                found.append((slot, modifier, parameters[name]))
            slot += 1
    return found


def sink_gradient(sink: Tensor, backward: BackwardCall) -> Tensor:
    """dsink = -Σ P_sink · delta: a sink is one more key, whose value is 0."""
    row_max = backward.row_max  # in natural units wherever there is a sink
    p = torch.exp2((sink.float()[:, None] - row_max) / math.log(2) - backward.sum_log2)
    p = torch.where(row_max == -torch.inf, 0.0, p)  # [batch, q_heads, q_len]
    return -(p * backward.delta).sum((0, 2)).to(sink.dtype)


def empty_in_order_of(x: Tensor, dim: int) -> Tensor:
    """A tensor with x's first three sizes and `dim`, dense, its dimensions in memory in the order of x's, so
    that a caller who transposed [batch, length, heads, dim] inputs can transpose back without a copy."""
    if x.is_contiguous():
        return x.new_empty((*x.shape[:3], dim))
    order = sorted(range(3), key=x.stride, reverse=True)
    sizes = [x.shape[axis] for axis in order]
    return x.new_empty((*sizes, dim)).permute(*[order.index(axis) for axis in range(3)], 3)


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
