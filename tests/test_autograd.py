"""attention in PyTorch's graph: which tensors get a gradient, modes, hooks, and what is kept for how long."""

import gc
import itertools
import weakref
from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilewise
from harness.gradients import check_gradients
from harness.small_call import ARGUMENTS, DIM, HEADS, KV_LEN, NAMES, PATHS, Q_LEN, all_equal, attend, tensors

# ---- Which inputs get a gradient


@pytest.mark.parametrize("path", PATHS)
def test_every_subset_of_inputs_that_require_a_gradient(path, device):
    """Whatever else is trained, a gradient has the same bits; what is not trained has none."""
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
        k = torch.randn(1, 1, KV_LEN, DIM, device=device)
    given = tensors(device, "q") | {"k": k}
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        attend(**given)
    with torch.no_grad():
        assert attend(**given).isfinite().all()


# ---- Gradients of out, of lse, of both


def results_gradients(device):
    return torch.randn(1, HEADS, Q_LEN, DIM, device=device), torch.randn(1, HEADS, Q_LEN, device=device)


@pytest.mark.parametrize("part", ["out", "lse", "both"])
def test_gradient_of_each_result(device, part):
    """A result without a gradient counts as one whose gradient is 0."""
    given, (do, dlse) = tensors(device, *NAMES), results_gradients(device)
    do, dlse = do * (part != "lse"), dlse * (part != "out")
    out, lse = attend(**given, return_lse=True)
    results = {"out": ([out], [do]), "lse": ([lse], [dlse]), "both": ([out, lse], [do, dlse])}[part]
    torch.autograd.backward(*results)
    others = {name: x.detach().clone() for name, x in given.items() if name not in "qkv"}
    want = check_gradients(*(given[name].detach() for name in "qkv"), do, dlse, **ARGUMENTS, **others)
    for name, gradient in zip(("q", "k", "v", "scale", "sink", "bias"), want.values(), strict=True):
        assert torch.equal(given[name].grad, gradient), name
        assert gradient.any() == (part != "lse" or name != "v"), f"{name} shows nothing"


def test_without_return_lse_the_gradient_is_that_of_out(device):
    given, (do, _) = tensors(device, *NAMES), results_gradients(device)
    leaves = list(given.values())
    of_one = torch.autograd.grad(attend(**given), leaves, do)
    assert all_equal(of_one, torch.autograd.grad(attend(**given, return_lse=True)[0], leaves, do))


# ---- One tensor in several places


def test_q_k_and_v_of_one_tensor_sum_their_gradients(device):
    x = torch.randn(1, HEADS, 20, 16, device=device)
    do, dlse = torch.randn(1, HEADS, 20, 16, device=device), torch.randn(1, HEADS, 20, device=device)
    apart = check_gradients(x.clone(), x.clone(), x.clone(), do, dlse)
    x.requires_grad_()
    torch.autograd.backward(tilewise.attention(x, x, x, return_lse=True, impl="portable"), (do, dlse))
    parts = torch.stack(list(apart.values())).double()
    unit = torch.finfo(torch.float32).eps / 2
    assert ((x.grad - parts.sum(0)).abs() <= 2 * unit * parts.abs().sum(0)).all()  # two additions round


def test_a_bias_given_twice_sums_its_gradients(device):
    """As two modifiers of one call, and in two calls."""
    given, gradients = tensors(device), results_gradients(device)
    q, k, v, bias = (given[name] for name in ("q", "k", "v", "bias"))
    score = lambda bias: [tilewise.Bias(bias), tilewise.Softcap(2.0)]  # noqa: E731
    apart = check_gradients(q, k, v, *gradients, score=score(bias.clone()), bias=bias.clone())
    one, other = list(apart.values())[3:]
    bias.requires_grad_()
    call = dict(return_lse=True, impl="portable")
    results = tilewise.attention(q, k, v, score=score(bias), bias=bias, **call)
    torch.autograd.backward(results, gradients)
    assert not torch.equal(one, other) and torch.equal(bias.grad, one + other)

    bias.grad = None
    one_way = lambda: tilewise.attention(q, k, v, bias=bias, **call)  # noqa: E731
    other_way = lambda: tilewise.attention(q, v, k, bias=bias, **call)  # noqa: E731
    first, second = (torch.autograd.grad(run(), bias, gradients)[0] for run in (one_way, other_way))
    torch.autograd.backward((*one_way(), *other_way()), gradients * 2)
    assert torch.equal(bias.grad, first + second)


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
