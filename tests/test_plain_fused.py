"""The plain PyTorch path: which calls PyTorch's fused kernel answers, told by counting, and all derivatives.

That the definition is right in blocks is `test_plain_blocks`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import tilewise
from harness.oracle import check
from tilewise.pytorch import plain

CPU = torch.device("cpu")
Tensor = torch.Tensor
attend = partial(tilewise.attention, impl="torch")


def seeded(device: torch.device) -> dict[str, Any]:
    return dict(dropout_p=0.4, dropout_seed=torch.tensor([5], device=device))


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often the fused kernel's forward and backward ran, and blocks of the definition."""
    calls = dict(forward=0, backward=0, blocks=0)

    def count(name: str, what: str) -> None:
        run = getattr(plain, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(plain, name, counting)

    count("flash", "forward"), count("flash_backward", "backward"), count("run_block", "blocks")
    return calls


def tensors(
    q_len: int = 6, kv_len: int = 6, q_heads: int = 4, kv_heads: int = 2, dim: int = 8, value_dim: int = 8
) -> list[Tensor]:
    sizes = (q_heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim)
    return [torch.randn(2, *each, requires_grad=True) for each in sizes]


# ---- PyTorch's fused kernel


SAME: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "no mask": (dict(q_len=5, kv_len=9), {}),
    "more rows than keys": (dict(q_len=9, kv_len=5), dict(scale=0.7)),
    "dot": ({}, dict(similarity="dot")),
    "negative scale": ({}, dict(scale=-0.5)),
    "scale 0": ({}, dict(scale=0.0)),
    "causal": ({}, dict(mask=tilewise.Causal())),
    "causal, a scale": ({}, dict(mask=tilewise.Causal("top_left"), scale=0.7)),
    "causal, more keys": (
        dict(q_len=5, kv_len=9),
        dict(mask=tilewise.Causal("top_left")),
    ),
    "causal, more rows than keys": (dict(q_len=9, kv_len=5), dict(mask=tilewise.Causal("top_left"))),
    "one row at the last key": (dict(q_len=1, kv_len=9), dict(mask=tilewise.Causal())),
    "one row at the first key": (dict(q_len=1, kv_len=9), dict(mask=tilewise.Causal("top_left"))),
    "longer than the kernel's blocks": (dict(q_len=530, kv_len=600, q_heads=1, kv_heads=1), {}),
    "one head of keys": (dict(kv_heads=1), dict(mask=tilewise.Causal())),
    "one dimension": (dict(dim=1, value_dim=1), {}),
    "many dimensions": (dict(dim=255, value_dim=255), {}),
}
OTHER: dict[str, tuple[dict[str, int], Callable[[], dict[str, Any]]]] = {
    "value_dim": (dict(value_dim=6), dict),
    "causal, a cache": (dict(q_len=3), lambda: dict(mask=tilewise.Causal())),
    "causal, scale 0": ({}, lambda: dict(mask=tilewise.Causal(), scale=0.0)),
    "causal, negative scale": ({}, lambda: dict(mask=tilewise.Causal(), scale=-1.0)),
    "two masks": ({}, lambda: dict(mask=tilewise.Causal() & tilewise.Window(3, 0))),
    "window": ({}, lambda: dict(mask=tilewise.Window(3, 0))),
    "padding": ({}, lambda: dict(mask=tilewise.Padding(4))),
    "dense": ({}, lambda: dict(mask=torch.rand(6, 6) < 0.7)),
    "bias": ({}, lambda: dict(bias=torch.randn(6, 6))),
    "score": ({}, lambda: dict(score=tilewise.Softcap(2.0))),
    "sink": ({}, lambda: dict(sink=torch.randn(4))),
    "dropout": ({}, lambda: seeded(CPU)),
    "cosine": ({}, lambda: dict(similarity="cosine")),
    "temperature": ({}, lambda: dict(similarity=tilewise.Cosine(2.0))),
    "tensor scale": ({}, lambda: dict(scale=torch.tensor(0.3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_the_fused_kernel_answers(name, dtype, counted):
    """By the rule of `harness.oracle`, with NaN in the keys behind the last row that Causal leaves unseen."""
    sizes, arguments = SAME[name]
    q, k, v = (x.detach().to(dtype) for x in tensors(**sizes))
    if arguments.get("mask") is not None and arguments["mask"].align == "top_left":
        k[:, :, q.shape[2] :], v[:, :, q.shape[2] :] = torch.nan, torch.inf
    check(q, k, v, **arguments, impl="torch")
    assert counted == dict(forward=1, backward=0, blocks=0)


@pytest.mark.parametrize("name", OTHER)
def test_the_definition_answers(name, counted):
    sizes, arguments = OTHER[name]
    q, k, v = (x.detach() for x in tensors(**sizes))
    check(q, k, v, **arguments(), impl="torch")
    assert counted == dict(forward=0, backward=0, blocks=1)


def of_definition(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(plain, "fused_is_the_same", lambda request, return_lse: False)
        return run()


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAME)
def test_gradients_of_the_fused_kernel(name, counted, monkeypatch):
    """Those of the definition, and 0 for the keys behind the last row, NaN or not."""
    sizes, arguments = SAME[name]
    q, k, v = tensors(**sizes)
    if arguments.get("mask") is not None and arguments["mask"].align == "top_left":
        with torch.no_grad():
            k[:, :, q.shape[2] :], v[:, :, q.shape[2] :] = torch.nan, torch.inf
    do = torch.randn(*q.shape[:3], v.shape[3])
    run = lambda: torch.autograd.grad(attend(q, k, v, **arguments), (q, k, v), do)  # noqa: E731
    got = run()
    assert counted == dict(forward=1, backward=1, blocks=0)
    assert_close(got, of_definition(run, monkeypatch))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(2, 9, 3, 8).transpose(1, 2),
    "gaps within a row": lambda: torch.randn(2, 3, 9, 16)[..., ::2],
    "columns": lambda: torch.randn(2, 3, 8, 9).mT,
    "one row for all": lambda: torch.randn(2, 3, 1, 8).expand(2, 3, 9, 8),
    "one head for all": lambda: torch.randn(2, 1, 9, 8).expand(2, 3, 9, 8),
    "one number for all": lambda: torch.randn(1).expand(2, 3, 9, 8),
    "rows that overlap": lambda: torch.randn(200).as_strided((2, 3, 9, 8), (60, 20, 2, 1)),
    "in one dimension": lambda: torch.randn(2, 3, 9, 4)[..., 1:2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, counted, monkeypatch):
    """Of q, k, v and of the gradient that arrives."""
    q, k, v, do = (LAYOUTS[layout]() for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run() -> tuple[Tensor, ...]:
        out = attend(*leaves, mask=tilewise.Causal())
        return out, *torch.autograd.grad(out, leaves, do)

    assert_close(run(), of_definition(run, monkeypatch))
    assert counted["forward"] == counted["backward"] == 1


def test_one_tensor_for_q_k_and_v(counted, monkeypatch):
    x = torch.randn(1, 2, 6, 8, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out, lse = attend(x, x, x, mask=tilewise.Causal(), return_lse=True)
        (of_out,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        (of_both,) = torch.autograd.grad(out.sum() + lse.square().sum(), x, create_graph=True)
        return of_out, of_both, *torch.autograd.grad(of_both.square().sum(), x)

    assert_close(run(), of_definition(run, monkeypatch))
    assert counted["forward"] == counted["backward"] == 1


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "kv"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_of_some_tensors(needed, with_lse, monkeypatch):
    given = {name: x.requires_grad_(name in needed) for name, x in zip("qkv", tensors(), strict=True)}

    def run() -> tuple[Tensor, ...]:
        out, lse = attend(**given, return_lse=True)
        loss = out.square().sum() + (lse.sin().sum() if with_lse else 0)
        return torch.autograd.grad(loss, [given[name] for name in needed])

    assert attend(**given, return_lse=True)[1].requires_grad == (needed != "v")

    assert attend(**given, return_lse=True)[1].requires_grad == (needed != "v")
    assert_close(run(), of_definition(run, monkeypatch))


def test_lse_has_a_gradient(counted, monkeypatch):
    """PyTorch's kernel has none of lse: the definition is asked."""
    q, k, v = tensors()
    run = lambda: torch.autograd.grad(  # noqa: E731
        attend(q, k, v, mask=tilewise.Causal(), return_lse=True)[1].sin().sum(), (q, k)
    )
    got = run()
    assert counted == dict(forward=1, backward=0, blocks=1)
    assert_close(got, of_definition(run, monkeypatch))


# ---- Derivatives of all kinds, where PyTorch's kernel has the first in reverse mode only


def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, mask=tilewise.Causal("top_left"), return_lse=True)


@pytest.mark.parametrize("lengths", [(3, 4), (4, 3)])
def test_gradgradcheck(lengths, counted, monkeypatch):
    """By finite differences, in float64: in the definition's place and the kernel's alike."""
    monkeypatch.setattr(plain, "BLOCK", 2 * 2 * lengths[1] * 2)
    given = [x.detach().double().requires_grad_() for x in tensors(*lengths, 2, 1, 3, 3)]
    assert torch.autograd.gradcheck(causal, given)
    assert min(counted.values()) > 0
    assert torch.autograd.gradgradcheck(causal, given)


def test_hessian_both_ways(monkeypatch):
    q, k, v = (x.detach() for x in tensors(3, 3, 1, 1, 4, 4))
    loss = lambda q: causal(q, k, v)[0].square().sum()  # noqa: E731
    want = of_definition(lambda: torch.autograd.functional.hessian(loss, q), monkeypatch)
    assert want.abs().max() > 0.01
    for got in (
        torch.autograd.functional.hessian(loss, q),
        torch.autograd.functional.hessian(loss, q, vectorize=True),
        torch.func.hessian(loss)(q),
        torch.func.jacrev(torch.func.jacrev(loss))(q),
    ):
        assert_close(got, want)


def test_batches_of_gradients():
    """`is_grads_batched` runs the backward under vmap."""
    q, k, v = tensors(3, 3)
    out, _ = causal(q, k, v)
    do = torch.randn(5, *out.shape)
    together = torch.autograd.grad(out, (q, k, v), do, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, (q, k, v), each, retain_graph=True) for each in do]
    assert_close(together, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))


def test_forward_mode():
    given = [x.detach() for x in tensors()]
    moved = [torch.randn_like(x) for x in given]
    _, (out_tangent, lse_tangent) = torch.func.jvp(causal, tuple(given), tuple(moved))
    h = 1e-3
    ahead, behind = (causal(*(x + s * t for x, t in zip(given, moved, strict=True))) for s in (h, -h))
    for tangent, plus, minus in zip((out_tangent, lse_tangent), ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (plus - minus) / (2 * h), rtol=1e-2, atol=1e-3)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(given, moved, strict=True)]
        assert_close(forward_ad.unpack_dual(causal(*duals)[0]).tangent, out_tangent)


def test_a_tangent_that_arrives_in_the_backward():
    """Forward mode over a gradient whose forward knew of no tangent: d(dv)/d(do) is linear in do."""
    q, k, v = tensors()
    out, _ = causal(q, k, v)
    do, moved = torch.randn_like(out), torch.randn_like(out)
    with forward_ad.dual_level():
        (dv,) = torch.autograd.grad(out, v, forward_ad.make_dual(do, moved), retain_graph=True)
        got = forward_ad.unpack_dual(dv).tangent
    assert_close(got, torch.autograd.grad(out, v, moved)[0])


def test_vmap():
    given = [x.detach() for x in tensors()]
    many = [torch.stack([x, 2 * x, -x]) for x in given]
    got = torch.vmap(lambda q, k, v: causal(q, k, v)[0])(*many)
    assert_close(got, torch.stack([causal(*each)[0] for each in zip(*many, strict=True)]))


def test_flops_are_still_counted():
    q, k, v = (x.detach() for x in tensors())
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * (2 * 4 * 6 * 6 * 8)


# ---- The other modes of PyTorch


def test_inference_mode_and_no_grad(counted):
    q, k, v = tensors()
    want = attend(q, k, v)
    with torch.no_grad():
        quiet = attend(q, k, v)
    with torch.inference_mode(), torch.enable_grad():
        inferred = attend(q, k, v)
    assert torch.equal(quiet, want) and torch.equal(inferred, want)
    assert not quiet.requires_grad and not inferred.requires_grad and counted["forward"] == 3


def test_the_same_bits_each_time_and_whatever_is_asked():
    q, k, v = tensors(70, 70)
    runs = []
    for _ in range(2):
        out, lse = causal(q, k, v)
        runs.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    alone = attend(q.detach(), k.detach(), v.detach(), mask=tilewise.Causal())
    assert torch.equal(alone, runs[0][0])


@pytest.mark.parametrize(
    "name, dynamic",
    [("no mask", False), ("causal", False), ("causal", True), ("a cache", False), ("score", True)],
)
def test_compiled(name, dynamic, monkeypatch):
    """fullgraph, forward and backward, for one length after another; the bits of eager mode where the graph
    knows that the kernel answers. The definition is one block, however small a block may be."""
    own = {"a cache": ({}, dict(mask=tilewise.Causal())), "score": ({}, dict(score=tilewise.Softcap(2.0)))}
    sizes, arguments = (own | SAME)[name]
    more_keys = {"a cache": 3}.get(name, sizes.get("kv_len", 6) - sizes.get("q_len", 6))
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attend(q, k, v, scale=scale, **arguments)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, scale in ((5, 0.5), (8, 0.25)):
        given = tensors(length, length + more_keys)
        want = step(*given, scale)
        with monkeypatch.context() as patch:
            patch.setattr(plain, "BLOCK", 1)
            got = compiled(*given, scale)
        do = torch.randn_like(want)
        got, want = ((x, *torch.autograd.grad(x, given, do)) for x in (got, want))
        assert_close(got, want)
        if name in SAME and not dynamic:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_lse_keeps_its_gradient():
    q, k, v = tensors()
    torch._dynamo.reset()
    loss = lambda q, k, v: sum(x.square().sum() for x in causal(q, k, v))  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(loss(q, k, v), (q, k, v))
    )


def test_compiled_transforms():
    """Forward mode inside a graph: PyTorch's kernel has none."""
    given = tuple(x.detach() for x in tensors())
    torch._dynamo.reset()
    push = lambda *given: torch.func.jvp(lambda *g: attend(*g), given, given)[1]  # noqa: E731
    assert_close(torch.compile(push, fullgraph=True, backend="eager")(*given), push(*given))


@pytest.mark.parametrize("mask", [None, tilewise.Causal(), tilewise.Causal("top_left")])
def test_exported_for_any_length(mask):
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, mask=mask)

    q_len, kv_len = torch.export.Dim("q_len", min=2, max=64), torch.export.Dim("kv_len", min=2, max=64)
    shapes = {2: q_len}, {2: kv_len}, {2: kv_len}
    given = tuple(x.detach() for x in tensors(5, 7, kv_heads=4))
    program = torch.export.export(Attend(), given, dynamic_shapes=shapes).module()
    for lengths in ((5, 7), (6, 6), (9, 4)):
        given = tuple(x.detach() for x in tensors(*lengths, kv_heads=4))
        assert_close(program(*given), Attend()(*given))
