"""Is a candidate's answer right? Held against float64 by the rule of `tilewise_reference.yardstick`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

import tilewise_reference
from tilewise_reference.yardstick import (
    allowed_error,
    difference,
    largest_difference,
    pytorch_attention,
)

from ...plan.request import Request
from ...pytorch.encoding import decode, encode
from ...pytorch.plain import oracle_arguments

Tensor = torch.Tensor


class Expected(NamedTuple):
    """By name, "out", "lse" and gradients "dq", "dk", ...: float64's answer and PyTorch's largest error."""

    wanted: dict[str, Tensor]
    errors: dict[str, float]


def expect(request: Request, do: Tensor) -> Expected:
    """What is expected of the forward of a request, and of the gradients of q, k, v and of the other tensors
    that require one, where do is out's."""
    exact = with_leaves(request, torch.float64)
    wanted = results(
        exact,
        *tilewise_reference.attention(exact.q, exact.k, exact.v, **oracle_arguments(exact), return_lse=True),
        do.double(),
    )
    own = with_leaves(request, None)
    found = results(own, *pytorch_attention(own.q, own.k, own.v, **oracle_arguments(own)), do)
    with torch.no_grad():  # lse is fp32 whatever the inputs are
        q, k, v = (x.float() for x in (request.q, request.k, request.v))
        found["lse"] = pytorch_attention(q, k, v, **oracle_arguments(request))[1]
    errors = {name: largest_difference(found[name], wanted[name]) for name in wanted}
    return Expected(wanted, errors)


def worst_share(name: str, got: Tensor, expected: Expected) -> float:
    """The largest error of a result, as a share of what is allowed to it: up to 1 it is right."""
    wanted, error = expected.wanted[name], expected.errors[name]
    return (difference(got, wanted) / allowed_error(wanted, got.dtype, error)).max().item()


def results(request: Request, out: Tensor, lse: Tensor, do: Tensor) -> dict[str, Tensor]:
    """out, lse and the gradients of the request's leaves."""
    leaves = gradient_tensors(request)
    grads = torch.autograd.grad(out, list(leaves.values()), do)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def gradient_tensors(request: Request) -> dict[str, Tensor]:
    """The tensors that get a gradient, by the gradient's name, in the order of `passes.run_backward`."""
    others = enumerate(request.other_tensors)
    trained = {f"d{name} ({slot})": x for slot, (name, x) in others if x.requires_grad}
    return {f"d{name}": x for name, x in request.qkv().items()} | trained


def with_leaves(request: Request, dtype: torch.dtype | None) -> Request:
    """The request on copies, in this dtype (None: its own), of q, k, v and what requires a gradient."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    encoded = encode(request)
    tensors = [leaf(x) if x.requires_grad else x for x in encoded.tensors]
    copied = decode(leaf(request.q), leaf(request.k), leaf(request.v), encoded._replace(tensors=tensors))
    return replace(copied, impl=request.impl)
