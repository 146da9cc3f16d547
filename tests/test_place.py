"""Calls on parts of a larger one, put together again: masks, scores and dropout are those of the whole."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import tilewise
from harness.features import build
from harness.gradients import assert_gradients_match, trained
from harness.oracle import assert_matches
from harness.problem import keeps_pairs
from tilewise.api import answer
from tilewise.parts.place import Place
from tilewise.parts.similarity import Cosine
from tilewise.plan.request import Request, request_of

Tensor = torch.Tensor
FEATURES = (
    ("causal_from_a_position", "dropout", "sink"), ("window", "alibi"), ("prefix", "relative_position"),
    ("scattered_documents", "bias"), ("left_padding", "cosine_with_temperature"),
    ("intervals", "blocks", "user_score"), ("bool_mask", "bias_modifier"), ("user_interval", "tensor_scale"),
    ("right_padding", "strided_bias", "softcap"), ("user_mask", "dropout"),
)  # fmt: skip
SIZES = dict(batch=2, q_heads=4, kv_heads=2, q_len=21, kv_len=36)
IMPLEMENTATIONS = ("portable", "torch")


def part(request: Request, batch: int, kv_head: int, rows: slice, keys: slice) -> Request:
    """The part with one sequence, one head of keys, and these rows and keys."""
    shape = request.shape
    heads = slice(kv_head * shape.group, (kv_head + 1) * shape.group)
    one = slice(batch, batch + 1)
    q = request.q[one, heads, rows]
    k, v = (x[one, kv_head : kv_head + 1, keys] for x in (request.k, request.v))
    sink, similarity = request.sink, request.similarity
    if sink is not None:  # it belongs to one of the parts of a row
        sink = sink[heads] if keys.start == 0 else torch.full_like(sink[heads], -torch.inf).detach()
    if isinstance(similarity, Cosine) and isinstance(similarity.temperature, Tensor):
        similarity = Cosine(similarity.temperature[heads])
    place = Place(*shape[:5], batch, heads.start, rows.start, keys.start)
    return replace(request, q=q, k=k, v=v, sink=sink, similarity=similarity, place=place)


def in_parts(request: Request) -> tuple[Tensor, Tensor]:
    """out and lse of the request, from sixteen parts."""
    n, m = request.shape.q_len, request.shape.kv_len
    sequences = []
    for batch in range(request.shape.batch):
        heads = []
        for head in range(request.shape.kv_heads):
            rows = []
            for each in (slice(0, n // 3), slice(n // 3, n)):
                left = answer(part(request, batch, head, each, slice(0, 16)), True)
                right = answer(part(request, batch, head, each, slice(16, m)), True)
                rows.append(tilewise.merge(*left, *right))
            heads.append([torch.cat(x, 2) for x in zip(*rows, strict=True)])
        sequences.append([torch.cat(x, 1) for x in zip(*heads, strict=True)])
    out, lse = (torch.cat(x, 0) for x in zip(*sequences, strict=True))
    return out, lse


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_parts_are_the_whole(features, impl, device):
    judge_parts(features, impl, device, 0)


def judge_parts(features: tuple[str, ...], impl: str, device: torch.device, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        p = build(device, random.Random(f"{features} {seed}"), features, **SIZES)
        if keeps_pairs(p):
            break
    request = request_of(*p.tensors(), **p.keywords(), impl=impl)
    leaves = {**request.qkv(), **trained(request)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with tilewise.tiles.use(p.tile):
        out, lse = in_parts(request)
        do, dlse = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (do, dlse), allow_unused=True)
    with torch.no_grad():
        assert_matches(out, lse, request)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    assert_gradients_match(found, request, do, dlse)


def test_a_part_that_leaves_the_whole_is_refused():
    q = k = v = torch.zeros(1, 2, 12, 8)
    request = request_of(q, k, v, mask=tilewise.Causal())
    place = Place(*request.shape[:5], first_row=1)
    with pytest.raises(
        ValueError, match=r"the part's queries 1 to \d+ must lie in the whole call's 0 to \d+"
    ):
        answer(replace(request, place=place), True)


def test_a_part_cuts_keys_where_dropout_does():
    q = k = v = torch.zeros(1, 2, 12, 8)
    request = request_of(q, k[:, :, 6:], v[:, :, 6:], dropout_p=0.5)
    place = Place(*request.shape[:4], k.shape[2], first_key=6)
    with pytest.raises(ValueError, match="begins at key 6: cut the sequence at multiples of 4"):
        answer(replace(request, place=place), True)
