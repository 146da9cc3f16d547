"""What only a GPU can show: that PyTorch's chooser, its compiler and varlen_attn reach tilewise's kernels."""

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.nn import attention as chooser
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from harness.gradients import assert_gradients_match
from harness.graphs import captured
from harness.oracle import assert_matches, exact
from tilewise import Causal
from tilewise.drop_in import flash_impl
from tilewise.plan.request import request_of

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and torch.cuda.is_available() is False", allow_module_level=True)
if torch.version.hip is not None:
    pytest.skip("PyTorch's registry is for CUDA, and this is ROCm", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is set: no kernel runs on the GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def active():
    torch.compiler.reset()
    chooser.activate_flash_attention_impl("tilewise")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on some chips cuDNN's comes first
        yield
    chooser.restore_flash_attention_impl()


@pytest.fixture
def launches(monkeypatch):
    """How many forwards and backwards tilewise was asked for."""
    seen = []
    for name in ("run_forward", "run_backward"):
        run = getattr(flash_impl, name)
        monkeypatch.setattr(
            flash_impl, name, lambda *a, run=run, name=name, **k: (seen.append(name), run(*a, **k))[1]
        )
    return seen


def qkv(dim=64, q_heads=4, kv_heads=4, length=300, dtype=torch.float16):
    return [
        torch.randn(2, heads, length, dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def hold(inputs, out, do, asked) -> None:
    request = request_of(*inputs, **asked, impl="portable")
    grads = dict(zip("qkv", torch.autograd.grad(out, inputs, do), strict=True))
    with torch.no_grad():
        assert_matches(out, exact(request)[1].float(), request)  # the chooser returns no lse
    assert_gradients_match(grads, request, do, torch.zeros(out.shape[:3], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "given",
    [{}, dict(is_causal=True), dict(scale=0.3), dict(dim=100), dict(kv_heads=2, enable_gqa=True)],
    ids=str,
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_chooser_calls_it(is_compiled, given, dtype, launches):
    given = dict(given)
    sizes = {name: given.pop(name) for name in ("dim", "kv_heads") if name in given}
    inputs = qkv(**sizes, dtype=dtype)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **given)

    out = (torch.compile(attend, fullgraph=True) if is_compiled else attend)(*inputs)
    asked = dict(mask=Causal()) if given.get("is_causal") else {}
    hold(inputs, out, torch.randn_like(out), asked | {n: given[n] for n in ("scale",) if n in given})
    assert launches == ["run_forward", "run_backward"]


def test_dropout_is_that_of_the_forward(launches):
    """V = identity shows the pairs that the forward keeps, and dV = outᵀ those of the backward."""
    q, k = torch.zeros(2, 2, 4, 128, 128, device=DEVICE, dtype=torch.float16).requires_grad_()
    v = torch.eye(128, device=DEVICE, dtype=torch.float16).expand(2, 4, 128, 128).clone().requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    (dv,) = torch.autograd.grad(out, v, v.detach())
    assert torch.equal(out != 0, dv.mT != 0) and 0.2 < (out == 0).double().mean() < 0.4
    assert launches == ["run_forward", "run_backward"]


def test_a_captured_step():
    inputs = qkv()
    do = torch.randn_like(inputs[0])

    def step():
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return [out, *torch.autograd.grad(out, inputs, do)]

    graph, results = captured(step)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, results, step()))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_varlen_attn(is_compiled, launches):
    starts = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device=DEVICE)
    inputs = [
        torch.randn(300, 4, 64, device=DEVICE, dtype=torch.float16, requires_grad=True) for _ in range(3)
    ]

    def attend(q, k, v):
        return varlen.varlen_attn(q, k, v, starts, starts, 200, 200, window_size=(-1, 0))

    out = (torch.compile(attend, fullgraph=True) if is_compiled else attend)(*inputs)
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, do)
    request = request_of(*inputs, q_offsets=starts, mask=Causal(), impl="portable")
    found = dict(zip("qkv", map(flash_impl.heads_first, grads), strict=True))
    assert_gradients_match(found, request, flash_impl.heads_first(do), torch.zeros(1, 4, 300, device=DEVICE))
    assert launches == ["run_forward", "run_backward"]


def test_restored_it_is_not_called(launches):
    inputs = qkv()
    chooser.restore_flash_attention_impl()
    F.scaled_dot_product_attention(*inputs).sum().backward()
    assert not launches
    chooser.activate_flash_attention_impl("tilewise")
    F.scaled_dot_product_attention(*inputs).sum().backward()
    assert launches == ["run_forward", "run_backward"]
