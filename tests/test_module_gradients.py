"""Gradients of the modules' parameters, of copies of them, and a step of training."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise
from harness.small_call import all_equal, assert_right
from tilewise.nn import CrossAttention, SelfAttention


class Plain(nn.Module):
    """SelfAttention or CrossAttention, built on PyTorch's attention from the same parameters."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.heads, self.kv_heads = ours.heads, ours.kv_heads
        self.q, self.k, self.v = self.linears(ours)
        self.out = copy.deepcopy(ours.out)

    @staticmethod
    def linears(ours) -> list[nn.Linear]:
        if isinstance(ours, SelfAttention):
            weights, biases = ours.qkv.weight.split(ours.widths), ours.qkv.bias.split(ours.widths)
        else:
            weights = (ours.q.weight, *ours.kv.weight.split(ours.widths))
            biases = (ours.q.bias, *ours.kv.bias.split(ours.widths))
        made = []
        for weight, bias in zip(weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight, linear.bias = (
                nn.Parameter(weight.detach().clone()),
                nn.Parameter(bias.detach().clone()),
            )
            made.append(linear)
        return made

    def forward(self, x, context):
        split = lambda y, heads: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (
            split(self.q(x), self.heads),
            split(self.k(context), self.kv_heads),
            split(self.v(context), self.kv_heads),
        )
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(
            k.shape[2] - q.shape[2]
        )
        out = F.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))

    def gradients(self, is_self: bool) -> dict[str, torch.Tensor]:
        """By the names that the module under test has for its parameters."""
        parts = (self.q, self.k, self.v) if is_self else (self.k, self.v)
        fused = "qkv" if is_self else "kv"
        found = {} if is_self else {"q.weight": self.q.weight.grad, "q.bias": self.q.bias.grad}
        found[f"{fused}.weight"] = torch.cat([part.weight.grad for part in parts])
        found[f"{fused}.bias"] = torch.cat([part.bias.grad for part in parts])
        return found | {"out.weight": self.out.weight.grad, "out.bias": self.out.bias.grad}


@pytest.mark.parametrize("cls", [SelfAttention, CrossAttention])
def test_gradient_of_every_parameter(cls, device):
    module = cls(12, heads=4, kv_heads=2, head_dim=8, out_projection=True, impl="portable", device=device)
    x = torch.randn(2, 6, 12, device=device)
    context = x if cls is SelfAttention else torch.randn(2, 9, 12, device=device)
    inputs = (x,) if cls is SelfAttention else (x, context)
    out = module(*inputs, mask=tilewise.Causal())
    do = torch.randn_like(out)
    out.backward(do)
    found = {"result": out.detach()} | {name: p.grad for name, p in module.named_parameters()}

    def plain(dtype):
        model = Plain(module).to(device, dtype)
        theirs = model(x.to(dtype), context.to(dtype))
        theirs.backward(do.to(dtype))
        return {"result": theirs.detach()} | model.gradients(cls is SelfAttention)

    assert_right(found, plain)
    assert all(p.grad.any() for p in module.parameters())


def every_option(device):
    return SelfAttention(
        12, 8, heads=4, kv_heads=2, out_projection=True, qk_norm="rms", sink=True, impl="portable",
        device=device,
        similarity=tilewise.Cosine(nn.Parameter(torch.rand(4, device=device) + 1)),
        scale=nn.Parameter(torch.tensor(3.0, device=device)),
    )  # fmt: skip


def copies(module, device):
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    other = every_option(device)
    other.load_state_dict(module.state_dict())
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(saved, weights_only=False),
        "state_dict": other,
    }


def test_copies_of_a_module_learn_as_the_module_does(device):
    """Also after a call, which must leave nothing in the module that cannot be copied."""
    module, x = every_option(device), torch.randn(2, 5, 12, device=device)
    module(x).sum().backward()
    module.zero_grad(set_to_none=True)
    made = copies(module, device)
    want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert all(gradient.any() for gradient in want)
    for how, copied in made.items():
        names = [name for name, _ in copied.named_parameters()]
        assert names == [name for name, _ in module.named_parameters()], how
        assert all_equal(torch.autograd.grad(copied(x).square().sum(), list(copied.parameters())), want), how
        assert all(a is not b for a, b in zip(copied.parameters(), module.parameters(), strict=True))


def test_weights_alone_load_as_weights_only(device):
    module, saved = every_option(device), io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert state.keys() == module.state_dict().keys() and all_equal(
        state.values(), module.state_dict().values()
    )


def test_train_and_eval_agree_without_dropout(device):
    module, x = every_option(device), torch.randn(2, 5, 12, device=device)
    assert module.training and torch.equal(module.train()(x), module.eval()(x))
    assert not module.core.training
    module.requires_grad_(False)
    assert not module(x).requires_grad


def test_a_step_of_an_optimizer_changes_every_parameter(device):
    module, x = every_option(device), torch.randn(2, 5, 12, device=device)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = module(x).square().sum()
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())
    assert module(x).square().sum() != loss
