"""deterministic=: who may add to dQ as it comes, how that is said, and that it reaches the kernel."""

from typing import Any

import pytest
import torch

import tilewise
from tilewise.compat import flash_attn_func, flash_attn_varlen_func
from tilewise.plan import passes
from tilewise.plan.request import make_request
from tilewise.pytorch.encoding import decode, encode

pytestmark = pytest.mark.oldest


@pytest.fixture
def in_turns(monkeypatch):
    """Whether the programs of each backward took turns, in order. PyTorch's switch, which these tests are run
    under, is off."""
    found: list[bool] = []
    launch = passes.launch_dqkv

    def noted(*arguments: Any) -> None:
        found.append(arguments[-1])
        launch(*arguments)

    monkeypatch.setattr(passes, "launch_dqkv", noted)
    torch.use_deterministic_algorithms(False)
    with tilewise.tiles.use_walks(1):
        yield found


@pytest.fixture
def qkv(device):
    return [torch.randn(1, 2, 20, 16, device=device).requires_grad_() for _ in range(3)]


def rows(*heads: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in heads]


@pytest.mark.parametrize(
    "given, wanted", [({}, True), ({"deterministic": True}, True), ({"deterministic": False}, False)]
)
def test_attention(in_turns, qkv, given, wanted):
    tilewise.attention(*qkv, **given, impl="portable").sum().backward()
    tokens = [x[0].transpose(0, 1) for x in qkv]
    offsets = torch.tensor([0, 7, 20], device=qkv[0].device)
    tilewise.packed_attention(*tokens, q_offsets=offsets, **given, impl="portable").sum().backward()
    assert in_turns == [wanted, wanted]


def test_any_order_gives_the_same_gradients(in_turns, qkv):
    """In the interpreter programs run one after another, so that there is but one order."""
    found = []
    for deterministic in (True, False):
        out = tilewise.attention(*qkv, mask=tilewise.Causal(), deterministic=deterministic, impl="portable")
        found.append(torch.autograd.grad(out.square().sum(), qkv))
    assert in_turns == [True, False]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_pytorchs_switch_keeps_the_order(in_turns, qkv):
    torch.use_deterministic_algorithms(True, warn_only=True)
    tilewise.attention(*qkv, deterministic=False, impl="portable").sum().backward()
    assert in_turns == [True]


def test_pytorchs_call_leaves_it_to_pytorchs_switch(in_turns, qkv):
    def backward() -> None:
        with tilewise.sdpa():
            torch.nn.functional.scaled_dot_product_attention(*qkv).sum().backward()

    backward()
    torch.use_deterministic_algorithms(True, warn_only=True)
    backward()
    assert in_turns == [False, True]


def test_flash_attentions_own_argument(in_turns, qkv):
    offsets = torch.tensor([0, 20], dtype=torch.int32, device=qkv[0].device)
    tokens = [x[0] for x in rows(*qkv)]
    for given in ({}, {"deterministic": True}):
        flash_attn_func(*rows(*qkv), **given).sum().backward()
        flash_attn_varlen_func(*tokens, offsets, offsets, 20, 20, **given).sum().backward()
    assert in_turns == [False, False, True, True]


def test_a_module(in_turns, device):
    x = torch.randn(1, 9, 32, device=device)
    for deterministic in (True, False):
        module = tilewise.nn.SelfAttention(32, 2, deterministic=deterministic, impl="portable", device=device)
        module(x).sum().backward()
    assert in_turns == [True, False]


def test_two_walks_have_no_order_to_keep(in_turns, qkv):
    with tilewise.tiles.use_walks(2):
        tilewise.attention(*qkv, deterministic=False, impl="portable").sum().backward()
    assert in_turns == []


@pytest.mark.parametrize("deterministic", [True, False])
def test_words_say_it(qkv, deterministic):
    request = make_request(*qkv, mask=tilewise.Causal(), deterministic=deterministic)
    assert decode(*qkv, encode(request)).deterministic is deterministic


@pytest.mark.parametrize("wrong", [None, 1, 0, "yes"], ids=str)
def test_what_is_not_a_bool_is_refused(qkv, wrong):
    wanted = f"deterministic={wrong!r} must be True or False"
    with pytest.raises(ValueError, match=wanted):
        tilewise.attention(*qkv, deterministic=wrong)
    assert tilewise.why_not(*qkv, deterministic=wrong) == [wanted]
    with pytest.raises(ValueError, match=wanted):
        tilewise.nn.SelfAttention(32, 2, deterministic=wrong)


def test_a_cache_has_no_backward(qkv):
    with pytest.raises(TypeError, match="has no deterministic="):
        tilewise.cached_attention(*qkv, kv_lens=torch.tensor([3], device=qkv[0].device), deterministic=True)
