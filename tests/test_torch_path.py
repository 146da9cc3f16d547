"""The plain PyTorch path: every mask and score forward and backward, and a package that needs no GPU.

impl="torch" is tested here on the device at hand. What a laptop does (no GPU, no TRITON_INTERPRET) needs a
process of its own, because Triton decides at import how `@triton.jit` runs: this file is also its program.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import tilewise
import tilewise_reference
from tilewise.kernels.forward import forward_kernel
from tilewise.parts.numerics import INTERPRETED
from tilewise.plan.request import make_request
from tilewise.pytorch.plain import oracle_arguments

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM, VALUE_DIM = 2, 4, 2, 5, 7, 8, 6
U = 2.0**-24  # half a unit in the last place of fp32
Arguments = tuple[dict[str, Any], dict[str, torch.Tensor]]  # of `attention`; and what of it is trained


@triton.jit
def keep_near(q_idx, kv_idx, batch, head, args):
    return kv_idx - q_idx < args[0]


@triton.jit
def add_offset(s, batch, head, q_idx, kv_idx, args):
    return s + 0.5


def near_twin(batch, head, q_idx, kv_idx, reach):
    return kv_idx - q_idx < reach


def multiply_twin(s, batch, head, q_idx, kv_idx, factors):
    return s * factors[head]


def trained(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


def with_parameter(name: str, make: Callable[[torch.Tensor], dict[str, Any]], *shape: int) -> Callable:
    def build(device: torch.device) -> Arguments:
        parameter = trained(device, *shape)
        return make(parameter), {name: parameter}

    return build


def with_mask(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Arguments]:
    return lambda device: (dict(mask=make(device)), {})


def ints(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=device)


def all_at_once(device: torch.device) -> Arguments:
    tensors = dict(
        bias=trained(device, KV_LEN),
        sink=trained(device, Q_HEADS),
        temperature=trained(device, Q_HEADS),
        slopes=trained(device, Q_HEADS),
        scale=trained(device),
    )
    return dict(
        mask=tilewise.Causal(ints(device, 2, -2)) & tilewise.Padding(ints(device, 7, 3)),
        score=[tilewise.ALiBi(tensors["slopes"], ints(device, 2, -2)), tilewise.Softcap(2.0)],
        similarity=tilewise.Cosine(tensors["temperature"]),
        **{name: tensors[name] for name in ("bias", "sink", "scale")},
    ), tensors


FEATURES: dict[str, Callable[[torch.device], Arguments]] = {
    "plain": lambda d: ({}, {}),
    "dot": lambda d: (dict(similarity="dot"), {}),
    "cosine": lambda d: (dict(similarity="cosine"), {}),
    "causal": with_mask(lambda d: tilewise.Causal()),
    "causal top left": with_mask(lambda d: tilewise.Causal("top_left")),
    "window": with_mask(lambda d: tilewise.Window(1, 0)),
    "prefix": with_mask(lambda d: tilewise.Prefix(ints(d, 4, 0), "top_left")),
    "documents": with_mask(
        lambda d: tilewise.Documents(ints(d, 1, 2, 1, 3, 3), ints(d, 3, 1, 1, 2, 2, 1, 9))
    ),
    "padding": with_mask(lambda d: tilewise.Padding(ints(d, 7, 0))),
    "padding left": with_mask(lambda d: tilewise.Padding(3, "left")),
    "intervals": with_mask(lambda d: tilewise.Intervals(ints(d, 0, 2, 5, 1, 6), ints(d, 7, 2, 6, 4, 99))),
    "dense": with_mask(lambda d: torch.arange(35, device=d).view(5, 7) % 3 > 0),
    "user mask": with_mask(lambda d: tilewise.UserMask(keep_near, (2,), twin=near_twin)),
    "combined": with_mask(lambda d: tilewise.Causal() & (torch.arange(7, device=d) != 2)),
    "softcap": lambda d: (dict(score=tilewise.Softcap(0.7)), {}),
    "bias": with_parameter("bias", lambda p: dict(bias=p), Q_HEADS, 1, KV_LEN),
    "bias score": with_parameter("bias", lambda p: dict(score=tilewise.Bias(p)), BATCH, 1, Q_LEN, 1),
    "alibi": with_parameter("slopes", lambda p: dict(score=tilewise.ALiBi(p)), Q_HEADS),
    "alibi of batches": with_parameter("slopes", lambda p: dict(score=tilewise.ALiBi(p)), BATCH, Q_HEADS),
    "relative": with_parameter("table", lambda p: dict(score=tilewise.RelativePosition(p, 5)), Q_HEADS, 8),
    "user score": with_parameter(
        "factors", lambda p: dict(score=tilewise.UserScore(add_offset, (p,), twin=multiply_twin)), Q_HEADS
    ),
    "sink": with_parameter("sink", lambda p: dict(sink=p), Q_HEADS),
    "scale": with_parameter("scale", lambda p: dict(scale=p)),
    "temperature": with_parameter("temperature", lambda p: dict(similarity=tilewise.Cosine(p)), Q_HEADS),
    "everything": all_at_once,
}


def loss_of(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """A weighted sum of out and of every finite lse, so that each has a gradient of its own."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return (out * weights).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()


def check_feature(name: str, device: torch.device, impl: str | None) -> None:
    """out, lse and every gradient in fp32 against the same formula in float64."""
    torch.manual_seed(0)
    arguments, parameters = FEATURES[name](device)
    q = trained(device, BATCH, Q_HEADS, Q_LEN, DIM)
    k = trained(device, BATCH, KV_HEADS, KV_LEN, DIM)
    v = trained(device, BATCH, KV_HEADS, KV_LEN, VALUE_DIM)
    leaves = {"q": q, "k": k, "v": v} | parameters

    out, lse = tilewise.attention(q, k, v, **arguments, return_lse=True, impl=impl)
    assert out.dtype == lse.dtype == torch.float32
    exact = oracle_arguments(make_request(q, k, v, **arguments))
    want = tilewise_reference.attention(q, k, v, **exact, return_lse=True, dtype=torch.float64)
    got_gradients = torch.autograd.grad(loss_of(out, lse), list(leaves.values()))
    want_gradients = torch.autograd.grad(loss_of(*want), list(leaves.values()))

    results = {"out": (out, want[0]), "lse": (lse, want[1])}
    results |= {
        f"d{n}": pair for n, pair in zip(leaves, zip(got_gradients, want_gradients, strict=True), strict=True)
    }
    # A number passes through a handful of sums, over dims, keys and, for parameters, all pairs, and through
    # exp, where an error in s of so many units in the last place of the largest score becomes relative.
    largest = (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    pairs = BATCH * Q_HEADS * Q_LEN * KV_LEN
    for result, (got, exactly) in results.items():
        assert got.isfinite().all() or result == "lse", result
        assert exactly.abs().nan_to_num(posinf=0).max() > 0, f"{result} is zero: the test shows nothing"
        finite = exactly.isfinite()
        assert torch.equal(finite, got.isfinite()), result
        error = (got - exactly)[finite].abs().max().item()
        allowed = (
            U * (2 * DIM * largest + 2 * KV_LEN + pairs**0.5) * max(1, exactly[finite].abs().max().item())
        )
        assert error <= allowed, f"{result} of {name} is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", FEATURES)
def test_forward_and_backward(name, device):
    check_feature(name, device, impl="torch")


def test_empty_rows_and_unseen_nan_have_zero_gradients(device):
    q = torch.randn(1, 2, 3, 4, device=device, requires_grad=True)
    k, v = (torch.randn(1, 2, 5, 4, device=device) for _ in range(2))
    k[:, :, 3:], v[:, :, 3:] = torch.nan, torch.inf
    k.requires_grad_(), v.requires_grad_()
    mask = tilewise.Intervals(ints(device, 0, 2, 1), ints(device, 3, 2, 3))
    out, lse = tilewise.attention(q, k, v, mask=mask, return_lse=True, impl="torch")
    assert out.isfinite().all() and (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:, :, 1] == 0).all() and (dq[:, :, 0] != 0).any()
    assert (dk[:, :, 3:] == 0).all() and (dv[:, :, 3:] == 0).all() and (dv[:, :, :3] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_in_and_out(dtype, device):
    """Computed in fp32 and rounded once: the very bits of the fp32 result, rounded."""
    q, k, v = (torch.randn(1, 2, 5, 8, device=device).to(dtype).requires_grad_() for _ in range(3))
    out, lse = tilewise.attention(q, k, v, return_lse=True, impl="torch")
    wide = tilewise.attention(q.float(), k.float(), v.float(), impl="torch")
    assert lse.dtype == torch.float32 and torch.equal(out, wide.to(dtype))
    out.sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("UserMask(keep_near)", dict(mask=tilewise.Causal() & tilewise.UserMask(keep_near, (2,)))),
        ("UserMask(keep_near)", dict(mask=keep_near)),
        ("UserScore(add_offset)", dict(score=[tilewise.Softcap(1.0), add_offset])),
    ],
)
def test_user_functions_need_a_twin(words, arguments, device):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    with pytest.raises(ValueError) as raised:
        tilewise.attention(q, k, v, **arguments, impl="torch")
    assert words in str(raised.value) and "twin=" in str(raised.value)


# ---- The laptop: no GPU, no interpreter


def imports_quietly() -> None:
    assert not INTERPRETED and not torch.cuda.is_available() and not torch.cuda.is_initialized()
    assert not any(forward_kernel.device_caches.values()), "importing has compiled something"


def portable_says_how() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 in the environment before tilewise is imported"):
        tilewise.attention(q, q, q, impl="portable")


def user_mask_is_named() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"UserMask\(keep_near\).*twin="):
        tilewise.attention(q, q, q, mask=tilewise.UserMask(keep_near, (2,)))


def sdpa_trains() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    tilewise.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    got = [t.grad.clone() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).sum().backward()
    largest = (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    for ours, exact in zip(got, wide, strict=True):
        allowed = U * (2 * 8 * largest + 2 * 5 + 5) * max(1.0, exact.grad.abs().max().item())
        assert (ours - exact.grad).abs().max() <= allowed


def compiles_with_dynamic_lengths() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return tilewise.attention(x, x, x, mask=tilewise.Causal())

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        x = torch.randn(1, 2, length, 8)
        assert torch.equal(compiled(x), attend(x))


LAPTOP: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        imports_quietly,
        portable_says_how,
        user_mask_is_named,
        sdpa_trains,
        compiles_with_dynamic_lengths,
    )
}
LAPTOP |= {name: lambda name=name: check_feature(name, torch.device("cpu"), impl=None) for name in FEATURES}


@pytest.fixture(scope="module")
def laptop() -> dict[str, str]:
    """What became of each case in a process without GPU and interpreter: "" where it passed."""
    roots = [Path(module.__file__).parents[1] for module in (tilewise, tilewise_reference)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, roots)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LAPTOP)
def test_without_gpu_and_interpreter(name, laptop):
    assert laptop[name] == ""


def run_laptop() -> None:
    results = {}
    for name, case in LAPTOP.items():
        try:
            case()
            results[name] = ""
        except BaseException as error:  # pytest.raises fails with a BaseException
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    run_laptop()
