"""attention(..., strict=True) refuses whatever needs memory quadratic in length, and nothing else."""

from __future__ import annotations

import pytest
import torch
import triton

import tilewise
from harness.interpreted import set_interpreted
from tilewise.plan import checks
from tilewise.plan.request import make_request

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 2, 5, 7, 8


@triton.jit
def all_pairs(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx >= 0)


@triton.jit
def unchanged(s, batch, head, q_idx, kv_idx, args):
    return s * 1.0


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run."""
    with device:
        yield


def qkv(q_len: int = Q_LEN, kv_len: int = KV_LEN) -> list[torch.Tensor]:
    k, v = (torch.randn(BATCH, KV_HEADS, kv_len, DIM) for _ in range(2))
    return [torch.randn(BATCH, Q_HEADS, q_len, DIM), k, v]


def ones(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(sizes, dtype=dtype)


BOOL = dict(dtype=torch.bool)
SHAPE = (BATCH, Q_HEADS, Q_LEN, KV_LEN)
COMPUTED_MASK = ("Causal", "Intervals", "UserMask", "leave strict out")
COMPUTED_SCORE = ("ALiBi", "RelativePosition", "UserScore", "broadcasts", "leave strict out")
REFUSED = {
    "bool mask": (
        lambda: dict(mask=ones(Q_LEN, KV_LEN, **BOOL)),
        ("and mask.shape=(5, 7)", "0.0 MiB", *COMPUTED_MASK),
    ),
    "bool mask beside a structured one": (
        lambda: dict(mask=tilewise.Causal() & ones(*SHAPE, **BOOL)),
        ("and mask.shape=(2, 4, 5, 7)",),
    ),
    "bias": (lambda: dict(bias=ones(1, 1, Q_LEN, KV_LEN)), ("Bias.bias.shape=(1, 1, 5, 7)", *COMPUTED_SCORE)),
    "bias of another modifier": (
        lambda: dict(score=[tilewise.Softcap(3.0), tilewise.Bias(ones(Q_LEN, KV_LEN))]),
        ("Bias.bias",),
    ),
    "transposed bias": (lambda: dict(bias=ones(KV_LEN, Q_LEN).T), ("Bias.bias.shape=(5, 7)",)),
    "bias of expanded heads": (
        lambda: dict(bias=ones(1, 1, Q_LEN, KV_LEN).expand(SHAPE)),
        ("Bias.bias.shape=(2, 4, 5, 7)",),
    ),
    "tensor of a user's score": (
        lambda: dict(score=tilewise.UserScore(unchanged, (3, (ones(KV_LEN, 3, Q_LEN), 1.0)))),
        ("UserScore.args[1][0].shape=(7, 3, 5)", "UserScore"),
    ),
    "flat tensor of a user's mask": (
        lambda: dict(mask=tilewise.UserMask(all_pairs, (ones(Q_LEN * KV_LEN),))),
        ("UserMask.args[0].shape=(35,)", "Causal"),
    ),
}
ALLOWED = {
    "nothing": lambda: dict(),
    "structured masks": lambda: dict(
        mask=tilewise.Causal("bottom_right")
        & tilewise.Window(3, 0, "bottom_right")
        & tilewise.Padding(torch.tensor([7, 3]))
        & tilewise.Intervals(torch.zeros(BATCH, Q_HEADS, Q_LEN, dtype=torch.int32), torch.full((Q_LEN,), 6))
    ),
    "documents": lambda: dict(mask=tilewise.Documents(torch.arange(Q_LEN) // 3, torch.arange(KV_LEN) // 3)),
    "key padding as a bool mask": lambda: dict(mask=ones(BATCH, 1, 1, KV_LEN, **BOOL)),
    "bias a key": lambda: dict(bias=ones(Q_HEADS, 1, KV_LEN)),
    "bias a row": lambda: dict(bias=ones(Q_LEN, 1)),
    "expanded bias": lambda: dict(bias=ones(Q_HEADS, 1, KV_LEN).expand(SHAPE)),
    "expanded bool mask": lambda: dict(mask=ones(1, 1, Q_LEN, 1, **BOOL).expand(SHAPE)),
    "ALiBi": lambda: dict(score=tilewise.ALiBi(tilewise.alibi_slopes(Q_HEADS))),
    "relative position": lambda: dict(score=tilewise.RelativePosition(ones(Q_HEADS, 32))),
    "tensors of a user's functions": lambda: dict(
        score=tilewise.UserScore(unchanged, (ones(Q_HEADS), ones(Q_LEN, 3), ones(KV_LEN))),
        mask=tilewise.UserMask(all_pairs, (ones(Q_LEN, 1).expand(Q_LEN, KV_LEN),)),
    ),
    "sink, scale, dropout": lambda: dict(sink=ones(Q_HEADS), scale=torch.tensor(0.5), dropout_p=0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_every_pair_is_refused(name, monkeypatch):
    monkeypatch.setattr(
        "tilewise.plan.passes.launch_forward", lambda *_: pytest.fail("a refused call was run")
    )
    make, words = REFUSED[name]
    arguments = make() | dict(impl="portable")
    tensors = qkv()
    (reason,) = tilewise.why_not(*tensors, **arguments, strict=True)
    for word in ("strict=True", "every pair", *words):
        assert word in reason
    with pytest.raises(ValueError) as raised:
        tilewise.attention(*tensors, **arguments, strict=True)
    assert str(raised.value) == reason
    assert tilewise.why_not(*tensors, **arguments) == []


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_linear_in_length_is_not(name):
    tensors = qkv()
    assert tilewise.why_not(*tensors, **ALLOWED[name](), impl="portable", strict=True) == []


def test_strict_changes_no_result():
    tensors = qkv()
    loose = tilewise.attention(*tensors, mask=tilewise.Causal(), impl="portable")
    assert torch.equal(
        tilewise.attention(*tensors, mask=tilewise.Causal(), impl="portable", strict=True), loose
    )


@pytest.mark.parametrize("q_len, kv_len", [(1, KV_LEN), (Q_LEN, 1), (0, KV_LEN), (Q_LEN, 0)])
def test_one_query_or_one_key_makes_everything_linear(q_len, kv_len):
    tensors = qkv(q_len, kv_len)
    arguments = dict(
        mask=ones(q_len, kv_len, **BOOL) & ones(q_len, kv_len, **BOOL),
        bias=ones(q_len, kv_len),
        score=tilewise.UserScore(unchanged, (ones(q_len, kv_len),)),
    )
    assert tilewise.why_not(*tensors, **arguments, impl="portable", strict=True) == []


def test_a_square_needs_two_dimensions():
    """With q_len = kv_len, a tensor with one dimension of that size is a number a row."""
    tensors = qkv(6, 6)
    for sizes, refused in (((6,), False), ((6, 4), False), ((6, 4, 6), True), ((1, 36), True)):
        score = tilewise.UserScore(unchanged, (ones(*sizes),))
        reasons = tilewise.why_not(*tensors, score=score, impl="portable", strict=True)
        assert bool(reasons) == refused, sizes


@pytest.mark.parametrize("impl", ["torch", None])
def test_plain_pytorch_is_linear(impl, monkeypatch):
    """It computes a block at a time, forward and backward; stored pairs are refused there too."""
    set_interpreted(monkeypatch, False)
    tensors = [x.cpu().requires_grad_() for x in qkv()]
    assert tilewise.why_not(*tensors, mask=tilewise.Causal(), impl=impl, strict=True) == []
    assert tilewise.attention(*tensors, sink=ones(Q_HEADS).cpu(), impl=impl, strict=True).requires_grad
    (reason,) = tilewise.why_not(*tensors, bias=ones(Q_LEN, KV_LEN).cpu(), impl=impl, strict=True)
    assert "Bias.bias.shape=(5, 7)" in reason


WATCHED = ("strict=True", "function transform", "impl='torch'", "(2, 4, 5, 7) in torch.float32", "0.0 MiB")


def test_plain_pytorch_is_refused_where_it_is_watched():
    """By a function transform, which keeps every step for the backward, though the same call has passed."""
    q, k, v = qkv()
    attend = lambda q: tilewise.attention(q, k, v, impl="torch", strict=True).sum()  # noqa: E731
    attend(q.clone().requires_grad_())
    with pytest.raises(ValueError) as raised:
        torch.func.grad(attend)(q)
    for word in WATCHED:
        assert word in str(raised.value)


def test_plain_pytorch_is_refused_in_a_graph():
    torch._dynamo.reset()
    packed = [x[0].transpose(0, 1) for x in qkv(6, 6)]
    starts = torch.tensor([0, 4, 6])
    with pytest.raises(Exception, match="strict=True, and under torch"):
        torch.compile(tilewise.attention, fullgraph=True, backend="eager")(*qkv(), impl="torch", strict=True)
    attend = torch.compile(tilewise.packed_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="of each of 2 packed sequences, of 6 and 6 tokens"):
        attend(*packed, q_offsets=starts, impl="torch", strict=True)


def test_sizes_are_told_in_mebibytes():
    q = torch.empty(1, 16, 4096, 64, device="meta", dtype=torch.bfloat16)
    bias = torch.empty(1, 16, 4096, 4096, device="meta", dtype=torch.bfloat16)
    (reason,) = tilewise.why_not(q, q, q, bias=bias.expand(1, 16, 4096, 4096), strict=True)
    assert "512.0 MiB" in reason
    (reason,) = tilewise.why_not(q, q, q, bias=bias[:, :1].expand(1, 16, 4096, 4096), strict=True)
    assert "32.0 MiB" in reason


def test_strides_of_what_passed_are_remembered():
    """An expanded bias passes; a stored one of the same shape is judged again; so is a call made strict."""
    tensors = qkv()
    stored = ones(*SHAPE)
    expanded = ones(1, 1, 1, KV_LEN).expand(SHAPE)
    checks.check(make_request(*tensors, bias=expanded, impl="portable", strict=True))
    checks.check(make_request(*tensors, bias=stored, impl="portable"))
    with pytest.raises(ValueError, match="strict"):
        checks.check(make_request(*tensors, bias=stored, impl="portable", strict=True))


def test_nested_tensors_are_linear():
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for impl in (None, "torch"):
        assert tilewise.why_not(q, q, q, mask=tilewise.Causal(), impl=impl, strict=True) == []
        assert tilewise.attention(q, q, q, impl=impl, strict=True).is_nested
        with pytest.raises(ValueError, match="every pair"):
            tilewise.attention(q, q, q, mask=ones(5, 5, **BOOL), impl=impl, strict=True)


def test_strict_under_torch_compile():
    torch._dynamo.reset()
    attend = torch.compile(tilewise.attention, fullgraph=True, backend="eager")
    tensors = qkv()
    arguments = dict(mask=tilewise.Causal(), impl="portable", strict=True)
    torch.testing.assert_close(attend(*tensors, **arguments), tilewise.attention(*tensors, **arguments))
    with pytest.raises(Exception, match="holds a number for every pair"):
        attend(*tensors, bias=ones(Q_LEN, KV_LEN), impl="portable", strict=True)
