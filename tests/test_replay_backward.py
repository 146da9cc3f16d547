"""The backward as a step of its own: what decides it, whatever asks for it."""

import contextlib
from collections import defaultdict
from functools import partial
from unittest import mock

import pytest
import torch

from harness.around import AROUND
from harness.replays import (
    Watching,
    attend,
    drawn,
    elsewhere,
    long_way,
    no_long_way,
    qkv,
    repeating,
    replays,
    same,
    work_of,
)
from tilewise.plan import repeated
from tilewise.pytorch.encoding import encode
from tilewise.pytorch.replayed import backward_step, forward_step, known_backward


def other_layout(x):
    """The same numbers in another order of memory, or with holes."""
    if x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([x, x], -1)[..., 0]


def steps(device, *features):
    """Backwards of one call, each unlike the first in one thing, all twice: (key, what is done)."""
    request = drawn(device, *features, q_heads=4, kv_heads=2)
    encoded, forward = encode(request), repeated.Repeated()
    saved = [request.q, request.k, request.v, *encoded.tensors]
    trained = [x.dtype.is_floating_point for x in saved]
    out, lse, statistics = forward_step(encoded, True, *saved, for_backward=True)
    tensors = [*saved, out, statistics, torch.ones_like(out), torch.ones_like(lse)]
    encoded = encoded._replace(tensors=[])

    def step(needs, tensors):
        key = known_backward(forward, needs, tensors)
        return key, work_of(partial(backward_step, encoded, needs), tensors)

    needs = [tuple(trained)]
    needs += [tuple(i == j for j in range(len(saved))) for i in range(len(saved)) if trained[i]]
    for _ in range(2):
        for each in needs:
            yield step(each, [elsewhere(x, 0.5) for x in tensors])
        yield step(needs[0], tensors[:-1])
        yield step(needs[0], [*tensors[:-2], tensors[-2].half(), tensors[-1]])
        for i in range(len(tensors)):
            yield step(needs[0], [*tensors[:i], other_layout(tensors[i]), *tensors[i + 1 :]])
        for around in AROUND.values():
            with around():
                yield step(needs[0], tensors)


FEATURES_OF_STEPS = {
    "none": (),
    "tensors": ("bias", "sink", "alibi", "documents"),
    "numbers": ("tensor_scale", "cosine_with_temperature", "relative_position"),
    "packed": ("packed_apart", "bias_modifier"),
}


@pytest.mark.parametrize("features", FEATURES_OF_STEPS.values(), ids=FEATURES_OF_STEPS)
def test_backwards_of_one_key_do_the_same(features, device):
    found = defaultdict(list)
    with replays(device):
        for key, work in steps(device, *features):
            found[key].append(work)
    for work in found.values():
        assert len(work) >= 2 and all(each == work[0] for each in work)
    assert len({str(work[0]) for work in found.values()}) > 9


def test_saved_tensors_may_come_back_with_other_strides(device):
    """Hooks put what they like in the place of what was saved."""

    def transposed(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x

    with replays(device):
        for hook in (lambda x: x, lambda x: x, transposed, transposed):
            tensors = qkv(device, trained=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, hook):
                found = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
            expected = torch.autograd.grad(long_way(*tensors).square().sum(), tensors)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("of", ["out", "lse", "both", "expanded", "some"])
def test_gradients_of_any_result(device, of):
    def gradients(attend, q, k, v):
        out, lse = attend(q, k, v, return_lse=True)
        total = {"out": out.square().sum(), "lse": lse.square().sum(), "expanded": out.sum()}.get(
            of, out.square().sum() + lse.square().sum()
        )
        return torch.autograd.grad(total, (k,) if of == "some" else (q, k, v))

    with replays(device):
        for number in range(3):
            tensors = qkv(device, trained=True)
            with no_long_way() if number == 2 else contextlib.nullcontext():
                found = gradients(attend, *tensors)
            with mock.patch.object(repeated, "known", {}):
                same(found, gradients(long_way, *tensors))


def test_other_gradients_of_the_same_call(device):
    """Which are needed is no part of the forward: the same result may be asked for others."""
    q, k, v = qkv(device, trained=True)
    with replays(device):
        for _ in range(2):
            attend(q, k, v)
        total = attend(q, k, v).square().sum()
        for leaves in [(q, k, v), (k,), (q, v)] * 3:
            found = torch.autograd.grad(total, leaves, retain_graph=True)
            with repeating():
                same(found, torch.autograd.grad(long_way(q, k, v).square().sum(), leaves))


def test_gradients_that_are_differentiated_again_go_the_long_way(device):
    with replays(device):
        q, k, v = qkv(device, trained=True)
        for _ in range(3):
            (dq,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
            with repeating():
                (want,) = torch.autograd.grad(long_way(q, k, v).square().sum(), q, create_graph=True)
            same(torch.autograd.grad(dq.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)))


def test_a_backward_that_is_watched_goes_the_long_way(device):
    with replays(device):
        for _ in range(2):
            q, k, v = qkv(device, trained=True)
            attend(q, k, v).sum().backward()
        out = attend(q, k, v).sum()
        with pytest.raises(AssertionError, match="the long way"), no_long_way(), Watching():
            out.backward()
