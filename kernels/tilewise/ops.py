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

from .autograd import SECOND_ORDER, empty_in_order_of, run_backward, run_forward
from .encoding import Encoded, decode

Tensor = torch.Tensor

library = torch.library.Library("tilewise", "FRAGMENT")
REQUEST = "Tensor[] tensors, SymInt[] ints, float[] floats, str spec"  # encoding.py
library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {REQUEST}) -> (Tensor out, Tensor lse)")
library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{REQUEST}, bool[] needs) -> Tensor[]"
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float], spec: str
) -> tuple[Tensor, Tensor]:
    out, lse = run_forward(decode(q, k, v, Encoded(tensors, ints, floats, spec)), return_lse=True)
    assert lse is not None
    return out, lse


def forward_shapes(q: Tensor, k: Tensor, v: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    request = decode(q, k, v, Encoded(tensors, ints, floats, spec))
    return run_backward(request, out, lse, do, dlse, needs)


def backward_shapes(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = [empty_in_order_of(x, x.shape[3]) for x in (q, k, v)]
    grads += [tensor.new_empty(tensor.shape) for tensor in tensors]
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


for key in ("CPU", "CUDA"):
    library.impl("attention_forward", forward, key)
    library.impl("attention_backward", backward, key)
torch.library.register_fake("tilewise::attention_forward", forward_shapes, lib=library)
torch.library.register_fake("tilewise::attention_backward", backward_shapes, lib=library)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tensors, *ctx.words = inputs
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    of_qkv, of_tensors = ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
    needs = [*of_qkv, *(of_tensors if isinstance(of_tensors, (list, tuple)) else [])]
    do = torch.zeros_like(out) if do is None else do
    grads = iter(
        torch.ops.tilewise.attention_backward(do, dlse, q, k, v, out, lse, tensors, *ctx.words, needs)
    )
    dq, dk, dv, *others = [next(grads) if needed else None for needed in needs]
    # PyTorch takes an empty list of numbers for a list of tensors.
    ints, floats, _ = ctx.words
    return dq, dk, dv, others, None if ints else [], None if floats else [], None


def refuse_second_order(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(SECOND_ORDER)


torch.library.register_autograd(
    "tilewise::attention_forward", differentiate, setup_context=keep_for_backward, lib=library
)
torch.library.register_autograd("tilewise::attention_backward", refuse_second_order, lib=library)


# FLOPs as PyTorch counts them for its own attention: every pair, masked or not; a product is 2 FLOPs.


@register_flop_formula(torch.ops.tilewise.attention_forward)  # type: ignore[untyped-decorator]
def forward_flops(q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """Q Kᵀ and P V. q, k and v are shapes."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (q[3] + v[3])


@register_flop_formula(torch.ops.tilewise.attention_backward)  # type: ignore[untyped-decorator]
def backward_flops(do: Any, dlse: Any, q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """S = Q Kᵀ, dQ = dS K and dK = dSᵀ Q over head_dim; dP = dO Vᵀ and dV = Pᵀ dO over value_dim."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (3 * q[3] + 2 * v[3])
