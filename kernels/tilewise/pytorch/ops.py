"""The library ops `tilewise::attention_forward`, `_backward`, `_tangent` and `_second`.

What traces or transforms PyTorch programs (torch.compile, torch.export, fake tensors, FLOP counters,
torch.func) sees these ops, with a schema, the shapes of their results and, in derivatives.py, their
derivatives. Plain eager calls take the shorter way of `autograd.Attention`; both end in the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..parts.fp8 import FP8
from ..parts.shape import computed_in
from ..plan.derivatives import run_second, run_tangent
from ..plan.implementation import implementation
from ..plan.passes import empty_in_order_of, run_backward, run_forward
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
library.define(
    f"attention_tangent(Tensor q, Tensor k, Tensor v, Tensor statistics, {REQUEST}, Tensor?[] tangents) "
    "-> (Tensor out, Tensor lse)"
)
library.define(
    "attention_second(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor statistics, "
    f"{REQUEST}, Tensor?[] tangents, Tensor mean, bool[] needs) -> Tensor[]"
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
    dtype = decode(q, k, v, Encoded(*request)).out_dtype if q.dtype == FP8 else q.dtype
    lse = q.new_empty(q.shape[:3], dtype=computed_in(q.dtype))
    return empty_in_order_of(q, v.shape[3], dtype), lse, lse.new_empty((2, *q.shape[:3]))


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


def tangent(
    q: Tensor, k: Tensor, v: Tensor, statistics: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, tangents: list[Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run_tangent(decode(q, k, v, Encoded(tensors, ints, floats, spec)), statistics, tangents)


def tangent_shapes(q: Tensor, k: Tensor, v: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
    out, lse, _ = forward_shapes(q, k, v)
    return out, lse


def second(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, tangents: list[Tensor | None],
    mean: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    request = decode(q, k, v, Encoded(tensors, ints, floats, spec))
    return run_second(request, statistics, do, dlse, tangents, mean, needs)


def second_shapes(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor,
    tensors: list[Tensor], ints: list[int], floats: list[float], spec: str, tangents: list[Tensor | None],
    mean: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return backward_shapes(do, dlse, q, k, v, do, statistics, tensors, ints, floats, spec, needs)


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (forward, forward_shapes), "backward": (backward, backward_shapes),
    "tangent": (tangent, tangent_shapes), "second": (second, second_shapes),
}  # fmt: skip
for name, (run, shapes) in OPS.items():
    for key in ("CPU", "CUDA"):
        library.impl(f"attention_{name}", run, key)
    torch.library.register_fake(f"{library.ns}::attention_{name}", shapes, lib=library)


# FLOPs as PyTorch counts them for its own attention: every pair, masked or not; a product is 2 FLOPs.


@register_flop_formula(torch.ops.tilewise.attention_forward)
def forward_flops(q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """Q Kᵀ and P V. q, k and v are shapes."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (q[3] + v[3])


@register_flop_formula(torch.ops.tilewise.attention_tangent)
def tangent_flops(q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """S and Ṡ, of three products, twice; Ṗ V and P V̇."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (6 * q[3] + 2 * v[3])


@register_flop_formula(torch.ops.tilewise.attention_second)
def second_flops(do: Any, dlse: Any, q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """S and Ṡ, dP and dṖ; dQ̇ and dK̇, of two products each; dV̇."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (7 * q[3] + 3 * v[3])


@register_flop_formula(torch.ops.tilewise.attention_backward)
def backward_flops(do: Any, dlse: Any, q: Any, k: Any, v: Any, *request: Any, **_: Any) -> int:
    """S = Q Kᵀ, dQ = dS K and dK = dSᵀ Q over head_dim; dP = dO Vᵀ and dV = Pᵀ dO over value_dim."""
    return 2 * math.prod(q[:3]) * int(k[2]) * (3 * q[3] + 2 * v[3])
