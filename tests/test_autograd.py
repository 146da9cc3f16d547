"""attention among PyTorch's gradients: modes, hooks, transforms, modules; what it does not do, it refuses."""

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import tilewise
from harness.oracle import _assert_close
from tilewise.nn import CrossAttention, SelfAttention
from tilewise.plan.request import make_request
from tilewise.pytorch.encoding import encode
from tilewise_reference.yardstick import largest_difference

HEADS, Q_LEN, KV_LEN, DIM = 2, 5, 7, 8
NAMES = ("q", "k", "v", "bias", "sink", "scale")
ARGUMENTS = dict(mask=tilewise.Causal(), score=tilewise.Softcap(3.0))


@triton.jit
def scaled_score(s, batch, head, q_idx, kv_idx, args):
    return s * args[0]


def tensors(device, *trained: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """All that has a gradient; those named require one. Nothing else is random about a call."""
    shapes = dict(
        q=(1, HEADS, Q_LEN, DIM), k=(1, HEADS, KV_LEN, DIM), v=(1, HEADS, KV_LEN, DIM), bias=(Q_LEN, KV_LEN),
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


# ---- Which inputs get a gradient


@pytest.mark.parametrize("path", PATHS)
def test_every_subset_of_inputs_that_require_a_gradient(path, device):
    values = tensors(device, *NAMES)
    do = torch.randn(1, HEADS, Q_LEN, DIM, device=device)
    wanted = dict(zip(NAMES, torch.autograd.grad(attend(**values), list(values.values()), do), strict=True))
    subsets = [set(some) for n in (1, 2, 5) for some in itertools.combinations(NAMES, n)]
    for subset in subsets if path == "eager" else subsets[::4]:
        given = {name: x.detach().clone().requires_grad_(name in subset) for name, x in values.items()}
        out = PATHS[path](**given)
        assert out.requires_grad
        out.backward(do)
        for name, x in given.items():
            assert (x.grad is None) == (name not in subset), name
            assert x.grad is None or torch.equal(x.grad, wanted[name]), name


def test_nothing_requires_a_gradient(device):
    assert attend(**tensors(device)).grad_fn is None


@pytest.mark.oldest
@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode, impl, device):
    given = tensors(device, *NAMES)
    want = attend(**given, impl=impl)
    with mode():
        out, lse = attend(**given, impl=impl, return_lse=True)
    assert not out.requires_grad and out.grad_fn is None and not lse.requires_grad
    assert out.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(out, want)


def test_inference_mode_needs_no_gradient_whatever_grad_mode_says(device):
    given = tensors(device, *NAMES)
    with torch.inference_mode(), torch.enable_grad():
        out = attend(**given)
    assert out.is_inference() and not out.requires_grad


@pytest.mark.oldest
def test_tensors_made_in_inference_mode(device):
    """PyTorch's own error, where autograd would have to keep one."""
    with torch.inference_mode():
        k = torch.randn(1, HEADS, KV_LEN, DIM, device=device)
    given = tensors(device, "q") | {"k": k}
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        attend(**given)
    with torch.no_grad():
        assert attend(**given).isfinite().all()


# ---- The graph


def test_backward_twice(device):
    given = tensors(device, *NAMES)
    out = attend(**given)
    out.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in given.values()]
    out.sum().backward()
    assert all_equal([x.grad for x in given.values()], [2 * x for x in once])
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.oldest
@pytest.mark.parametrize("name", [*NAMES, "keep", "dropout_seed", "out"])
def test_in_place_change_before_backward(name, device):
    """PyTorch's version counter covers every tensor of the call."""
    given = {name: x * 1 for name, x in tensors(device, *NAMES).items()}
    given["keep"] = torch.rand(Q_LEN, KV_LEN, device=device) < 0.8
    given["dropout_seed"] = torch.tensor([3], device=device)
    mask = tilewise.Causal() & given["keep"]
    arguments = {each: x for each, x in given.items() if each != "keep"}
    given["out"] = attend(**arguments, mask=mask, dropout_p=0.2)
    loss = given["out"].sum()
    with torch.no_grad():
        given[name].logical_not_() if name == "keep" else given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.oldest
def test_tensor_hooks(device):
    given, seen = tensors(device, *NAMES), {}
    out = attend(**given)
    out.register_hook(lambda g: seen.setdefault("out", g.clone()))
    for name, x in given.items():
        x.register_hook(lambda g, name=name: seen.setdefault(name, g.clone()))
        x.register_post_accumulate_grad_hook(lambda x, name=name: seen.update({f"{name} in": x.grad.clone()}))
    given["q"].register_hook(lambda g: g * 2)
    do = torch.randn_like(out)
    out.backward(do)
    assert len(seen) == 1 + 2 * len(given)
    assert torch.equal(seen["out"], do)
    assert torch.equal(seen["q in"], 2 * seen["q"]) and seen["q"].any()
    assert all(torch.equal(seen[name], seen[f"{name} in"]) for name in NAMES[1:])


def test_a_hook_on_out_changes_the_gradients(device):
    given = tensors(device, *NAMES)
    leaves, do = list(given.values()), torch.randn(1, HEADS, Q_LEN, DIM, device=device)
    out = attend(**given)
    out.register_hook(lambda g: g * 2)
    doubled = torch.autograd.grad(out, leaves, do)
    assert all_equal(doubled, torch.autograd.grad(attend(**given), leaves, 2 * do))


@pytest.mark.oldest
def test_anomaly_mode(device):
    given = tensors(device, *NAMES)
    leaves = list(given.values())
    want = torch.autograd.grad(attend(**given).sum(), leaves)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert all_equal(torch.autograd.grad(attend(**given).sum(), leaves), want)
        with pytest.raises(RuntimeError, match=r"AttentionBackward.*nan"):
            torch.autograd.grad(attend(**given), leaves, torch.full_like(given["q"], torch.nan))


# ---- What is kept, and for how long


@pytest.mark.oldest
@pytest.mark.parametrize("path", PATHS)
def test_saved_tensor_hooks_see_every_tensor(path, device):
    """Packed into numbers and rebuilt from copies: nothing reaches the backward by another way."""
    leaves = tensors(device, *NAMES)
    do = torch.randn(1, HEADS, Q_LEN, DIM, device=device)
    lengths = torch.tensor([KV_LEN - 1], device=device)
    extra = dict(mask=tilewise.Padding(lengths))
    want = torch.autograd.grad(PATHS[path](**leaves, **extra), list(leaves.values()), do)
    stored = []

    def pack(x):
        stored.append(x.detach().clone())
        return len(stored) - 1

    given = {name: x * 1 for name, x in leaves.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: stored[i]):
        out = PATHS[path](**given, **extra)
    for x in (*given.values(), out, lengths):
        assert any(x.shape == each.shape and torch.equal(x, each) for each in stored)
    watched = [weakref.ref(given.pop(name)) for name in ("q", "k", "v", "bias")]
    gc.collect()
    assert all(watch() is None for watch in watched), "a tensor is kept beside the hooks"
    assert all_equal(torch.autograd.grad(out, list(leaves.values()), do), want)


@pytest.mark.oldest
def test_save_on_cpu(device):
    given = tensors(device, *NAMES)
    leaves, do = list(given.values()), torch.randn(1, HEADS, Q_LEN, DIM, device=device)
    want = torch.autograd.grad(attend(**given), leaves, do)
    with torch.autograd.graph.save_on_cpu():
        out = attend(**given)
    assert all_equal(torch.autograd.grad(out, leaves, do), want)


@pytest.mark.oldest
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpoint(dropout_p, use_reentrant, device):
    """Run again for the backward, with the same dropout: PyTorch puts its generator back."""
    given = tensors(device, *NAMES)
    leaves, do = list(given.values()), torch.randn(1, HEADS, Q_LEN, DIM, device=device)

    def run(*leaves):
        return attend(**dict(zip(NAMES, leaves, strict=True)), dropout_p=dropout_p)

    torch.manual_seed(5)
    plain = run(*leaves)
    plain.backward(do)
    want = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    torch.manual_seed(5)
    out = checkpoint(run, *leaves, use_reentrant=use_reentrant)
    torch.manual_seed(6)
    out.backward(do)
    assert torch.equal(out, plain) and all_equal([x.grad for x in leaves], want)


@pytest.mark.oldest
@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_graph_is_freed_without_the_garbage_collector(path, with_backward, device):
    """No reference cycle keeps a tensor, which on a GPU may be gigabytes, until Python looks for cycles."""
    leaves = tensors(device, *NAMES)
    gc.collect()
    gc.disable()
    try:
        given = {name: x * 1 for name, x in leaves.items()}
        out = PATHS[path](**given)
        watched = {name: weakref.ref(x) for name, x in (given | {"out": out}).items()}
        if with_backward:
            out.sum().backward()
        del given, out
        assert [name for name, watch in watched.items() if watch() is not None] == []
    finally:
        gc.enable()


@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pytest keeps those that it counts
def test_no_memory_growth(device):
    given = tensors(device, *NAMES)

    def alive() -> Counter:
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    def steps(count: int) -> None:
        for _ in range(count):
            attend(**given, dropout_p=0.1).sum().backward()
            for x in given.values():
                x.grad = None

    steps(3)
    alive()
    before = alive()
    steps(8)
    grown = alive() - before
    assert max(grown.values(), default=0) < 8, grown


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


# ---- Autocast


@pytest.mark.oldest
@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, impl, device):
    """The call with q, k and v cast by hand; gradients come back in each leaf's own dtype."""
    given = tensors(device, *NAMES)
    leaves = list(given.values())
    with torch.autocast(device.type, dtype):
        out, lse = attend(**given, impl=impl, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = given | {name: given[name].to(dtype) for name in ("q", "k", "v")}
    want, want_lse = attend(**cast, impl=impl, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    do = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, do)
    assert all(x.dtype == leaf.dtype == torch.float32 for x, leaf in zip(got, leaves, strict=True))
    assert all_equal(got, torch.autograd.grad(want, leaves, do))


@pytest.mark.oldest
@pytest.mark.parametrize("impl", ["portable", "torch"])
def test_autocast_makes_one_dtype_of_several(impl, device):
    given = tensors(device)
    mixed = [given["q"].half(), given["k"].bfloat16(), given["v"]]
    for x in mixed:
        x.requires_grad_()
    with pytest.raises(ValueError, match="dtypes q"):
        tilewise.attention(*mixed, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        out = tilewise.attention(*mixed, impl=impl)
    assert torch.equal(out, tilewise.attention(*(x.bfloat16() for x in mixed), impl=impl))
    out.sum().backward()
    assert [x.grad.dtype for x in mixed] == [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("impl", ["portable", "torch"])
def test_autocast_leaves_masks_alone_and_ends_where_it_ends(impl, device):
    given = tensors(device)
    keep = torch.rand(Q_LEN, KV_LEN, device=device) < 0.7
    with torch.autocast(device.type, torch.bfloat16):
        narrow = attend(given["q"], given["k"], given["v"], mask=keep, impl=impl)
        with torch.autocast(device.type, enabled=False):
            wide = attend(given["q"], given["k"], given["v"], mask=keep, impl=impl)
        assert torch.is_autocast_enabled(device.type)
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(wide, attend(given["q"], given["k"], given["v"], mask=keep, impl=impl))


# ---- Modules


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


# ---- What has no derivative says so


def test_a_score_without_derivative(device):
    given = tensors(device, "q")
    with pytest.raises(ValueError, match="has no derivative"):
        attend(**given | {"score": tilewise.UserScore(scaled_score, (0.5,))})
    with torch.no_grad():
        attend(**given | {"score": tilewise.UserScore(scaled_score, (0.5,))})
