"""One small call whose every tensor can be trained, as PyTorch's machinery of gradients meets it."""

from __future__ import annotations

import torch

import tilewise
from tilewise.plan.request import make_request
from tilewise.pytorch.encoding import encode
from tilewise_reference.yardstick import largest_difference

from .oracle import _assert_close

HEADS, Q_LEN, KV_LEN, DIM = 2, 5, 7, 8
NAMES = ("q", "k", "v", "bias", "sink", "scale")
ARGUMENTS = dict(mask=tilewise.Causal(), score=tilewise.Softcap(3.0))


def tensors(device, *trained: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """All that has a gradient, one key head for all query heads; those named require one. Nothing else is
    random about a call."""
    shapes = dict(
        q=(1, HEADS, Q_LEN, DIM), k=(1, 1, KV_LEN, DIM), v=(1, 1, KV_LEN, DIM), bias=(Q_LEN, KV_LEN),
        sink=(HEADS,), scale=(),
    )  # fmt: skip
    made = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    made["scale"] = made["scale"].abs() + 0.5
    return {name: x.requires_grad_(name in trained) for name, x in made.items()}


def attend(q, k, v, impl="portable", **given):
    return tilewise.attention(q, k, v, **(ARGUMENTS | given), impl=impl)


def attend_by_op(q, k, v, **given):
    request = make_request(q, k, v, **(ARGUMENTS | given), impl="portable")
    tensors, *words = encode(request)
    return torch.ops.tilewise.attention_forward(q, k, v, tensors, *words)[0]


PATHS = {"eager": attend, "op": attend_by_op}


def textbook(q, k, v, bias, sink, scale) -> torch.Tensor:
    """`attend`, differentiable as often as one likes, in any dtype."""
    s = 3 * torch.tanh(scale * q @ k.mT / 3) + bias
    shift = k.shape[2] - q.shape[2]
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(shift)
    s = s.masked_fill(~keep, -torch.inf)
    s = torch.cat([s, sink[:, None, None].expand(*s.shape[:3], 1)], dim=3)
    return torch.softmax(s, 3)[..., :-1] @ v


def assert_right(found: dict, compute) -> None:
    """The rule of `harness.oracle` for fp32: ten times the error of `compute(torch.float32)`."""
    exactly, theirs = compute(torch.float64), compute(torch.float32)
    assert found.keys() == exactly.keys()
    for name, got in found.items():
        _assert_close(name, got, exactly[name], largest_difference(theirs[name], exactly[name]))


def all_equal(some, others) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
