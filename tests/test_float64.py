"""float64 is computed in float64, in plain PyTorch, on every device and whatever else a call has.

How far a result may be from that of other arithmetic in float64 is `allowed`: the textbook bound on sums.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_plain_blocks import CASES
from test_torch_path import BATCH, DIM, KV_HEADS, KV_LEN, Q_HEADS, Q_LEN, VALUE_DIM, loss_of

import tilewise
import tilewise_reference
from harness.interpreted import set_interpreted
from tilewise.plan.request import make_request
from tilewise.pytorch import plain
from tilewise.pytorch.plain import oracle_arguments

D = torch.float64
U = 2.0**-53  # half a unit in the last place
Tensor = torch.Tensor


def leaf(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=D, requires_grad=True)


def qkv() -> list[Tensor]:
    sizes = (Q_HEADS, Q_LEN, DIM), (KV_HEADS, KV_LEN, DIM), (KV_HEADS, KV_LEN, VALUE_DIM)
    return [leaf(BATCH, *each) for each in sizes]


def widened(part: Any, leaves: dict[int, Tensor]) -> Any:
    """A case's argument with its float tensors in float64; those that are trained are noted."""
    if isinstance(part, Tensor) and part.is_floating_point():
        return leaves.setdefault(id(part), part.detach().double().requires_grad_(part.requires_grad))
    if isinstance(part, (list, tuple)):
        found = [widened(each, leaves) for each in part]
        return type(part)(*found) if hasattr(part, "_fields") else type(part)(found)
    if isinstance(part, tilewise.Score):
        for name, value in vars(part).items():
            setattr(part, name, widened(value, leaves))
    return part


def in_double(name: str) -> tuple[dict[str, Any], list[Tensor]]:
    arguments, parameters = CASES[name](torch.device("cpu"))
    leaves: dict[int, Tensor] = {}
    arguments = {key: widened(value, leaves) for key, value in arguments.items()}
    trained = [x for x in leaves.values() if x.requires_grad]
    assert len(trained) == len(parameters)
    return arguments, trained


def allowed(q: Tensor, k: Tensor, want: Tensor) -> float:
    """As in `test_torch_path`, for float64: sums over dims, keys and, for parameters, all pairs; and exp, by
    which an error in a score becomes relative. Twice, for both sides round."""
    largest = (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    pairs = BATCH * Q_HEADS * Q_LEN * KV_LEN
    return 2 * U * (2 * DIM * largest + 2 * KV_LEN + pairs**0.5) * max(1, want.abs().max().item())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [2, Q_LEN])
def test_every_feature(name, rows, monkeypatch):
    """out, lse and every gradient, in one block and in several; nothing on the way was fp32, for that would
    leave errors of 2⁻²⁴."""
    monkeypatch.setattr(plain, "BLOCK", BATCH * Q_HEADS * KV_LEN * rows)
    arguments, trained = in_double(name)
    q, k, v = qkv()
    leaves = [q, k, v, *trained]
    got = tilewise.attention(q, k, v, **arguments, return_lse=True)
    exact = oracle_arguments(make_request(q, k, v, **arguments))
    want = tilewise_reference.attention(q, k, v, **exact, return_lse=True)
    gradients = (torch.autograd.grad(loss_of(*x), leaves) for x in (got, want))
    for x, y in zip((*got, *next(gradients)), (*want, *next(gradients)), strict=True):
        assert x.dtype == D and torch.equal(x.isfinite(), y.isfinite())
        error = (x - y)[y.isfinite()].abs().max().item()
        assert error <= allowed(q, k, y[y.isfinite()]), error


@pytest.mark.parametrize("causal", [False, True])
def test_beside_pytorchs_own(causal):
    """Of its math path, where the fused kernel answers here; and the kernel's own result is what we give."""
    q, k, v = (leaf(1, 2, 40, DIM) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    got = tilewise.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert got.dtype == D and (got - want).abs().max() <= 40 * allowed(q, k, want) / KV_LEN


def whole_model(x: Tensor, bias: Tensor) -> Tensor:
    attend = lambda q, **given: tilewise.attention(q, q, q, **given, return_lse=True)  # noqa: E731
    seed = torch.tensor([3])
    hidden, lse = attend(x, bias=bias, mask=tilewise.Window(2, 1), dropout_p=0.3, dropout_seed=seed)
    return attend(hidden + lse[..., None].sin(), mask=tilewise.Causal())[0]


def test_gradcheck_of_a_whole_model(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK", 1 * 2 * 4 * 2)
    given = leaf(1, 2, 4, 2), leaf(4, 4)
    assert torch.autograd.gradcheck(whole_model, given)
    assert torch.autograd.gradgradcheck(whole_model, given)


def of_everything(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, temperature: Tensor, sink: Tensor) -> Any:
    """A row with no key, a key that nobody sees."""
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[0], keep[:, 2] = False, False
    return tilewise.attention(
        q, k, v, mask=keep, score=[tilewise.ALiBi(slopes), tilewise.Softcap(2.0)], sink=sink,
        similarity=tilewise.Cosine(temperature), return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_and_forward_mode(causal):
    """Of a call with most features, and of one that PyTorch's own kernel answers."""
    if causal:
        given = leaf(1, 2, 3, 2), leaf(1, 2, 3, 2), leaf(1, 2, 3, 2)
        attend = lambda q, k, v: tilewise.attention(q, k, v, mask=tilewise.Causal())  # noqa: E731
    else:
        given = leaf(1, 2, 3, 2), leaf(1, 1, 4, 2), leaf(1, 1, 4, 3), leaf(2), leaf(2), leaf(2)
        attend = of_everything
    assert torch.autograd.gradcheck(attend, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, given)


def test_packed_jagged_and_cached():
    q, k, v = (leaf(12, 2, DIM) for _ in range(3))
    starts = torch.tensor([0, 5, 5, 12])
    given: dict[str, Any] = dict(mask=tilewise.Causal(), score=tilewise.Softcap(3.0))
    out, lse = tilewise.packed_attention(q, k, v, q_offsets=starts, **given, return_lse=True)
    alone = [x[5:].transpose(0, 1)[None] for x in (q, k, v)]
    want, want_lse = tilewise.attention(*alone, **given, return_lse=True)
    assert out.dtype == lse.dtype == D
    assert torch.equal(out[5:], want[0].transpose(0, 1)) and torch.equal(lse[:, 5:], want_lse[0])

    jagged = [torch.nested.nested_tensor_from_jagged(x, starts).transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(tilewise.attention(*jagged, **given).transpose(1, 2).values(), out)

    table = tilewise.nn.Rotary(DIM).table(9, dtype=D)
    cache_k, cache_v = torch.zeros(2, 1, 2, 9, DIM, dtype=D).unbind(0)
    rows = [x.detach() for x in alone]
    decoded = tilewise.cached_attention(
        rows[0],
        cache_k,
        cache_v,
        kv_lens=torch.tensor([0]),
        new_k=rows[1],
        new_v=rows[2],
        rotary=table,
        **given,
    )
    turned = tilewise.nn.Rotary(DIM)(*rows[:2])
    want = tilewise.attention(*turned, rows[2], **given)
    assert decoded.dtype == D and (decoded - want).abs().max() <= 2 * allowed(*turned, want)
    with pytest.raises(ValueError, match="rotary is in torch"):
        tilewise.cached_attention(
            rows[0], cache_k, cache_v, kv_lens=torch.tensor([0]), rotary=tilewise.nn.Rotary(DIM).table(9)
        )


def test_no_sequence_at_all():
    out, lse = tilewise.cached_attention(
        *(torch.randn(0, 2, n, DIM, dtype=D) for n in (1, 4, 4)), kv_lens=torch.empty(0, dtype=torch.int64),
        return_lse=True,
    )  # fmt: skip
    assert out.shape == (0, 2, 1, DIM) and out.dtype == lse.dtype == D


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    starts = torch.tensor([0, 3, 7])
    score = tilewise.Softcap(3.0)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        packed = tilewise.packed_attention(
            *(x[0].transpose(0, 1) for x in (q, k, v)), q_offsets=starts, score=score, return_lse=True
        )
        assert packed[1].dtype == D, "what the tracer takes it for"
        return (*packed, *tilewise.attention(q, k, v, score=score, return_lse=True))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    given = [leaf(1, 2, 7, DIM) for _ in range(3)]
    got, want = compiled(*given), step(*given)
    assert all(x.dtype == D for x in got)
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= allowed(given[0], given[1], y)
    got, want = (torch.autograd.grad(sum(x.sin().sum() for x in each), given) for each in (got, want))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == D and (x - y).abs().max() <= allowed(given[0], given[1], y)


@pytest.mark.parametrize("interpreted", [False, True])
def test_who_answers(interpreted, monkeypatch):
    """Plain PyTorch, in the interpreter and for meta tensors too; a kernel that is asked for says that it
    cannot."""
    set_interpreted(monkeypatch, interpreted)
    q = torch.randn(1, 2, 5, DIM, dtype=D)
    got = tilewise.attention(q, q, q, return_lse=True)
    want = tilewise_reference.attention(q, q, q, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == D and (x - y).abs().max() <= allowed(q, q, y)
    out, lse = tilewise.attention(*[q.to("meta")] * 3, mask=tilewise.Causal(), return_lse=True)
    assert out.is_meta and out.dtype == lse.dtype == D
    for impl in ("portable", "hopper"):
        with pytest.raises(ValueError, match=f"q.dtype=torch.float64, and impl='{impl}' takes"):
            tilewise.attention(q, q, q, impl=impl)


def test_autocast_leaves_it_alone():
    q = torch.randn(1, 2, 5, DIM, dtype=D)
    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = (f(q, q, q) for f in (tilewise.attention, F.scaled_dot_product_attention))
    assert got.dtype == theirs.dtype == D and torch.equal(got, tilewise.attention(q, q, q))


@pytest.mark.parametrize("name", ["bias", "sink", "scale", "slopes", "table", "temperature"])
def test_what_scores_are_made_of_may_be_float64_only_where_q_is(name):
    x = torch.ones({"bias": (5, 5), "scale": (), "table": (2, 32)}.get(name, (2,)), dtype=D)
    made = {
        "slopes": lambda: dict(score=tilewise.ALiBi(x)),
        "table": lambda: dict(score=tilewise.RelativePosition(x)),
        "temperature": lambda: dict(similarity=tilewise.Cosine(x)),
    }.get(name, lambda: {name: x})()
    q = torch.randn(1, 2, 5, DIM, dtype=D)
    assert tilewise.attention(q, q, q, **made).isfinite().all()
    with pytest.raises(ValueError, match=f"{name}.dtype=torch.float64 goes with q, k and v"):
        tilewise.attention(*[q.float()] * 3, **made)


def test_numbers_that_fp32_has_not():
    q = torch.full((1, 1, 2, 1), 1e-150, dtype=D)
    got = tilewise.attention(q, q, torch.tensor([1.0, 3.0], dtype=D).reshape(1, 1, 2, 1), scale=1e300)
    assert (got == 2).all()  # scores of 1 each; in fp32 the scale is infinite and q is 0


def test_modules():
    layer = tilewise.nn.SelfAttention(8, heads=2, rotary=tilewise.nn.Rotary(4), sink=True, dtype=D)
    x = leaf(1, 5, 8)
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=tilewise.Causal()), (x,))
    out = tilewise.compat.flash_attn.flash_attn_func(*(leaf(1, 5, 2, DIM) for _ in range(3)), causal=True)
    assert out.dtype == D
