"""Attention over several ranks against one device: out, lse and every gradient, whatever a call has."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise
from harness.features import build
from harness.gluon import needs_interpreter
from harness.gradients import assert_gradients_match, trained, with_leaves
from harness.oracle import assert_matches
from harness.problem import keeps_pairs
from harness.ranks import errors, run
from tilewise.distributed.share import SECOND_ORDER
from tilewise.plan.request import Request, request_of

Tensor = torch.Tensor
CPU = torch.device("cpu")
MESHES = (
    ((1,), "ring"), ((2,), "ring"), ((3,), "ring"), ((4,), "ring"), ((3,), "all_gather"),
    ((4,), "all_gather"), ((2,), "heads"), ((4,), "heads"),
    ((2, 2), ("ring", "heads")), ((2, 2), ("heads", "all_gather")),
)  # fmt: skip
HEADS = ((4, 4), (4, 2), (4, 1), (8, 2), (12, 4))  # with 12 and 4, four ranks cut a group in two
MASKS = (
    (), ("causal",), ("causal_top_left",), ("causal_from_a_position",), ("window",), ("prefix",),
    ("documents",), ("scattered_documents",), ("right_padding",), ("left_padding",), ("intervals",),
    ("bool_mask",), ("user_mask",), ("user_interval",), ("causal", "documents"),
    ("causal", "window", "right_padding"),
)  # fmt: skip
OTHERS = (
    (), ("sink",), ("dropout",), ("alibi",), ("relative_position", "sink"), ("bias",),
    ("softcap", "strided_bias"), ("user_score",), ("cosine_with_temperature",), ("tensor_scale", "sink"),
    ("other_scale",), ("bfloat16",), ("float16", "sink"),
)  # fmt: skip
# In the interpreter: own keys and those of others, each index that a kernel moves, each way of a mesh.
KERNELS = (
    ((2,), "ring", ("causal", "sink", "dropout")), ((3,), "ring", ("window", "relative_position")),
    ((2,), "ring", ("user_interval", "user_score")), ((4,), "all_gather", ("causal", "bfloat16")),
    ((2,), "heads", ("documents", "alibi")), ((2, 2), ("ring", "heads"), ("prefix", "bias", "sink")),
)  # fmt: skip


def problem(features: tuple[str, ...], impl: str, sizes: dict[str, Any]) -> tuple[Request, Tensor, Tensor]:
    """A call with these features, and gradients for its out and lse. What is trained beside q, k and v is
    fp32: the sum of several ranks' parts is then not rounded before it is one."""
    for seed in range(100):
        p = build(CPU, random.Random(f"{features} {seed}"), features, **sizes)
        if keeps_pairs(p):
            break
    request = request_of(*p.tensors(), **p.keywords(), impl=impl)
    wide = with_leaves(request, torch.float32)
    for name, x in wide.qkv().items():
        setattr(wide, name, x.detach().to(p.dtype))
    generator = torch.Generator().manual_seed(1)
    rows = request.q.shape[:3]
    do = torch.randn(*rows, request.v.shape[3], generator=generator).to(p.dtype)
    return wide, do, torch.randn(rows, generator=generator)


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


def share_of(
    mesh: Any, features: tuple[str, ...], method: Any, order: str, impl: str, sizes: dict[str, Any]
) -> tuple[Tensor, ...]:
    """out and lse of a rank, and its gradients."""
    from tilewise.distributed import context_parallel_attention, split

    request, do, dlse = problem(features, impl, sizes)
    others = list(trained(request).values())
    own = [split(x, mesh, order=order).requires_grad_() for x in request.qkv().values()]
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        out, lse = context_parallel_attention(
            *own, mesh=mesh, method=method, order=order, return_lse=True, **arguments_of(request)
        )
        arrived = split(do, mesh, order=order), split(dlse, mesh, dim=2, order=order)
        grads = torch.autograd.grad((out, lse), [*own, *others], arrived, materialize_grads=True)
    return out, lse, *grads


def whole(parts: tuple[Tensor, ...], order: str) -> Tensor:
    """What the ranks have of a sequence, in its order."""
    if order == "contiguous":
        return torch.cat(parts, 2)
    halves = [x.chunk(2, 2) for x in parts]
    return torch.cat([*[first for first, _ in halves], *[second for _, second in reversed(halves)]], 2)


def judge(shape: Any, method: Any, features: tuple[str, ...], order: str, impl: str, **sizes: Any) -> None:
    sizes = dict(batch=2, q_heads=4, kv_heads=2, q_len=24, kv_len=96) | sizes
    results = run(shape, share_of, features, method, order, impl, sizes)
    request, do, dlse = problem(features, impl, sizes)
    out, lse, q, k, v = (whole(parts, order) for parts in list(zip(*results, strict=True))[:5])
    others = [torch.stack(parts).sum(0) for parts in list(zip(*results, strict=True))[5:]]
    with torch.no_grad():
        assert_matches(out, lse, request)
    found = dict(zip(("q", "k", "v", *trained(request)), (q, k, v, *others), strict=True))
    assert_gradients_match(found, request, do, dlse)


@settings(max_examples=40)
@given(
    st.sampled_from(MESHES),
    st.sampled_from(HEADS),
    st.sampled_from(("zigzag", "contiguous")),
    st.sampled_from(MASKS),
    st.sampled_from(OTHERS),
)
def test_ranks_are_one_device(mesh, heads, order, mask, others):
    judge(*mesh, (*mask, *others), order, "torch", q_heads=heads[0], kv_heads=heads[1])


@needs_interpreter
@pytest.mark.parametrize(("shape", "method", "features"), KERNELS, ids=str)
def test_ranks_are_one_device_in_kernels(shape, method, features):
    judge(shape, method, features, "zigzag", "portable", kv_len=48)


@needs_interpreter
def test_huge_scores_are_joined_exactly():
    """lse alone keeps three digits of a sum of exponentials beside a maximum of 10⁴."""
    judge((2,), "ring", ("causal", "other_scale"), "zigzag", "portable", kv_len=32)


LENGTH = 32


def small(mesh: Any, **arguments: Any) -> tuple[list[Tensor], dict[str, Any]]:
    from tilewise.distributed import split

    generator = torch.Generator().manual_seed(0)
    own = [split(torch.randn(1, 2, LENGTH, 8, generator=generator), mesh).requires_grad_() for _ in "qkv"]
    return own, dict(mesh=mesh, mask=tilewise.Causal()) | arguments


def twice(mesh: Any, method: str) -> bool:
    from tilewise.distributed import context_parallel_attention

    own, arguments = small(mesh, method=method, dropout_p=0.25, dropout_seed=torch.tensor([3]))
    found = []
    for _ in range(2):
        out = context_parallel_attention(*own, **arguments)
        found.append([out, *torch.autograd.grad(out.sum(), own)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ("ring", "all_gather", "heads"))
def test_the_same_bits_each_time(method):
    assert run((2,), twice, method) == [True, True]


def dropped(mesh: Any, seed: Tensor | None) -> Tensor:
    from tilewise.distributed import context_parallel_attention

    torch.manual_seed(mesh.get_local_rank())  # ranks whose generators differ
    own, arguments = small(mesh, dropout_p=0.5, dropout_seed=seed)
    return context_parallel_attention(*own, **arguments)


def test_ranks_that_are_given_no_seed_take_the_first_ranks():
    torch.manual_seed(0)
    seed = torch.randint(-(1 << 62), 1 << 62, (1,))
    for own, said in zip(run((2,), dropped, None), run((2,), dropped, seed), strict=True):
        assert torch.equal(own, said)


def unseen(mesh: Any) -> list[bool]:
    from tilewise.distributed import context_parallel_attention, positions

    own, arguments = small(mesh, mask=tilewise.Padding(11))
    hidden = positions(LENGTH, mesh)[:, None] >= 11
    k, v = (x.detach().masked_fill(hidden, torch.nan).requires_grad_() for x in own[1:])
    out = context_parallel_attention(own[0], k, v, **arguments)
    out.sum().backward()
    return [bool(x.isfinite().all()) for x in (out, own[0].grad, k.grad, v.grad)]


def test_keys_that_nobody_sees_have_no_influence():
    assert run((2,), unseen) == [[True] * 4] * 2


def compiled(mesh: Any) -> bool:
    from tilewise.distributed import context_parallel_attention

    own, arguments = small(mesh)
    function = torch.compile(
        lambda *own: context_parallel_attention(*own, **arguments) * 2, backend="aot_eager"
    )
    grads = torch.autograd.grad(function(*own).sum(), own)
    wanted = torch.autograd.grad((context_parallel_attention(*own, **arguments) * 2).sum(), own)
    return all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_a_compiled_model_may_call_it():
    assert run((2,), compiled) == [True, True]


def second(mesh: Any, method: str) -> None:
    from tilewise.distributed import context_parallel_attention

    own, arguments = small(mesh, method=method)
    out = context_parallel_attention(*own, **arguments)
    torch.autograd.grad(out.sum(), own, create_graph=True)


@pytest.mark.parametrize("method", ("ring", "heads"))
def test_a_second_derivative_is_refused_before_anything_is_sent(method):
    assert [str(error) for error in errors((2,), second, method)] == [SECOND_ORDER] * 2


def refused(mesh: Any, kind: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    from tilewise.distributed import context_parallel_attention

    own, arguments = small(mesh)
    q = own[0].detach()
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    changed = {
        "dtensor": ([distribute_tensor(q, mesh, [Shard(2)])] * 3, {}),
        "nested": ([jagged] * 3, {}),
        "method": (own, dict(method="flash")),
        "two methods": (own, dict(method=("ring", "heads"))),
        "heads": ([x[:, :1] for x in own], dict(method="heads")),
        "dropout": ([x[:, :, :6] for x in own], dict(dropout_p=0.5)),
        "hopper": (own, dict(impl="hopper")),
        "bias": (own, dict(bias=torch.zeros(12, 12))),
        "name": (own, dict(is_causal=True)),
    }
    tensors, more = changed[kind]
    context_parallel_attention(*tensors, **arguments | more)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dtensor", "q is a DTensor.*give q.to_local()"),
        ("nested", "q is nested.*mask=tilewise.Documents"),
        ("method", "method='flash' must be one of ('ring', 'all_gather', 'heads')"),
        ("two methods", "method=('ring', 'heads') names 2, and mesh.* has 1 dimension(s)"),
        ("heads", "each of 2 ranks as many query heads, and q_heads=1: give method='ring'"),
        ("dropout", "kv_len=12 makes chunks of 3 keys: give a multiple of 16, or method='heads'"),
        ("hopper", "impl='hopper'"),
        ("bias", "bias.shape=(12, 12) must broadcast to (1, 2, 32, 32)"),
        ("name", "has no is_causal=: give mask=tilewise.Causal()"),
    ],
)
def test_what_is_refused_says_why(kind, said):
    for error in errors((2,), refused, kind):
        assert re.search(".*".join(map(re.escape, said.split(".*"))), str(error)), error
