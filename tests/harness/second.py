"""The rule for a match (`harness.oracle`), applied to second derivatives and forward mode.

One double backward has them all: of L = Σ <gradient, u> the gradient in x is `second`, and in what arrives at
out and lse it is the tangents of these along u. So with u drawn, one call of autograd on the kernels' own
graph is held against float64 autograd through the specification. The yardstick is PyTorch's math path, whose
derivatives round where autograd does.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.plan.request import Request, as_heads, request_of
from tilewise.pytorch.pieces import by_sequence
from tilewise.pytorch.plain import oracle_arguments
from tilewise_reference.yardstick import largest_difference, math_attention

from .gradients import trained, with_leaves
from .oracle import NEIGHBOURS, SAMPLES, _assert_close, as_of_request, call, exact, neighbour, whole

Tensor = torch.Tensor


def check_second(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Differentiate `tilewise.attention`'s gradients, along random directions, by all that is trained and by
    what arrives, and hold each against float64. Returns them by name: those of q, k, v and parameters, and
    the tangents of "out" and "lse". Raises AssertionError as `check_gradients` does."""
    arguments = {"impl": "portable"} | arguments
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    names = trained(request_of(q, k, v, **arguments))
    others = [tensor.requires_grad_() for tensor in names.values()]
    try:
        out, lse = call(q, k, v, **arguments)
        do, dlse = (torch.randn_like(x).requires_grad_() for x in (out, lse))
        u = [torch.randn_like(x) / 2 for x in (q, k, v, *others)]
        found = differentiated((out, lse), (do, dlse), (q, k, v, *others), u)
        found = dict(zip(("q", "k", "v", *names, "out", "lse"), found, strict=True))
        request = request_of(q, k, v, **arguments)
        do, dlse = as_of_request(do.detach(), dlse.detach(), arguments)
        if request.packing is not None:
            u = [*as_heads(*u[:3]), *u[3:]]
            found |= dict(zip("qkv", as_heads(*[found[name] for name in "qkv"]), strict=True))
            found["out"], found["lse"] = as_of_request(found["out"], found["lse"], arguments)
        assert_second_matches(found, request, do, dlse, u)
        return found
    finally:
        for tensor in others:
            tensor.requires_grad_(False)


def differentiated(results: Any, arrived: Any, leaves: Any, u: list[Tensor]) -> list[Tensor]:
    """Of Σ <gradient, u> the gradients in leaves and in what arrived."""
    first = torch.autograd.grad(results, leaves, arrived, create_graph=True, allow_unused=True)
    along = sum((x * y).sum() for x, y in zip(first, u, strict=True) if x is not None)
    wanted = (*leaves, *arrived)
    got = torch.autograd.grad(along, wanted, allow_unused=True)
    return [torch.zeros_like(x) if y is None else y for x, y in zip(wanted, got, strict=True)]


def assert_second_matches(
    found: dict[str, Tensor], request: Request, do: Tensor, dlse: Tensor, u: list[Tensor]
) -> None:
    wanted, errors = exact_second(request, do, dlse, u), dict.fromkeys(found, 0.0)
    problems = [(request, wanted)]
    elements = max(1, min(x.numel() for x in found.values()))
    generator = torch.Generator(device=request.q.device).manual_seed(3)
    for _ in range(min(NEIGHBOURS, -(-SAMPLES // elements) - 1)):
        near = neighbour(request, generator)
        problems.append((near, exact_second(near, do, dlse, u)))
    for problem, exactly in problems:
        for name, x in pytorch_second(problem, do, dlse, u).items():
            errors[name] = max(errors[name], largest_difference(x, exactly[name]))
    for name, x in found.items():
        assert x.shape == wanted[name].shape, name
        assert not wanted[name].isnan().any(), f"the float64 oracle itself gives NaN for second d{name}"
        assert math.isfinite(errors[name]), f"PyTorch's second d{name} overflows on this data"
        _assert_close(f"second d{name}", x, wanted[name], errors[name])


def exact_second(request: Request, do: Tensor, dlse: Tensor, u: list[Tensor]) -> dict[str, Tensor]:
    promoted = with_leaves(request, torch.float64)
    return _second(promoted, exact(promoted), do.double(), dlse.double(), [x.double() for x in u])


def pytorch_second(request: Request, do: Tensor, dlse: Tensor, u: list[Tensor]) -> dict[str, Tensor]:
    own = with_leaves(request, None)

    def answer(one: Request, batch: int = 0) -> tuple[Tensor, Tensor]:
        return math_attention(one.q, one.k, one.v, **oracle_arguments(one, whole(one, batch)))

    results = answer(own) if own.shape.is_dense else by_sequence(own, answer)
    return _second(own, results, do, dlse, u)


def _second(
    request: Request, results: tuple[Tensor, Tensor], do: Tensor, dlse: Tensor, u: list[Tensor]
) -> dict[str, Tensor]:
    leaves = {**request.qkv(), **trained(request)}
    arrived = do.detach().requires_grad_(), dlse.detach().requires_grad_()
    got = differentiated(results, arrived, tuple(leaves.values()), u)
    return dict(zip((*leaves, "out", "lse"), got, strict=True))
