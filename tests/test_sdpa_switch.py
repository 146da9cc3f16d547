"""tilewise.sdpa: PyTorch's own scaled_dot_product_attention is tilewise's, or PyTorch's with a reason."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import tilewise
from harness.interpreted import set_interpreted
from harness.switched import KERNELS, PLAIN, PYTORCH, fresh_switch, qkv, reasons, who, wide

__all__ = ["fresh_switch"]
attend = F.scaled_dot_product_attention


def test_is_no_module_and_says_its_name():
    assert repr(tilewise.sdpa) == "tilewise.sdpa" and "sdpa" in tilewise.__all__


# ---- What tilewise answers


def some_mask(*shape, device):
    kept = torch.rand(shape, device=device) < 0.6
    kept[..., 0] = True
    return kept


ANSWERED = {
    "nothing": lambda device: dict(),
    "causal": lambda device: dict(is_causal=True),
    "bool": lambda device: dict(attn_mask=some_mask(5, 5, device=device)),
    "added": lambda device: dict(attn_mask=torch.randn(2, 1, 5, 5, device=device, requires_grad=True)),
    "scale": lambda device: dict(scale=0.3),
    "dropout": lambda device: dict(dropout_p=0.5),
}


@pytest.mark.oldest
@pytest.mark.parametrize("name", ANSWERED)
def test_what_tilewise_supports_has_its_bits(name, device):
    q, k, v = qkv(device=device)
    given = ANSWERED[name](device)
    leaves = [q, k, v, *[x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]]
    do = torch.randn_like(q)

    def results(function):
        torch.manual_seed(3)
        out = function(q, k, v, **given)
        return out, *torch.autograd.grad(out, leaves, do)

    want = results(tilewise.scaled_dot_product_attention)
    with tilewise.sdpa():
        got = results(attend)
    assert who() == [KERNELS]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((5, 8), (7, 8), (7, 8)), ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 6)), ((2, 2, 3, 5, 8),) * 3],
    ids=str,
)
def test_other_ranks_and_widths(q, k, v, device):
    q, k, v = (torch.randn(shape, device=device) for shape in (q, k, v))
    with tilewise.sdpa():
        assert torch.equal(attend(q, k, v), tilewise.scaled_dot_product_attention(q, k, v))
    assert who() == [KERNELS]


def test_grouped_heads_with_a_mask(device):
    q, (k, v) = torch.randn(2, 6, 5, 8, device=device), torch.randn(2, 2, 2, 7, 8, device=device)
    given = dict(attn_mask=some_mask(6, 1, 7, device=device), enable_gqa=True)
    with tilewise.sdpa():
        out = attend(q, k, v, **given)
    assert torch.equal(out, tilewise.scaled_dot_product_attention(q, k, v, **given)) and who() == [KERNELS]


def test_jagged_sequences(device):
    rows = [torch.randn(n, 2, 8, device=device) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    want = tilewise.attention(x, x, x, mask=tilewise.Causal("top_left"), scale=0.3)
    with tilewise.sdpa():
        got = attend(x, x, x, is_causal=True, scale=0.3)
    assert torch.equal(got.values(), want.values()) and who() == [KERNELS]


def test_jagged_heads_are_grouped_where_it_is_asked_for(device):
    packed = [torch.randn(8, heads, 8, device=device) for heads in (4, 2)]
    offsets = torch.tensor([0, 3, 8], device=device)
    q, k = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in packed)
    with tilewise.sdpa():
        got = attend(q, k, k, enable_gqa=True)
        assert torch.equal(got.values(), tilewise.attention(q, k, k).values()) and who() == [KERNELS]
        with pytest.raises(Exception, match=r"batch2|size|shape|broadcast|heads"):
            attend(q, k, k)
    assert "enable_gqa=True" in reasons()


def test_plain_pytorch_answers_outside_the_interpreter(monkeypatch):
    set_interpreted(monkeypatch, False)
    q, k, v = qkv()
    with tilewise.sdpa():
        attend(q, k, v)
    assert who() == [PLAIN]


def test_only_the_shape_is_asked_for(device):
    meta = torch.empty(2, 3, 5, 8, device="meta")
    with tilewise.sdpa():
        assert attend(meta, meta, meta).shape == (2, 3, 5, 8)
        with FakeTensorMode() as mode:
            assert attend(*[mode.from_tensor(x) for x in qkv(device=device)]).shape == (2, 3, 5, 8)
    assert who() == [KERNELS] * 2


def test_autocast(device):
    q, k, v = qkv(device=device)
    with tilewise.sdpa(), torch.autocast(device.type, torch.bfloat16):
        assert attend(q, k, v).dtype == torch.bfloat16
    assert who() == [KERNELS]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device):
    q, k, v = qkv(device=device)
    with mode(), tilewise.sdpa():
        assert not attend(q, k, v).requires_grad
    assert who() == [KERNELS]


TRANSFORMS = {
    "grad": lambda loss, q: torch.func.grad(loss)(q),
    "jvp": lambda loss, q: torch.func.jvp(loss, (q,), (torch.ones_like(q),))[1],
    "vmap": lambda loss, q: torch.vmap(loss)(torch.stack([q, 2 * q])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, device):
    q, k, v = (x.detach() for x in qkv(device=device))
    with tilewise.sdpa():
        got = TRANSFORMS[name](lambda q: attend(q, k, v).square().sum(), q)
    attention = tilewise.scaled_dot_product_attention
    want = TRANSFORMS[name](lambda q: attention(q, k, v).square().sum(), q)
    assert torch.equal(got, want) and who() == [KERNELS]


# ---- What PyTorch answers, and why


class Marked(torch.Tensor):
    pass


def twice(x):
    return TwoTensor(x.detach(), x.detach())


PASSED_ON = {
    "wide heads": (lambda q, k, v: attend(*wide(q, k, v)), "head_dim=608"),
    "a subclass": (lambda q, k, v: attend(q.as_subclass(Marked), k, v), "Marked, which may have"),
    "a wrapper": (
        lambda q, k, v: attend(q, twice(k), v),
        "key is a torch.testing._internal.two_tensor.TwoTe",
    ),
    "a mask": (
        lambda q, k, v: attend(q, k, v, causal_lower_right(5, 5)),
        "attn_mask is a torch.nn.attention",
    ),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_all_else_is_answered_by_pytorch(name, device):
    call, reason = PASSED_ON[name]
    q, k, v = (x.detach() for x in qkv(device=device))
    want = call(q, k, v)
    with tilewise.sdpa():
        got = call(q, k, v)
    plain = [x.a if isinstance(x, TwoTensor) else x.as_subclass(torch.Tensor) for x in (got, want)]
    assert type(got) is type(want) and torch.equal(*plain)
    assert reason in reasons()


def test_every_reason_is_given(device):
    q, k, v = wide(*qkv(device=device))
    with tilewise.sdpa():
        attend(q, k, v, scale=float("nan"))
    (entry,) = tilewise.sdpa.report().entries
    assert len(entry.reasons) == 2 and tuple(tilewise.why_not(q, k, v, scale=float("nan"))) == entry.reasons


def test_the_math_backend_is_pytorchs_where_it_is_asked_for(device):
    q, k, v = qkv(device=device)
    with tilewise.sdpa():
        with sdpa_kernel(SDPBackend.MATH):
            attend(q, k, v)
        assert "math backend alone" in reasons()
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            attend(q, k, v)
    assert who() == [KERNELS]


MISTAKES = {
    "a mask and a corner": lambda q, k, v: attend(q, k, v, torch.zeros(4, 4), is_causal=True),
    "no tensor": lambda q, k, v: attend(q, 3, v),
    "a mask that is none": lambda q, k, v: attend(q, k, v, 3),
    "too few": lambda q, k, v: attend(q, k),
    "scale by position": lambda q, k, v: attend(q, k, v, None, 0.0, False, 0.3),
    "an unknown name": lambda q, k, v: attend(q, k, v, softcap=3.0),
    "head_dims": lambda q, k, v: attend(q, k[..., :7], v),
    "a mask's shape": lambda q, k, v: attend(q, k, v, torch.zeros(3, 4)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_raise_what_pytorch_raises(name):
    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(Exception) as theirs:
        MISTAKES[name](q, k, v)
    with tilewise.sdpa(), pytest.raises(type(theirs.value)) as raised:
        MISTAKES[name](q, k, v)
    assert str(raised.value) == str(theirs.value)


def test_a_refused_call_draws_what_pytorch_would_draw(device):
    q, k, v = wide(*qkv(device=device))
    torch.manual_seed(1)
    want = attend(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    with tilewise.sdpa():
        assert torch.equal(attend(q, k, v, dropout_p=0.5), want)
    assert who() == [PYTORCH]


# ---- Where it is on


def test_by_whatever_name(device):
    q, k, v = qkv(device=device)
    with tilewise.sdpa():
        imported_before(q, k, v)
        torch._C._nn.scaled_dot_product_attention(q, k, v)
    imported_before(q, k, v)
    assert who() == [KERNELS] * 2


def test_nested_regions_answer_once(device):
    q, k, v = qkv(device=device)
    region = tilewise.sdpa()
    with region, tilewise.sdpa(), region:
        attend(q, k, v)
        attend(*wide(q, k, v))
    assert who() == [KERNELS, PYTORCH]


def test_an_exception_leaves_nothing_behind(device):
    q, k, v = qkv(device=device)
    with pytest.raises(RuntimeError), tilewise.sdpa(), tilewise.sdpa():
        attend(q, k, v[:, :2])
    assert not _get_current_function_mode_stack()
    attend(q, k, v)
    assert who() == [PYTORCH]


@pytest.mark.oldest
def test_enable_and_disable(device):
    q, k, v = qkv(device=device)
    asked = []

    def call():
        attend(q, k, v)
        asked.append(bool(who()))

    tilewise.sdpa.disable()
    call()
    tilewise.sdpa.enable()
    tilewise.sdpa.enable()
    call()
    with tilewise.sdpa():
        call()
        tilewise.sdpa.disable()
        call()
        tilewise.sdpa.enable()
    call()
    tilewise.sdpa.disable()
    call()
    assert asked == [False, True, True, True, True, False]


def test_a_region_is_entered_once_by_enable():
    tilewise.sdpa.enable()
    tilewise.sdpa.enable()
    assert len(_get_current_function_mode_stack()) == 1
    tilewise.sdpa.disable()


@pytest.mark.parametrize("around", [partial(torch.device, "cpu"), BaseTorchFunctionMode], ids=str)
def test_enabled_inside_another_mode(around):
    q, k, v = qkv()
    with around():
        tilewise.sdpa.enable()
        attend(q, k, v)
    attend(q, k, v)
    with around():
        tilewise.sdpa.disable()
        attend(q, k, v)
    assert len(who()) == 2


def test_the_default_device_stays_below():
    q, k, v = qkv()
    torch.set_default_device("cpu")
    tilewise.sdpa.enable()
    torch.set_default_device(None)
    attend(q, k, v)
    torch.set_default_device("cpu")
    tilewise.sdpa.disable()
    torch.set_default_device(None)
    assert who() == [KERNELS]


def test_a_thread_has_its_own_switch(monkeypatch):
    set_interpreted(monkeypatch, False)  # Triton's interpreter is for one thread
    q, k, v = qkv()
    with tilewise.sdpa():
        thread = threading.Thread(target=lambda: attend(q, k, v))
        thread.start()
        thread.join()
    assert who() == []
    with ThreadPoolExecutor(2, initializer=tilewise.sdpa.enable) as pool:
        list(pool.map(lambda _: attend(q, k, v), range(4)))
    assert who() == [PLAIN] * 4


# ---- What a backward pass repeats


STARTS = {
    "method": lambda out, x: out.backward(),
    "function": lambda out, x: torch.autograd.backward(out),
    "grad": lambda out, x: torch.autograd.grad(out, x),
}


@pytest.mark.oldest
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_what_it_did(start, reentrant, device):
    if start == "grad" and reentrant:
        start = "method"  # PyTorch has no grad through a reentrant checkpoint
    q, k, v = qkv(device=device)
    with tilewise.sdpa(), tilewise.sdpa():
        out = checkpoint(attend, q, k, v, use_reentrant=reentrant).square().sum()
        STARTS[start](out, [q, k, v])
    assert who() == [KERNELS] * 2


def test_backward_outside_of_the_region(device):
    """Not silently another answer: PyTorch notices that what is repeated is not what was done."""
    q, k, v = qkv(device=device)
    with tilewise.sdpa():
        out = checkpoint(attend, q, k, v, use_reentrant=False).sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.backward()


def test_a_subclass_keeps_its_own_backward():
    x = torch.randn(3).as_subclass(Marked).requires_grad_()
    with tilewise.sdpa():
        (x * 2).sum().backward()
    assert torch.equal(x.grad.as_subclass(torch.Tensor), torch.full((3,), 2.0))
