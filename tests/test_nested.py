"""Jagged nested tensors: each sequence gets what it would get alone, forward and backward."""

import pytest
import torch

import tilewise
from harness.oracle import check
from tilewise import ALiBi, Causal, Padding, RelativePosition, Softcap, Window
from tilewise.nn import SelfAttention
from tilewise.pytorch.nested import pack

pytestmark = pytest.mark.oldest
LENGTHS, KV_LENGTHS = (5, 0, 17, 1), (3, 2, 20, 0)
Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


def offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def rows(heads: int, dim: int, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(sum(lengths), heads, dim, device=device, requires_grad=True)


def jagged(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[rows, heads, dim] as [batch, heads, *, dim]."""
    return torch.nested.nested_tensor_from_jagged(values, starts).transpose(1, 2)


def one_by_one(q, k, v, lengths, kv_lengths, **arguments):
    """What each sequence gives alone, as rows [rows, heads, dim] and [rows, heads]."""
    outs, lses = [], []
    for q_one, k_one, v_one in zip(q.split(lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True):
        alone = [x.transpose(0, 1)[None] for x in (q_one, k_one, v_one)]
        out, lse = tilewise.attention(*alone, **arguments, return_lse=True, impl="portable")
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Other tiles, so other roundings: those of sums of up to 20 numbers of size 1."""
    torch.testing.assert_close(got, want, rtol=0, atol=64 * 2.0**-23 * max(1.0, want.abs().max().item()))


ALIKE = {
    "plain": lambda d: {},
    "causal": lambda d: dict(mask=Causal()),
    "window": lambda d: dict(mask=Window(4, 1) & Causal()),
    "scores": lambda d: dict(
        score=[ALiBi(torch.rand(Q_HEADS, device=d)), RelativePosition(torch.randn(Q_HEADS, 8, device=d), 6)]
    ),
    "softcap, sink": lambda d: dict(score=Softcap(2.0), sink=torch.randn(Q_HEADS, device=d)),
    "cosine": lambda d: dict(similarity="cosine", scale=3.0),
}


@pytest.mark.parametrize("name", ALIKE)
def test_sequences_of_one_packing(name, device):
    q, k, v = (rows(h, d, LENGTHS, device) for h, d in ((4, DIM), (2, DIM), (2, VALUE_DIM)))
    starts, arguments = offsets(LENGTHS, device), ALIKE[name](device)
    nested = [jagged(x, starts) for x in (q, k, v)]
    out, lse = tilewise.attention(*nested, **arguments, return_lse=True, impl="portable")
    assert out.is_nested and out.shape[:2] == (len(LENGTHS), Q_HEADS) and out.shape[3] == VALUE_DIM
    assert (out + jagged(torch.zeros(23, Q_HEADS, VALUE_DIM, device=device), starts)).is_nested
    got = out.transpose(1, 2).values(), lse.transpose(1, 2).values()
    want = one_by_one(q, k, v, LENGTHS, LENGTHS, **arguments)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    weights = [torch.randn_like(x) for x in want]
    got_grads = torch.autograd.grad(got, (q, k, v), weights)
    for a, b in zip(got_grads, torch.autograd.grad(want, (q, k, v), weights), strict=True):
        assert_close(a, b)


def test_queries_and_keys_of_different_lengths(device):
    q = rows(Q_HEADS, DIM, LENGTHS, device)
    k, v = (rows(KV_HEADS, DIM, KV_LENGTHS, device) for _ in range(2))
    kv_starts = offsets(KV_LENGTHS, device)
    nested = jagged(q, offsets(LENGTHS, device)), jagged(k, kv_starts), jagged(v, kv_starts)
    out = tilewise.attention(*nested, score=Softcap(3.0), impl="portable")
    want, _ = one_by_one(q, k, v, LENGTHS, KV_LENGTHS, score=Softcap(3.0))
    assert_close(out.transpose(1, 2).values(), want)
    assert (want[-1] == 0).all(), "the last sequence has a query and no key"
    with pytest.raises(NotImplementedError, match="Causal with nested tensors is not built"):
        tilewise.attention(*nested, mask=Causal())


def test_rows_behind_the_last_sequence_see_nothing(device):
    """A buffer may be longer than what is packed in it, and hold NaN there."""
    values = torch.randn(30, 2, DIM, device=device)
    values[23:] = torch.nan
    nested = jagged(values, offsets(LENGTHS, device))
    out = tilewise.attention(nested, nested, nested, impl="portable").transpose(1, 2).values()
    assert out.isfinite().all() and (out[23:] == 0).all() and (out[:23] != 0).all()


def test_the_mask_of_packed_sequences_is_right(device):
    """The packed call against the oracle, with the sanitizer's eyes on nothing but the numbers."""
    starts = offsets(LENGTHS, device)
    q, k, v = (x.detach() for x in (rows(2, DIM, LENGTHS, device) for _ in range(3)))
    packed = pack(*(jagged(x, starts) for x in (q, k, v)), mask=Causal())
    check(packed.q, packed.k, packed.v, mask=packed.mask)


def test_a_module_takes_nested_input(device):
    module = SelfAttention(32, heads=4, kv_heads=2, out_projection=True, device=device)
    x = torch.randn(23, 32, device=device)
    nested = torch.nested.nested_tensor_from_jagged(x, offsets(LENGTHS, device))
    got = module(nested, mask=Causal())
    want = torch.cat([module(one, mask=Causal()) for one in x.split(LENGTHS) if len(one)])
    assert_close(got.values(), want)


MISTAKES = {
    "one is not nested": (ValueError, "k has layout", lambda n, d: (n, d, n, {})),
    "mask": (NotImplementedError, "Padding", lambda n, d: (n, n, n, dict(mask=Padding(3)))),
    "bias": (NotImplementedError, "bias with nested", lambda n, d: (n, n, n, dict(bias=torch.zeros(1)))),
    "not transposed": (ValueError, "transpose", lambda n, d: (n.transpose(1, 2),) * 3 + ({},)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_built_says_so(name, device):
    error, words, change = MISTAKES[name]
    nested = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS, device))
    q, k, v, arguments = change(nested, torch.randn(4, 2, 5, DIM, device=device))
    with pytest.raises(error, match=words) as raised:
        tilewise.attention(q, k, v, **arguments)
    assert tilewise.why_not(q, k, v, **arguments) == [str(raised.value)]


def test_all_that_is_not_built_is_listed_beside_what_is_wrong(device):
    nested = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS, device))
    arguments = dict(
        mask=Causal() & Padding(3), bias=torch.zeros(1, device=device), sink=torch.zeros(3), impl="x"
    )
    unbuilt, *others = tilewise.why_not(nested, nested, nested, **arguments)
    assert unbuilt.startswith("bias and Padding with nested tensors is not built")
    assert [reason.split("=")[0] for reason in others] == ["sink", "impl"]


def test_equal_offsets_that_are_not_one_tensor_are_named(device):
    """Two packings are one by identity: values are read only to say what went wrong."""
    first, second = offsets(LENGTHS, device), offsets(LENGTHS, device)
    x, y = (jagged(torch.randn(23, 2, DIM, device=device), starts) for starts in (first, second))
    other = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS[::-1], device))
    fewer = jagged(torch.randn(23, 2, DIM, device=device), offsets([20, 3], device))
    cases = [
        (x, x, y, {}, ValueError, r"equal in value, .*: make v with .*jagged\(values, k.offsets\(\)\)"),
        (x, y, y, dict(mask=Causal()), NotImplementedError, r"equal in value, .*: make k with .*q\.offsets"),
        (x, fewer, fewer, {}, ValueError, f"batch sizes q: {len(LENGTHS)}, k: 2, v: 2 must be equal"),
        (x, x, other, {}, ValueError, r"must have the same offsets: make v with .*k\.offsets"),
        (x, other, other, dict(mask=Causal()), NotImplementedError, "in q and k take Softcap$"),
    ]
    for q, k, v, arguments, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            tilewise.attention(q, k, v, **arguments)
        assert tilewise.why_not(q, k, v, **arguments) == [str(raised.value)]


def test_why_not_finds_nothing_wrong(device):
    nested = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS, device))
    assert tilewise.why_not(nested, nested, nested, mask=Causal()) == []
    assert "sink=(3,)" in tilewise.why_not(nested, nested, nested, sink=torch.zeros(3, device=device))[0]
