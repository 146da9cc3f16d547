"""attention under torch.compile: the bits of eager mode, forward and all gradients, and few graphs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise
from tilewise.nn import CrossAttention, SelfAttention
from tilewise.pytorch import names
from tilewise.pytorch.encoding import encode

BATCH, HEADS = 1, 2
SIZES = ((5, 7), (6, 11))  # (q_len, kv_len), one after the other


@pytest.fixture(autouse=True)
def forget_graphs(monkeypatch):
    """Every test as in a process of its own: no graphs, and no name that an earlier call has registered."""
    torch._dynamo.reset()
    monkeypatch.setattr(names, "_registry", type(names._registry)())
    yield
    torch._dynamo.reset()


# ---- Functions of the caller's own: torch.compile meets them as globals of this module


@triton.jit
def dilated_keep(q_idx, kv_idx, batch, head, args):
    return (q_idx + kv_idx + head) % args[0] == 0


@triton.jit
def other_dilated_keep(q_idx, kv_idx, batch, head, args):
    return (q_idx * 2 + kv_idx) % args[0] == 0


@triton.jit
def steep_score(s, batch, head, q_idx, kv_idx, args):
    return s * args[1] + s * s * tl.load(args[0] + head)


@triton.jit
def steep_derivative(s, batch, head, q_idx, kv_idx, args):
    return args[1] + 2.0 * s * tl.load(args[0] + head)


@triton.jit
def steep_by_factor(s, batch, head, q_idx, kv_idx, args):
    return s * s


# ---- Cases: tensors from outside, and what the compiled function makes of them


class Case(NamedTuple):
    name: str
    arguments: Callable[[dict[str, torch.Tensor]], dict] = lambda t: {}
    tensors: Callable[[int, int], dict[str, torch.Tensor]] = lambda q_len, kv_len: {}
    kv_heads: int = HEADS
    dims: tuple[int, int] = (8, 8)


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high + 1, shape)


CASES = {
    case.name: case
    for case in (
        Case("plain"),
        Case("grouped", kv_heads=1),
        Case("value_dim", dims=(8, 5)),
        Case("causal", lambda t: dict(mask=tilewise.Causal())),
        Case("window", lambda t: dict(mask=tilewise.Window(2, 1, "top_left") & tilewise.Causal())),
        Case(
            "padding",
            lambda t: dict(mask=tilewise.Padding(t["lengths"])),
            lambda q_len, kv_len: {"lengths": integers(kv_len - 2, BATCH) + 2},
        ),
        Case(
            "prefix",
            lambda t: dict(mask=tilewise.Prefix(t["lengths"])),
            lambda q_len, kv_len: {"lengths": integers(kv_len, BATCH)},
        ),
        Case(
            "documents",
            lambda t: dict(mask=tilewise.Documents(t["ids"], t["kv_ids"]) & tilewise.Causal("bottom_right")),
            lambda q_len, kv_len: {"ids": integers(1, BATCH, q_len), "kv_ids": integers(1, kv_len)},
        ),
        Case(
            "dense",
            lambda t: dict(mask=t["mask"]),
            lambda q_len, kv_len: {"mask": torch.rand(HEADS, q_len, kv_len) < 0.6},
        ),
        Case(
            "intervals",
            lambda t: dict(mask=tilewise.Intervals(t["start"], t["start"] + 4)),
            lambda q_len, kv_len: {"start": integers(kv_len - 1, q_len)},
        ),
        Case("user_mask", lambda t: dict(mask=tilewise.UserMask(dilated_keep, (2,)))),
        Case("softcap", lambda t: dict(score=tilewise.Softcap(0.7))),
        Case(
            "alibi",
            lambda t: dict(score=tilewise.ALiBi(t["slopes"])),
            lambda *_: {"slopes": torch.rand(BATCH, HEADS)},
        ),
        Case(
            "relative",
            lambda t: dict(score=tilewise.RelativePosition(t["table"], 6)),
            lambda *_: {"table": torch.randn(HEADS, 8)},
        ),
        Case(
            "bias",
            lambda t: dict(bias=t["bias"], score=tilewise.Bias(t["before"])),
            lambda q_len, kv_len: {
                "bias": torch.randn(HEADS, q_len, kv_len),
                "before": torch.randn(q_len, 1),
            },
        ),
        Case(
            "user_score",
            lambda t: dict(
                score=tilewise.UserScore(
                    steep_score,
                    (t["factors"], 0.5),
                    derivative=steep_derivative,
                    parameters={0: ("h", steep_by_factor)},
                )
            ),
            lambda *_: {"factors": torch.randn(HEADS)},
        ),
        Case("cosine", lambda t: dict(similarity="cosine", scale=3.0)),
        Case(
            "temperature",
            lambda t: dict(similarity=tilewise.Cosine(t["temperature"])),
            lambda *_: {"temperature": 1 + torch.rand(HEADS)},
        ),
        Case("scale", lambda t: dict(scale=t["scale"]), lambda *_: {"scale": torch.tensor(0.3)}),
        Case("sink", lambda t: dict(sink=t["sink"]), lambda *_: {"sink": torch.randn(HEADS)}),
        Case(
            "dropout",
            lambda t: dict(dropout_p=0.4, dropout_seed=t["seed"]),
            lambda *_: {"seed": integers(1 << 40, 1)},
        ),
    )
}


def inputs(case: Case, q_len: int, kv_len: int, device):
    head_dim, value_dim = case.dims
    shapes = ((HEADS, q_len, head_dim), (case.kv_heads, kv_len, head_dim), (case.kv_heads, kv_len, value_dim))
    q, k, v = (torch.randn(BATCH, *shape, device=device).requires_grad_() for shape in shapes)
    others = {name: x.to(device) for name, x in case.tensors(q_len, kv_len).items()}
    for x in others.values():
        x.requires_grad_(x.is_floating_point())
    return q, k, v, others


def assert_same_bits(compiled, eager, q, k, v, others) -> None:
    """out, lse and the gradients of all leaves, for random gradients of out and lse."""
    leaves = [q, k, v, *(x for x in others.values() if x.requires_grad)]
    want, got = eager(q, k, v, others), compiled(q, k, v, others)
    given = [torch.randn_like(x) for x in want]
    wanted = (*want, *torch.autograd.grad(want, leaves, given))
    found = (*got, *torch.autograd.grad(got, leaves, given))
    assert wanted[2].any()
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one, other)


def attend_by(case: Case):
    def attend(q, k, v, others):
        return tilewise.attention(q, k, v, **case.arguments(others), return_lse=True, impl="portable")

    return attend


# Those that CI also runs on the oldest PyTorch: each is a kind of argument that Dynamo treats in its own way.
OLDEST = ("documents", "user_mask", "user_score", "temperature", "dropout")
MARKED = [pytest.param(case, marks=[pytest.mark.oldest] * (name in OLDEST)) for name, case in CASES.items()]


@pytest.mark.in_turns
@pytest.mark.parametrize("case", MARKED, ids=CASES)
def test_same_bits_with_arguments_made_inside(case, device):
    attend = attend_by(case)
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_bits(compiled, attend, *inputs(case, *SIZES[0], device))


# The cases with tensors or numbers that follow a length, and one of each other kind.
DYNAMIC = (
    "plain",
    "window",
    "padding",
    "documents",
    "dense",
    "intervals",
    "relative",
    "bias",
    "cosine",
    "dropout",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_same_bits_with_dynamic_lengths(name, device):
    counter, attend = CompileCounterWithBackend("aot_eager"), attend_by(CASES[name])
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for sizes in SIZES:
        assert_same_bits(compiled, attend, *inputs(CASES[name], *sizes, device))
    assert counter.frame_count <= 2


OUTSIDE = (
    "window",
    "padding",
    "documents",
    "dense",
    "intervals",
    "user_mask",
    "alibi",
    "relative",
    "user_score",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_same_bits_with_arguments_made_outside(name, device):
    case = CASES[name]
    q, k, v, others = inputs(case, *SIZES[0], device)
    made = case.arguments(others)

    def attend(q, k, v, _):
        return tilewise.attention(q, k, v, **made, return_lse=True, impl="portable")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled, attend, q, k, v, others)


@pytest.mark.parametrize("name", ["plain", "user_score"])
def test_same_bits_from_inductor(name, device):
    attend = attend_by(CASES[name])
    assert_same_bits(torch.compile(attend, fullgraph=True), attend, *inputs(CASES[name], *SIZES[0], device))


@pytest.mark.oldest
def test_another_mask_of_the_same_kind_is_not_taken_for_the_first(device):
    """Functions, sides and numbers of a mask handed in must reach the kernel anew."""
    q, k, v, _ = inputs(CASES["plain"], *SIZES[0], device)
    attend = lambda mask: tilewise.attention(q, k, v, mask=mask, impl="portable")  # noqa: E731
    compiled = torch.compile(attend, backend="aot_eager")
    masks = [
        tilewise.UserMask(dilated_keep, (2,)),
        tilewise.UserMask(other_dilated_keep, (2,)),
        tilewise.UserMask(dilated_keep, (3,)),
        tilewise.Padding(3),
        tilewise.Padding(4),
        tilewise.Padding(4, side="left"),
        tilewise.Causal(),
        tilewise.Causal("top_left"),
    ]
    wanted = [attend(mask) for mask in masks]
    for mask, want in zip(masks, wanted, strict=True):
        assert torch.equal(compiled(mask), want)
    assert len({want.sum().item() for want in wanted}) == len(masks)


@pytest.mark.oldest
def test_one_tensor_as_query_key_and_value(device):
    """The gradient is the sum of three; torch 2.11 compiled a bare autograd.Function to a wrong one."""
    x = torch.randn(BATCH, HEADS, 6, 8, device=device, requires_grad=True)
    attend = lambda x: tilewise.attention(x, x, x, mask=tilewise.Causal(), impl="portable")  # noqa: E731
    do = torch.randn_like(x)
    (got,) = torch.autograd.grad(torch.compile(attend, fullgraph=True, backend="aot_eager")(x), x, do)
    q, k, v = (x.detach().clone().requires_grad_() for _ in range(3))
    out = tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="portable")
    parts = torch.stack(torch.autograd.grad(out, (q, k, v), do)).double()
    # Two additions round, each by half a unit in the last place of at most the sum of magnitudes.
    allowed = torch.finfo(torch.float32).eps * parts.abs().sum(0)
    assert ((got - parts.sum(0)).abs() <= allowed).all()


@pytest.mark.oldest
@pytest.mark.parametrize("of", ["out", "lse", "neither requires"])
def test_part_of_the_gradients(of, device):
    q, k, v, _ = inputs(CASES["plain"], *SIZES[0], device)
    attend = lambda q, k, v: tilewise.attention(q, k, v, return_lse=True, impl="portable")  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    if of == "neither requires":
        k.requires_grad_(False)
        v.requires_grad_(False)
    leaves = [x for x in (q, k, v) if x.requires_grad]
    i = int(of == "lse")
    want = torch.autograd.grad(attend(q, k, v)[i].sum(), leaves, allow_unused=True)
    got = torch.autograd.grad(compiled(q, k, v)[i].sum(), leaves, allow_unused=True)
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)


# ---- Lengths and recompilation


def test_at_most_two_graphs_for_twenty_lengths(device):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, v, lengths, left):
        mask = tilewise.Causal() & tilewise.Padding(lengths) & tilewise.Window(left, None)
        return tilewise.attention(q, k, v, mask=mask, impl="portable")

    for n in range(3, 23):
        x = torch.randn(1, 1, n, 4, device=device, requires_grad=True)
        lengths = torch.tensor([n - 1], device=device)
        out = attend(x * 1, x * 2, x * 3, lengths, n // 2)
        mask = tilewise.Causal() & tilewise.Padding(lengths) & tilewise.Window(n // 2, None)
        assert torch.equal(out, tilewise.attention(x * 1, x * 2, x * 3, mask=mask, impl="portable"))
        if n % 10 == 0:
            out.sum().backward()
            assert x.grad.any()
    assert counter.frame_count <= 2


def test_calls_in_between_do_not_recompile(device):
    """What other calls register is nothing that a graph depends on."""
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(1, 1, 4, 4, device=device)
    attend = torch.compile(
        lambda x: tilewise.attention(x, x, x, mask=tilewise.Causal(), impl="portable"), backend=counter
    )
    attend(x)
    with torch.no_grad():
        encode(tilewise.api.make_request(x, x, x, mask=tilewise.Window(1, 1), score=tilewise.Softcap(1.0)))
    attend(x)
    assert counter.frame_count == 1


# ---- Dropout


@pytest.mark.oldest
def test_unseeded_dropout_draws_anew_and_drops_the_right_share(device):
    """Scores of 0 and V = identity: out is the kept probabilities, and dV = outᵀ for dO = identity."""
    n, p = 64, 0.3
    q, k = torch.zeros(1, 4, n, 16, device=device), torch.zeros(1, 4, n, 16, device=device)
    v = torch.eye(n, device=device).expand(1, 4, n, n).clone().requires_grad_()
    attend = torch.compile(
        lambda q, k, v: tilewise.attention(q, k, v, dropout_p=p, impl="portable"),
        fullgraph=True,
        backend="aot_eager",
    )
    first, second = attend(q, k, v), attend(q, k, v)
    dropped = [(out == 0).double().mean().item() for out in (first, second)]
    deviation = math.sqrt(p * (1 - p) / first.numel())
    assert all(abs(share - p) < 5 * deviation for share in dropped)
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / first.numel())
    (dv,) = torch.autograd.grad(first, v, v.detach())
    assert torch.equal(dv.mT != 0, first != 0)
    torch.manual_seed(7)
    again = attend(q, k, v)
    torch.manual_seed(7)
    assert torch.equal(attend(q, k, v), again)


# ---- Modules


@pytest.mark.parametrize("cls", [SelfAttention, CrossAttention])
def test_modules(cls, device):
    module = cls(
        12, heads=2, kv_heads=1, out_projection=True, qk_norm="rms", sink=True, impl="portable",
        similarity=tilewise.Cosine(torch.nn.Parameter(torch.tensor([2.0, 3.0]))),
    ).to(device)  # fmt: skip
    given = [torch.randn(1, n, 12, device=device) for n in ((5,) if cls is SelfAttention else (5, 7))]
    want, parameters = module(*given, mask=tilewise.Causal()), list(module.parameters())
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(*given, mask=tilewise.Causal())
    do = torch.randn_like(want)
    wanted, found = (torch.autograd.grad(out, parameters, do) for out in (want, got))
    assert torch.equal(want, got)
    for (name, _), one, other in zip(module.named_parameters(), wanted, found, strict=True):
        assert one.any(), name
        # aot_eager decomposes the norms, so that the bits of what passes through them may differ.
        bound = 64 * torch.finfo(torch.float32).eps * one.abs().max()
        assert (one - other).abs().max() <= bound, name


# ---- Autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_autocast(inside, dtype, device):
    case = CASES["bias"]
    attend = attend_by(case)

    def under_autocast(run):
        def call(*given):
            with torch.autocast(device.type, dtype):
                return run(*given)

        return call

    to_compile = under_autocast(attend) if inside else attend
    compiled = torch.compile(to_compile, fullgraph=True, backend="aot_eager")
    compiled = compiled if inside else under_autocast(compiled)
    given = inputs(case, *SIZES[0], device)
    assert compiled(*given)[0].dtype == dtype
    assert_same_bits(compiled, under_autocast(attend), *given)
