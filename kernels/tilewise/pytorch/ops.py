"""The library ops `tilewise::attention_forward` and `tilewise::attention_backward`.

What traces or transforms PyTorch programs (torch.compile, torch.export, fake tensors, FLOP counters,
torch.func.grad) sees these two ops, with a schema, an autograd formula and the shapes of their results. Plain
eager calls take the shorter way of `autograd.Attention`; both end in the same two functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..parts.shape import computed_in
from ..plan.implementation import implementation
from ..plan.passes import empty_in_order_of, run_backward, run_forward
from .autograd import SECOND_ORDER
from .encoding import Encoded, decode
from .plain import run_torch

Tensor = torch.Tensor

library = torch.library.Library("tilewise", "FRAGMENT")
_key = torch._C.DispatchKey
AUTOGRAD = torch._C.DispatchKeySet(_key.AutogradCPU)
for each in (_key.AutogradCUDA, _key.AutogradOther, _key.ADInplaceOrView):
    AUTOGRAD = AUTOGRAD.add(each)
REQUEST = "Tensor[] tensors, SymInt[] ints, float[] floats, str spec"  # encoding.py
library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {REQUEST}) "
    "-> (Tensor out, Tensor lse, Tensor statistics)"
)
library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor statistics, {REQUEST}, bool[] needs) -> Tensor[]"
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float], spec: str
) -> tuple[Tensor, ...]:
    request = decode(q, k, v, Encoded(tensors, ints, floats, spec))
    if implementation(request) == "torch":
        out, lse = run_torch(request, return_lse=True)
        statistics = q.new_zeros((2, *q.shape[:3]), dtype=computed_in(q.dtype))
        return out, lse, statistics  # type: ignore[return-value]
    return run_forward(request, return_lse=True, for_backward=True)  # type: ignore[return-value]


def forward_shapes(q: Tensor, k: Tensor, v: Tensor, *request: Any) -> tuple[Tensor, ...]:
    lse = q.new_empty(q.shape[:3], dtype=computed_in(q.dtype))
    return empty_in_order_of(q, v.shape[3]), lse, lse.new_empty((2, *q.shape[:3]))


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    encoded = Encoded(tensors, ints, floats, spec)
    request = decode(q, k, v, encoded)
    if implementation(request) == "torch":
        return plain_gradients(q, k, v, encoded, do, dlse, needs)
    return run_backward(request, out, statistics, do, dlse, needs)


def plain_gradients(
    q: Tensor, k: Tensor, v: Tensor, encoded: Encoded, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """PyTorch's own, through the plain path: an op is called where autograd no longer looks, so it is asked
    to look again."""
    given = (q, k, v, *encoded.tensors)
    q, k, v, *others = leaves = [x.detach().requires_grad_(n) for x, n in zip(given, needs, strict=True)]
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - AUTOGRAD
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        results = run_torch(decode(q, k, v, encoded._replace(tensors=others)), return_lse=True)
        pairs = [
            (x, dx) for x, dx in zip(results, (do, dlse), strict=True) if x is not None and dx is not None
        ]
        wanted = [x for x, needed in zip(leaves, needs, strict=True) if needed]
        outs, arrived = zip(*pairs, strict=True)
        return list(torch.autograd.grad(outs, wanted, arrived, materialize_grads=True))


def backward_shapes(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = [empty_in_order_of(x, x.shape[3]) for x in (q, k, v)]
    grads += [tensor.new_empty(tensor.shape) for tensor in tensors]
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


class Forward(torch.autograd.Function):
    """attention_forward and its derivative. With a `setup_context` and without a `jvp`, unlike what
    `torch.library.register_autograd` makes: function transforms can use it, and forward mode raises."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, words: tuple[Any, ...], *tensors: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.tilewise.attention_forward(q, k, v, list(tensors), *words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, ctx.words, *tensors = inputs
        out, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(q, k, v, out, statistics, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        q, k, v, out, statistics, *tensors = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
        do = torch.zeros_like(out) if do is None else do
        differentiate = (
            torch.ops.tilewise.attention_backward if torch.compiler.is_compiling() else backward_autograd
        )
        grads = iter(differentiate(do, dlse, q, k, v, out, statistics, tensors, *ctx.words, needs))
        dq, dk, dv, *others = [next(grads) if needed else None for needed in needs]
        return dq, dk, dv, None, *others


class Backward(torch.autograd.Function):
    """attention_backward, whose own derivative raises."""

    @staticmethod
    def forward(words: tuple[Any, ...], *given: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.tilewise.attention_backward(*given[:7], list(given[7:]), *words))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(SECOND_ORDER)


def forward_autograd(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], *words: Any) -> Any:
    return Forward.apply(q, k, v, words, *tensors)


def backward_autograd(*given: Any) -> list[Tensor]:
    """Arguments as in the schema; the eighth is the list of tensors."""
    return list(Backward.apply(given[8:], *given[:7], *given[7]))


for key in ("CPU", "CUDA"):
    library.impl("attention_forward", forward, key)
    library.impl("attention_backward", backward, key)
torch.library.register_fake("tilewise::attention_forward", forward_shapes, lib=library)
torch.library.register_fake("tilewise::attention_backward", backward_shapes, lib=library)
library.impl("attention_forward", forward_autograd, "Autograd")
library.impl("attention_backward", backward_autograd, "Autograd")


# FLOPs as PyTorch counts them for its own attention: every pair, masked or not; a product is 2 FLOPs.


@register_flop_formula(torch.ops.tilewise.attention_forward)
def forward_flops(q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """Q Kᵀ and P V. q, k and v are shapes."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (q[3] + v[3])


@register_flop_formula(torch.ops.tilewise.attention_backward)
def backward_flops(do: Any, dlse: Any, q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """S = Q Kᵀ, dQ = dS K and dK = dSᵀ Q over head_dim; dP = dO Vᵀ and dV = Pᵀ dO over value_dim."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (3 * q[3] + 2 * v[3])
