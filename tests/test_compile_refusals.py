"""What torch.compile meets in place of a result: wrong arguments, and what attention has no rule for."""

import pytest
import torch

import tilewise


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def qkv(device):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (5, 7, 7))
    return [x.requires_grad_() for x in (q, k, v)]


WRONG = [
    ("q_heads=3 must be", lambda q, k, v: tilewise.attention(q[:, [0] * 3], k, v)),
    ("bias.shape=(4,) must broadcast", lambda q, k, v: tilewise.attention(q, k, v, bias=q[0, 0, 0, :4])),
    ("left=-1 must be", lambda q, k, v: tilewise.attention(q, k, v, mask=tilewise.Window(-1, 0))),
    ("dropout_p=1.5 must be", lambda q, k, v: tilewise.attention(q, k, v, dropout_p=1.5)),
    ("impl='fast' must be", lambda q, k, v: tilewise.attention(q, k, v, impl="fast")),
]  # fmt: skip


@pytest.mark.parametrize("words, call", WRONG, ids=[words for words, _ in WRONG])
def test_wrong_arguments_are_named(words, call, qkv):
    with pytest.raises(ValueError) as raised:
        torch.compile(call, backend="aot_eager")(*qkv)
    assert words in str(raised.value)
    # With fullgraph=True PyTorch wraps what it meets in an error of its own, which quotes it.
    with pytest.raises(Exception) as raised:
        torch.compile(call, backend="aot_eager", fullgraph=True)(*qkv)
    assert words in str(raised.value)


@pytest.mark.oldest
def test_second_order_raises(qkv):
    """PyTorch's own error, ours inside another differentiated graph: never a gradient that lacks a part."""
    q, k, v = qkv
    compiled = torch.compile(
        lambda q, k, v: tilewise.attention(q, k, v, impl="portable"), fullgraph=True, backend="aot_eager"
    )
    (dq,) = torch.autograd.grad(compiled(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second-order|double backward"):
        torch.autograd.grad(dq.square().sum(), (q, k, v), allow_unused=True)


TRANSFORMS = {
    "jvp": lambda loss, q: torch.func.jvp(loss, (q,), (q,)),
    "jacfwd": lambda loss, q: torch.func.jacfwd(loss)(q),
    "vmap": lambda loss, q: torch.vmap(loss)(q[None]),
}


@pytest.mark.oldest
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_raise(name, qkv):
    """Instead of going on without a derivative."""
    q, k, v = (x.detach() for x in qkv)
    loss = lambda q: tilewise.attention(q, k, v, impl="portable").square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=r"inside torch.compile|vmap|[Bb]atching rule"):
        torch.compile(lambda q: TRANSFORMS[name](loss, q), backend="aot_eager")(q)
