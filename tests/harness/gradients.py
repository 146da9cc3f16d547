"""The rule for a match (`harness.oracle`), applied to gradients.

The float64 oracle differentiates the specification on float64 copies of everything that is trained; the
yardstick differentiates PyTorch's way in the same dtype, rounding where PyTorch's fused kernels round
(`tilewise_reference.yardstick`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from tilewise.plan.passes import parameter_slots
from tilewise.plan.request import Request, as_heads, request_of
from tilewise.pytorch.encoding import decode, encode, leaves_of
from tilewise_reference.yardstick import largest_difference

from .oracle import (
    NEIGHBOURS,
    SAMPLES,
    _assert_close,
    as_of_request,
    assert_matches,
    call,
    exact,
    neighbour,
    others_asked,
    pytorch,
)

Tensor = torch.Tensor


def check_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None, dlse: Tensor | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """Run `tilewise.attention` forward and backward with these arguments, and hold out, lse and every
    gradient against float64: those of q, k, v, the sink and all parameters of scores.

    do, dlse: the gradients of out and lse; random if None. impl is "portable" unless given; then the
    gradients after the forwards of `oracle.ALSO` must be right too, where they take the call. Returns the
    gradients of the implementation under test, by name. Raises AssertionError that names the gradient, the
    worst element and what was allowed there.
    """
    for impl in others_asked(q, k, v, **arguments):
        check_gradients(q, k, v, do, dlse, **arguments, impl=impl)
    arguments = {"impl": "portable"} | arguments
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    names = trained(request_of(q, k, v, **arguments))
    others = [tensor.requires_grad_() for tensor in names.values()]
    try:
        out, lse = call(q, k, v, **arguments)
        do = torch.randn_like(out) if do is None else do
        dlse = torch.randn_like(lse) if dlse is None else dlse
        request = request_of(q, k, v, **arguments)
        with torch.no_grad():
            assert_matches(*as_of_request(out, lse, arguments), request)
        got = torch.autograd.grad((out, lse), (q, k, v, *others), (do, dlse))
        found = dict(zip(("q", "k", "v", *names), got, strict=True))
        if request.packing is not None:
            found |= dict(zip("qkv", as_heads(*got[:3]), strict=True))
        assert_gradients_match(found, request, *as_of_request(do, dlse, arguments))
        return found
    finally:
        for tensor in others:
            tensor.requires_grad_(False)


def assert_gradients_match(found: dict[str, Tensor], request: Request, do: Tensor, dlse: Tensor) -> None:
    """Assert that these gradients of the request's q, k, v and parameters answer do and dlse."""
    wanted, errors = exact_gradients(request, do, dlse), dict.fromkeys(found, 0.0)
    problems = [(request, wanted)]
    elements = max(1, min(gradient.numel() for gradient in found.values()))
    generator = torch.Generator(device=request.q.device).manual_seed(2)
    for _ in range(min(NEIGHBOURS, -(-SAMPLES // elements) - 1)):
        near = neighbour(request, generator)
        problems.append((near, exact_gradients(near, do, dlse)))
    for problem, exactly in problems:
        for name, gradient in pytorch_gradients(problem, do, dlse).items():
            errors[name] = max(errors[name], largest_difference(gradient, exactly[name]))
    for name, gradient in found.items():
        tensor = {**request.qkv(), **trained(request)}[name]
        assert gradient.shape == tensor.shape and gradient.device == tensor.device, name
        assert gradient.dtype == tensor.dtype, name
        assert not wanted[name].isnan().any(), f"the float64 oracle itself gives NaN for d{name}"
        assert math.isfinite(errors[name]), f"PyTorch's d{name} overflows on this data; make it smaller"
        _assert_close(f"d{name}", gradient, wanted[name], errors[name])


def trained(request: Request) -> dict[str, Tensor]:
    """The tensors besides q, k and v that have a gradient, by name; one name each, also where names
    repeat."""
    slots = {slot for slot, _, _ in parameter_slots(request)}
    tensors = request.other_tensors
    return {
        f"{name} ({slot})": tensor
        for slot, (name, tensor) in enumerate(tensors)
        if slot in slots or name == "sink"
    }


def exact_gradients(request: Request, do: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """By float64 autograd through the specification."""
    promoted = with_leaves(request, torch.float64)
    out, lse = exact(promoted)
    return _gradients(promoted, out, lse, do.double(), dlse.double())


def pytorch_gradients(request: Request, do: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """By autograd through PyTorch's way in the request's dtype."""
    own = with_leaves(request, None)
    out, lse = pytorch(own, request.q.dtype)
    return _gradients(own, out, lse, do, dlse)


def with_leaves(request: Request, dtype: torch.dtype | None) -> Request:
    """The same request on copies of all that is trained, in this dtype (None: its own), for autograd."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()

    slots = {int(name.split("(")[-1][:-1]) for name in trained(request)}
    encoded = encode(request)
    tensors = [leaf(t) if slot in slots else t for slot, t in enumerate(encoded.tensors)]
    q, k, v = (leaf(x) for x in (request.q, request.k, request.v))
    copied = decode(q, k, v, encoded._replace(tensors=tensors))
    for part, original in zip(leaves_of(copied.plugs), leaves_of(request.plugs), strict=True):
        if hasattr(original, "_twin"):  # not part of the encoding
            part._twin = original._twin
    return replace(copied, impl=request.impl)


def _gradients(request: Request, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    leaves = {**request.qkv(), **trained(request)}
    got = torch.autograd.grad((out, lse), list(leaves.values()), (do, dlse), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), got, strict=True)
    }
