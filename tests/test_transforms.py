"""Higher orders, forward mode, torch.func: what attention has no rule for it refuses; impl="torch" has it."""

import pytest
import torch
from torch.autograd import forward_ad

from harness.small_call import (
    DIM,
    HEADS,
    NAMES,
    PATHS,
    Q_LEN,
    all_equal,
    assert_right,
    attend,
    tensors,
    textbook,
)
from tilewise.nn import SelfAttention

# ---- Second order


@pytest.mark.parametrize("path", PATHS)
def test_create_graph_gives_first_order_gradients(path, device):
    given = tensors(device, *NAMES)
    leaves, do = list(given.values()), torch.randn(1, HEADS, Q_LEN, DIM, device=device)
    want = torch.autograd.grad(PATHS[path](**given), leaves, do)
    got = torch.autograd.grad(PATHS[path](**given), leaves, do, create_graph=True)
    assert all_equal(got, want)
    assert all_equal([(x.detach() + 1) for x in got], [x + 1 for x in want])
    PATHS[path](**given).backward(do, create_graph=True)
    assert all_equal([x.grad for x in leaves], want)
    for x in leaves:
        x.grad = None  # PyTorch warns of a cycle otherwise


@pytest.mark.oldest
@pytest.mark.parametrize("trained", [(name,) for name in NAMES] + [NAMES], ids="-".join)
@pytest.mark.parametrize("path", PATHS)
def test_second_order_raises(path, trained, device):
    """Whatever requires a gradient, and though the loss has another way to it that PyTorch knows."""
    given = tensors(device, *trained)
    leaves = [given[name] for name in trained]
    loss = PATHS[path](**given).square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    again = sum((gradient * x).sum() for gradient, x in zip(first, leaves, strict=True))
    again = again + sum(x.square().sum() for x in leaves)
    with pytest.raises(NotImplementedError, match=r"no second-order gradients.*impl='torch'"):
        torch.autograd.grad(again, leaves, allow_unused=True)


@pytest.mark.oldest
@pytest.mark.parametrize("path", PATHS)
def test_second_order_in_the_gradient_of_out_raises(path, device):
    """The double-backward way to a forward-mode product differentiates dq by do alone."""
    given = tensors(device, "q")
    do = torch.randn(1, HEADS, Q_LEN, DIM, device=device, requires_grad=True)
    (dq,) = torch.autograd.grad(PATHS[path](**given), given["q"], do, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        torch.autograd.grad((dq.sum() + do.sum()), do, allow_unused=True)


def test_second_order_of_lse_raises(device):
    given = tensors(device, "q", "k")
    _, lse = attend(**given, return_lse=True)
    dq, dk = torch.autograd.grad(lse.sum(), (given["q"], given["k"]), create_graph=True)
    for first in (dq, dk):
        with pytest.raises(NotImplementedError, match="second-order"):
            torch.autograd.grad(first.sum(), (given["q"], given["k"]), allow_unused=True, retain_graph=True)


def test_plain_pytorch_path_has_second_order(device):
    values = tensors(device)

    def second(run, dtype=torch.float32):
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in values.items()}
        first = torch.autograd.grad(run(**leaves).square().sum(), list(leaves.values()), create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in first), list(leaves.values()))
        return dict(zip(leaves, again, strict=True))

    assert_right(second(lambda **given: attend(**given, impl="torch")), lambda dtype: second(textbook, dtype))


# ---- torch.func and forward mode


def test_func_grad_is_autograd_grad(device):
    given = tensors(device, *NAMES)
    leaves = list(given.values())
    loss = lambda given: attend(**given).square().sum()  # noqa: E731
    want = torch.autograd.grad(loss(given), leaves)
    plain = {name: x.detach() for name, x in given.items()}
    assert all_equal(torch.func.grad(loss)(plain).values(), want)
    gradients, value = torch.func.grad_and_value(loss)(plain)
    assert all_equal(gradients.values(), want) and torch.equal(value, loss(plain))
    value, pull_back = torch.func.vjp(lambda given: attend(**given), plain)
    assert torch.equal(value, attend(**plain))
    do = torch.randn_like(value)
    assert all_equal(pull_back(do)[0].values(), torch.autograd.grad(attend(**given), leaves, do))


@pytest.mark.oldest
def test_func_grad_of_one_argument_of_several(device):
    given = tensors(device, "bias")
    (want,) = torch.autograd.grad(attend(**given).sum(), given["bias"])
    plain = {name: x.detach() for name, x in given.items()}
    rest = {name: x for name, x in plain.items() if name != "bias"}
    assert torch.equal(torch.func.grad(lambda bias: attend(**rest, bias=bias).sum())(plain["bias"]), want)


@pytest.mark.oldest
def test_func_grad_of_a_module(device):
    module = SelfAttention(DIM, heads=HEADS, sink=True, impl="portable", device=device)
    x = torch.randn(3, DIM, device=device)
    want = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).sum())(parameters)
    assert all_equal(got.values(), want)


@pytest.mark.oldest
def test_func_grad_twice_raises(device):
    given = tensors(device)
    loss = lambda q: attend(**(given | {"q": q})).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="second-order"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(given["q"])


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name, device):
    given = tensors(device)
    tangent = torch.ones_like(given[name])
    with pytest.raises(NotImplementedError, match=r"forward-mode.*reverse mode.*impl='torch'"):
        torch.func.jvp(lambda x: attend(**(given | {name: x})), (given[name],), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], tangent)
        with pytest.raises(NotImplementedError, match=r"forward-mode.*reverse mode.*impl='torch'"):
            attend(**(given | {name: dual}))
        attend(**given)  # no tangent here


@pytest.mark.oldest
@pytest.mark.parametrize("trained", [NAMES, ()], ids=["trained", "not trained"])
@pytest.mark.parametrize("path", PATHS)
def test_forward_mode_raises_on_every_path(path, trained, device):
    """An op's autograd formula says nothing of tangents: PyTorch goes on without them."""
    given = tensors(device, *trained)
    with forward_ad.dual_level():
        dual = given | {"q": forward_ad.make_dual(given["q"], torch.ones_like(given["q"]))}
        with pytest.raises(NotImplementedError, match=r"forward|jvp"):
            PATHS[path](**dual)


def test_plain_pytorch_path_has_forward_mode(device):
    values = tensors(device)
    tangents = {name: torch.randn_like(x) for name, x in values.items()}

    def pushed(run, dtype=torch.float32):
        primals, moved = (tuple(x.to(dtype) for x in each.values()) for each in (values, tangents))
        out, tangent = torch.func.jvp(
            lambda *given: run(**dict(zip(NAMES, given, strict=True))), primals, moved
        )
        return {"out": out, "tangent": tangent}

    assert_right(pushed(lambda **given: attend(**given, impl="torch")), lambda dtype: pushed(textbook, dtype))


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["q", "k", "bias"])
def test_vmap_raises(name, device):
    given = tensors(device)
    many = torch.stack([given[name]] * 2)
    for run in (
        lambda: torch.vmap(lambda x: attend(**(given | {name: x})))(many),
        lambda: torch.vmap(torch.func.grad(lambda x: attend(**(given | {name: x})).sum()))(many),
    ):
        with pytest.raises(NotImplementedError, match=r"vmap.*batch"):
            run()


def test_jacobians_raise(device):
    """jacrev maps the backward over unit vectors, jacfwd the forward."""
    given = tensors(device)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"vmap|[Bb]atching rule|forward-mode"):
            jacobian(lambda q: attend(**(given | {"q": q})))(given["q"])
