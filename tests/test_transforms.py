"""Second order, forward mode, vmap and what torch.func makes of them; what is not there raises.

That all features have second derivatives: tests/test_second.py.
"""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

import tilewise
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
from tilewise.kernels.launch import told
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
@pytest.mark.parametrize("path", PATHS)
def test_second_order(path, device):
    """Through out, of all that has a gradient by all that has one."""
    values = tensors(device)
    assert_right(second(PATHS[path], values), lambda dtype: second(textbook, values, dtype))


def second(run, values, dtype=torch.float32):
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in values.items()}
    first = torch.autograd.grad(run(**leaves).square().sum(), list(leaves.values()), create_graph=True)
    again = torch.autograd.grad(sum(x.square().sum() for x in first), list(leaves.values()))
    return dict(zip(leaves, again, strict=True))


@pytest.mark.parametrize("name", ["q", "bias", "scale"])
def test_second_order_of_one_tensor(name, device):
    """Others have neither a gradient nor a tangent."""
    values = tensors(device)
    alone = {name: values[name]}
    rest = {other: x for other, x in values.items() if other != name}

    def along(run, dtype=torch.float32):
        fixed = {other: x.to(dtype) for other, x in rest.items()}
        return second(lambda **given: run(**fixed, **given), alone, dtype)

    assert_right(along(attend), lambda dtype: along(textbook, dtype))


def test_third_order_raises(device):
    given = tensors(device, "q", "k")
    leaves = [given["q"], given["k"]]
    first = torch.autograd.grad(attend(**given).square().sum(), leaves, create_graph=True)
    again = torch.autograd.grad(sum(x.square().sum() for x in first), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"third.*impl='torch'"):
        torch.autograd.grad(sum(x.sum() for x in again), leaves)


@triton.jit
def squared_score(s, batch, head, q_idx, kv_idx, args):
    weight = tl.load(args[0] + head)
    return s + weight * weight * s * s


@triton.jit
def squared_by_s(s, batch, head, q_idx, kv_idx, args):
    weight = tl.load(args[0] + head)
    return 1.0 + 2.0 * weight * weight * s


@triton.jit
def squared_by_weight(s, batch, head, q_idx, kv_idx, args):
    return 2.0 * tl.load(args[0] + head) * s * s


@triton.jit
def squared_by_s_twice(s, batch, head, q_idx, kv_idx, args):
    weight = tl.load(args[0] + head)
    return s * 0.0 + 2.0 * weight * weight


@triton.jit
def squared_by_both(s, batch, head, q_idx, kv_idx, args):
    return 4.0 * tl.load(args[0] + head) * s


@triton.jit
def squared_by_weight_twice(s, batch, head, q_idx, kv_idx, args):
    return 2.0 * s * s


def squared(weight, **declared) -> tilewise.UserScore:
    """s + (weight of the head · s)²."""
    parameters = {0: ("h", squared_by_weight)}
    return tilewise.UserScore(
        squared_score, (weight,), derivative=squared_by_s, parameters=parameters, **declared
    )


def test_second_derivatives_of_a_users_score(device):
    """Of its input and a parameter, by each and by both."""
    values = {name: x for name, x in tensors(device).items() if name in ("q", "k", "v")}
    values["weight"] = torch.rand(HEADS, device=device)
    seconds = {("s", "s"): squared_by_s_twice, (0, "s"): squared_by_both, (0, 0): squared_by_weight_twice}

    def kernels(q, k, v, weight):
        score = squared(weight, second_derivatives=seconds)
        return tilewise.attention(q, k, v, score=score, impl="portable")

    def by_hand(q, k, v, weight):
        s = q @ k.mT / DIM**0.5
        return torch.softmax(s + (weight[:, None, None] * s).square(), 3) @ v

    assert_right(second(kernels, values), lambda dtype: second(by_hand, values, dtype))


def test_a_users_score_without_second_derivatives_says_so(device):
    given = tensors(device, "q")
    out = tilewise.attention(
        given["q"], given["k"], given["v"], score=squared(given["sink"]), impl="portable"
    )
    (dq,) = torch.autograd.grad(out.sum(), given["q"], create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"squared_score.*no second derivatives.*second_derivatives="
    ):
        torch.autograd.grad(dq.sum(), given["q"])


@pytest.mark.parametrize("key", ["s", ("s", 1), (0, 0, 0), ("q", "s")])
def test_second_derivatives_by_what_is_none_are_refused(key, device):
    with pytest.raises(ValueError, match=r"second_derivatives has the key .* pair of these: 's', 0"):
        squared(tensors(device)["sink"], second_derivatives={key: squared_by_both})


def test_plain_pytorch_path_has_second_order(device):
    values = tensors(device)
    found = second(lambda **given: attend(**given, impl="torch"), values)
    assert_right(found, lambda dtype: second(textbook, values, dtype))


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


# What differentiates a function of all tensors, given as a dictionary, along tangents or by itself.


def pushed(run, values, tangents):
    names = list(values)
    as_function = lambda *given: run(**dict(zip(names, given, strict=True)))  # noqa: E731
    return torch.func.jvp(as_function, tuple(values.values()), tuple(tangents.values()))[1]


def dual(run, values, tangents):
    with forward_ad.dual_level():
        made = {name: forward_ad.make_dual(x, tangents[name]) for name, x in values.items()}
        return forward_ad.unpack_dual(run(**made)).tangent


def gradients_of(run):
    return lambda **values: torch.func.grad(lambda values: run(**values).square().sum())(values)


def pushed_gradient(run, values, tangents):
    return pushed(gradients_of(run), values, tangents)


def gradient_of_pushed(run, values, tangents):
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    moves = {f"along {name}": x.clone().requires_grad_() for name, x in tangents.items()}
    tangent = pushed(run, leaves, dict(zip(leaves, moves.values(), strict=True)))
    wanted = leaves | moves
    return dict(zip(wanted, torch.autograd.grad(tangent.square().sum(), list(wanted.values())), strict=True))


def gradient_of_gradient(run, values, tangents):
    total = lambda values: sum(x.square().sum() for x in gradients_of(run)(**values).values())  # noqa: E731
    return torch.func.grad(total)(values)


def linearized(run, values, tangents):
    names = list(values)
    as_function = lambda *given: run(**dict(zip(names, given, strict=True)))  # noqa: E731
    return torch.func.linearize(as_function, *values.values())[1](*tangents.values())


def hessian_of_sink(run, values, tangents):
    return torch.func.hessian(lambda sink: run(**(values | {"sink": sink})).square().sum())(values["sink"])


def jacobian_of_q(run, values, tangents):
    return torch.func.jacrev(lambda q: run(**(values | {"q": q}))[..., :2, :1])(values["q"])


def jacobian_of_scale(run, values, tangents):
    return torch.func.jacfwd(lambda scale: run(**(values | {"scale": scale})))(values["scale"])


WAYS = (
    pushed, dual, pushed_gradient, gradient_of_pushed, gradient_of_gradient, linearized, hessian_of_sink,
    jacobian_of_q, jacobian_of_scale,
)  # fmt: skip


@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # linearize's, of its constants
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_derivatives_of_every_kind(way, device):
    values = tensors(device)
    tangents = {name: torch.randn_like(x) for name, x in values.items()}

    def derive(run, dtype=torch.float32):
        found = way(run, *({name: x.to(dtype) for name, x in each.items()} for each in (values, tangents)))
        return found if isinstance(found, dict) else {"derivative": found}

    assert_right(derive(attend), lambda dtype: derive(textbook, dtype))


def test_a_tangent_of_a_parameter_alone(device):
    values = tensors(device)
    along = {"bias": torch.randn_like(values["bias"])}

    def derive(run, dtype=torch.float32):
        fixed = {name: x.to(dtype) for name, x in values.items() if name != "bias"}
        given = ({"bias": each["bias"].to(dtype)} for each in (values, along))
        return {"tangent": dual(lambda bias: run(**fixed, bias=bias), *given)}

    assert_right(derive(attend), lambda dtype: derive(textbook, dtype))


def test_a_tangent_of_a_cached_call_raises(device):
    q, k = torch.randn(1, 2, 3, DIM, device=device), torch.randn(1, 2, 8, DIM, device=device)
    lens = torch.tensor([5], device=device)
    attend = lambda q: tilewise.cached_attention(q, k, k, kv_lens=lens, impl="portable")  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"cached_attention has no derivatives.*packed_attention"):
        torch.func.jvp(attend, (q,), (q,))


def test_a_tangent_of_a_tangent_raises(device):
    given = tensors(device)
    along = lambda q: torch.func.jvp(  # noqa: E731
        lambda q: attend(**(given | {"q": q})), (q,), (torch.ones_like(q),)
    )[1]
    with pytest.raises(NotImplementedError, match=r"forward-mode derivative of a forward-mode.*hessian"):
        torch.func.jvp(along, (given["q"],), (torch.ones_like(given["q"]),))


def test_plain_pytorch_path_has_forward_mode(device):
    values = tensors(device)
    tangents = {name: torch.randn_like(x) for name, x in values.items()}

    def derive(run, dtype=torch.float32):
        return {
            "": pushed(run, *({name: x.to(dtype) for name, x in each.items()} for each in (values, tangents)))
        }

    assert_right(derive(lambda **given: attend(**given, impl="torch")), lambda dtype: derive(textbook, dtype))


# ---- vmap


CALLS = 3


def mapped_call(name):
    """A call for each of several tensors, and its gradient, the others being the same for all."""

    def mapped(run, values, many):
        of_one = lambda x: run(**(values | {name: x}))  # noqa: E731
        gradient = torch.func.grad(lambda x: of_one(x).square().sum())
        return {"out": torch.vmap(of_one)(many[name]), "gradient": torch.vmap(gradient)(many[name])}

    return mapped


def gradients_of_each(run, values, many):
    """Per-sample gradients: q and v are samples, mapped along other dimensions, all else is shared."""
    shared = {name: x for name, x in values.items() if name not in ("q", "v")}
    loss = lambda shared, q, v: run(q=q, v=v, **shared).square().sum()  # noqa: E731
    of_each = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0, 2))
    gradients, dq = of_each(shared, many["q"], many["v"].movedim(0, 2))
    return gradients | {"q": dq}


def mapped_twice(run, values, many):
    of_one = lambda q, k: run(**(values | {"q": q, "k": k}))  # noqa: E731
    return {"out": torch.vmap(torch.vmap(of_one, in_dims=(0, None)), in_dims=(None, 0))(many["q"], many["k"])}


MAPPED = {
    "q": mapped_call("q"), "bias": mapped_call("bias"), "gradients of each": gradients_of_each,
    "twice": mapped_twice,
}  # fmt: skip


@pytest.mark.oldest
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name, device):
    values = tensors(device)
    many = {name: torch.randn(CALLS, *x.shape, device=device) for name, x in values.items()}

    def derive(run, dtype=torch.float32):
        return MAPPED[name](
            run, *({name: x.to(dtype) for name, x in each.items()} for each in (values, many))
        )

    assert_right(derive(attend), lambda dtype: derive(textbook, dtype))


class Heard:
    """Which kernels were launched."""

    def __init__(self):
        self.obstacle, self.kernels = None, []

    def launched(self, launch):
        self.kernels.append(launch.kernel.fn.__name__)

    def unheard(self):
        return contextlib.nullcontext()


def test_calls_that_are_mapped_are_one(device):
    """Folded into batch: one launch of the forward; masks and dropout are those of each call."""
    lengths, seed = torch.tensor([5, 3], device=device), torch.tensor([7], device=device)
    q, k, v = (torch.randn(CALLS, 2, HEADS, 6, DIM, device=device) for _ in range(3))
    attend = lambda q, k, v: tilewise.attention(  # noqa: E731
        q, k, v, mask=tilewise.Padding(lengths), dropout_p=0.5, dropout_seed=seed, impl="portable"
    )
    want = torch.stack([attend(*each) for each in zip(q, k, v, strict=True)])
    heard = Heard()
    with told(heard):
        got = torch.vmap(attend)(q, k, v)
    assert torch.equal(got, want) and heard.kernels == ["forward_kernel"]


def test_packed_sequences_are_mapped_one_by_one(device):
    offsets = torch.tensor([0, 4, 9], device=device)
    k, v = (torch.randn(9, HEADS, DIM, device=device) for _ in range(2))
    many = torch.randn(2, 9, HEADS, DIM, device=device)
    attend = lambda q: tilewise.packed_attention(q, k, v, q_offsets=offsets, impl="portable")  # noqa: E731
    assert torch.equal(torch.vmap(attend)(many), torch.stack([attend(q) for q in many]))
