"""Attention over several ranks against one device: out, lse and every gradient, whatever a call has."""

from __future__ import annotations

import random
from typing import Any

import torch

import tilewise
from harness.features import build
from harness.gradients import assert_gradients_match, trained, with_leaves
from harness.oracle import assert_matches
from harness.problem import keeps_pairs
from harness.ranks import run
from tilewise.plan.request import Request, request_of

Tensor = torch.Tensor
CPU = torch.device("cpu")
SIZES = dict(batch=2, q_heads=4, kv_heads=2, q_len=24, kv_len=48)


def problem(features: tuple[str, ...], impl: str, **sizes: Any) -> tuple[Request, Tensor, Tensor]:
    """A call with these features, what is trained in it in fp32, and gradients for its results."""
    for seed in range(100):
        p = build(CPU, random.Random(f"{features} {seed}"), features, **SIZES | sizes)
        if keeps_pairs(p):
            break
    request = request_of(*p.tensors(), **p.keywords(), impl=impl)
    request = (
        with_leaves(request, torch.promote_types(p.dtype, torch.float32))
        if p.dtype == torch.float32
        else request
    )
    generator = torch.Generator().manual_seed(1)
    rows = request.q.shape[:3]
    do = torch.randn(*rows, request.v.shape[3], generator=generator).to(p.dtype)
    return request, do, torch.randn(rows, generator=generator)


def arguments_of(request: Request) -> dict[str, Any]:
    mask = None
    for each in request.masks:
        mask = each if mask is None else mask & each
    dropout = {}
    if request.dropout is not None:
        dropout = dict(dropout_p=request.dropout.p, dropout_seed=request.dropout.seed)
    return dict(
        mask=mask, score=request.scores, scale=request.scale, similarity=request.similarity,
        sink=request.sink, impl=request.impl, **dropout,
    )  # fmt: skip


def on_a_rank(
    mesh: Any, features: tuple[str, ...], method: Any, order: str, impl: str, sizes: dict[str, Any]
) -> tuple[Tensor, ...]:
    from tilewise.distributed import context_parallel_attention, split

    request, do, dlse = problem(features, impl, **sizes)
    others = list(trained(request).values())
    own = [split(x.detach(), mesh, order=order).requires_grad_() for x in request.qkv().values()]
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        out, lse = context_parallel_attention(
            *own, mesh=mesh, method=method, order=order, return_lse=True, **arguments_of(request)
        )
        arrived = split(do, mesh, order=order), split(dlse, mesh, dim=2, order=order)
        grads = torch.autograd.grad((out, lse), [*own, *others], arrived, materialize_grads=True)
    return out, lse, *grads


def whole(parts: list[Tensor], order: str, mesh: tuple[int, ...]) -> Tensor:
    from tilewise.distributed.order import order_of

    found = order_of(parts[0].shape[2] * len(parts), len(parts), order)
    chunks = [(chunk, rank) for rank, held in enumerate(found.held) for chunk in held]
    return torch.cat([parts[rank][:, :, found.part(rank, chunk)] for chunk, rank in sorted(chunks)], 2)


def check(
    shape: tuple[int, ...], features: tuple[str, ...], method: Any, order: str, impl: str, **sizes: Any
) -> None:
    results = run(shape, on_a_rank, features, method, order, impl, sizes)
    request, do, dlse = problem(features, impl, **sizes)
    out, lse, q, k, v = (whole(list(parts), order, shape) for parts in list(zip(*results, strict=True))[:5])
    others = [sum(parts) for parts in list(zip(*results, strict=True))[5:]]
    with torch.no_grad():
        assert_matches(out, lse, request)
    found = dict(zip(("q", "k", "v", *trained(request)), (q, k, v, *others), strict=True))
    assert_gradients_match(found, request, do, dlse)
