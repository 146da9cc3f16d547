"""Jagged nested tensors: each sequence gets what it would get alone, forward and backward, and nothing of
another."""

import pytest
import torch
from torch import nn

import tilewise
from harness.features import (
    block_interval,
    block_keep,
    block_keep_twin,
    checkered_by_offset,
    checkered_derivative,
    checkered_score,
    checkered_score_twin,
    dilated_keep,
    dilated_keep_twin,
)
from tilewise import ALiBi, Bias, Causal, Padding, Prefix, RelativePosition, Softcap, UserMask, Window
from tilewise.nn import SelfAttention

LENGTHS, KV_LENGTHS = (5, 0, 17, 1), (3, 2, 20, 0)
LONGEST = max(LENGTHS)
Q_HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


def offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def jagged(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[rows, heads, dim] as [batch, heads, *, dim]."""
    return torch.nested.nested_tensor_from_jagged(values, starts).transpose(1, 2)


def rows_of(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).values()


def tensors(device, lengths=LENGTHS, kv_lengths=LENGTHS) -> list[torch.Tensor]:
    """The rows of q, k and v, which require gradients."""
    sizes = [(lengths, Q_HEADS, DIM), (kv_lengths, KV_HEADS, DIM), (kv_lengths, KV_HEADS, VALUE_DIM)]
    return [torch.randn(sum(n), h, d, device=device, requires_grad=True) for n, h, d in sizes]


def as_nested(rows: list, device, lengths=LENGTHS, kv_lengths=LENGTHS) -> list[torch.Tensor]:
    """q, k and v; one packing for all three where the lengths are the same."""
    starts = offsets(lengths, device)
    kv_starts = starts if kv_lengths is lengths else offsets(kv_lengths, device)
    return [jagged(x, s) for x, s in zip(rows, (starts, kv_starts, kv_starts), strict=True)]


def one_by_one(rows, lengths, kv_lengths, arguments_of):
    """What each sequence gives alone, of plain PyTorch, as rows [rows, heads, dim] and [rows, heads]."""
    outs, lses = [], []
    parts = (x.split(n) for x, n in zip(rows, (lengths, kv_lengths, kv_lengths), strict=True))
    for b, one in enumerate(zip(*parts, strict=True)):
        alone = [x.transpose(0, 1)[None] for x in one]
        out, lse = tilewise.attention(*alone, **arguments_of(b), return_lse=True, impl="torch")
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Other tiles, so other roundings: those of sums of up to 20 numbers of size 1."""
    torch.testing.assert_close(got, want, rtol=0, atol=64 * 2.0**-23 * max(1.0, want.abs().max().item()))


# ---- Every mask and score: the arguments of sequence b alone, and of all of them if b is None


class Of:
    """What an argument is of sequence b: made once, and then cut to it."""

    def __init__(self, device, lengths=LENGTHS, kv_lengths=KV_LENGTHS) -> None:
        self.device, self.lengths, self.kv_lengths = device, lengths, kv_lengths
        self.q_len, self.kv_len = max(lengths), max(kv_lengths)
        generator = torch.Generator().manual_seed(1)
        self.numbers = torch.rand(len(lengths), Q_HEADS, self.q_len, self.kv_len, generator=generator)
        self.bias = (self.numbers - 0.5).to(device).requires_grad_()
        self.slopes = torch.rand(Q_HEADS, generator=generator).to(device).requires_grad_()
        self.table = torch.randn(Q_HEADS, 8, generator=generator).to(device).requires_grad_()
        self.sink = torch.randn(Q_HEADS, generator=generator).to(device).requires_grad_()

    def each(self, numbers: list[int], b: int | None) -> torch.Tensor:
        """A number a sequence."""
        return torch.tensor(numbers if b is None else numbers[b : b + 1], device=self.device)

    def pairs(self, tensor: torch.Tensor, b: int | None) -> torch.Tensor:
        """[batch, heads, longest, longest keys]."""
        return tensor if b is None else tensor[b : b + 1, :, : self.lengths[b], : self.kv_lengths[b]]

    def rows(self, b: int | None) -> torch.Tensor:
        return torch.arange(self.q_len if b is None else self.lengths[b], device=self.device)

    def keys(self, b: int | None) -> torch.Tensor:
        return torch.arange(self.kv_len if b is None else self.kv_lengths[b], device=self.device)


ARGUMENTS = {
    "plain": lambda of, b: {},
    "Causal": lambda of, b: dict(mask=Causal()),
    "Causal, top left": lambda of, b: dict(mask=Causal("top_left")),
    "Window": lambda of, b: dict(mask=Window(4, 1)),
    "Window & Causal": lambda of, b: dict(mask=Window(9, None) & Causal()),
    "Prefix": lambda of, b: dict(mask=Prefix(of.each([1, 2, 6, 0], b))),
    "Padding": lambda of, b: dict(mask=Padding(of.each([3, 1, 18, 0], b))),
    "Padding, left": lambda of, b: dict(mask=Padding(of.each([2, 0, 11, 0], b), side="left")),
    "Documents": lambda of, b: dict(mask=tilewise.Documents(of.rows(b) // 4, of.keys(b) // 5)),
    "Intervals": lambda of, b: dict(mask=tilewise.Intervals(of.rows(b) // 2, of.rows(b) + 3)),
    "a bool mask": lambda of, b: dict(mask=of.pairs(of.numbers.to(of.device) > 0.4, b)),
    "UserMask": lambda of, b: dict(mask=UserMask(dilated_keep, (3,), twin=dilated_keep_twin) & Causal()),
    "UserMask, interval": lambda of, b: dict(
        mask=UserMask(block_keep, (7,), interval=block_interval, twin=block_keep_twin)
    ),
    "Softcap": lambda of, b: dict(score=Softcap(2.0)),
    "ALiBi": lambda of, b: dict(score=ALiBi(of.slopes), mask=Causal()),
    "RelativePosition": lambda of, b: dict(score=RelativePosition(of.table, 6)),
    "bias": lambda of, b: dict(bias=of.pairs(of.bias, b)),
    "Bias before Softcap": lambda of, b: dict(score=[Bias(of.pairs(of.bias, b)), Softcap(2.0)]),
    "UserScore": lambda of, b: dict(
        score=tilewise.UserScore(
            checkered_score,
            (of.slopes, 0.5),
            twin=checkered_score_twin,
            derivative=checkered_derivative,
            parameters={0: ("h", checkered_by_offset)},
        )
    ),
    "sink": lambda of, b: dict(sink=of.sink, mask=Causal()),
    "cosine": lambda of, b: dict(similarity="cosine", scale=3.0),
}
TRAINED = {"ALiBi": "slopes", "UserScore": "slopes", "RelativePosition": "table", "sink": "sink"}
TRAINED |= {"bias": "bias", "Bias before Softcap": "bias"}


@pytest.mark.in_turns
@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_sequence_gets_what_it_gets_alone(name, device):
    """Queries and keys of different lengths: cut at each sequence's own corner."""
    rows, of = tensors(device, LENGTHS, KV_LENGTHS), Of(device)
    arguments = ARGUMENTS[name]
    nested = as_nested(rows, device, LENGTHS, KV_LENGTHS)
    out, lse = tilewise.attention(*nested, **arguments(of, None), return_lse=True, impl="portable")
    got = rows_of(out), rows_of(lse)
    want = one_by_one(rows, LENGTHS, KV_LENGTHS, lambda b: arguments(of, b))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert (got[0][-1] == 0).all(), "the last sequence has a query and no key"
    wrt = [*rows, *([getattr(of, TRAINED[name])] if name in TRAINED else [])]
    weights = [torch.randn_like(want[0]), torch.zeros_like(want[1])]  # an lse of -inf has no gradient
    got_grads = torch.autograd.grad(got, wrt, weights)
    for a, b in zip(got_grads, torch.autograd.grad(want, wrt, weights), strict=True):
        assert_close(a, b)


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["plain", "Causal", "ALiBi"])
def test_sequences_of_one_packing(name, device):
    """Out and lse are jagged as q is, and both have a gradient."""
    rows, of = tensors(device), Of(device, LENGTHS, LENGTHS)
    nested = as_nested(rows, device)
    arguments = ARGUMENTS[name]
    out, lse = tilewise.attention(*nested, **arguments(of, None), return_lse=True, impl="portable")
    assert out.is_nested and out.shape[:2] == (len(LENGTHS), Q_HEADS) and out.shape[3] == VALUE_DIM
    assert (out + jagged(torch.zeros(23, Q_HEADS, VALUE_DIM, device=device), nested[0].offsets())).is_nested
    got = rows_of(out), rows_of(lse)
    want = one_by_one(rows, LENGTHS, LENGTHS, lambda b: arguments(of, b))
    weights = [torch.randn_like(x) for x in want]
    got_grads = torch.autograd.grad(got, rows, weights)
    for a, b in zip((*got, *got_grads), (*want, *torch.autograd.grad(want, rows, weights)), strict=True):
        assert_close(a, b)


def test_dropout_drops_the_pairs_of_each_sequence(device):
    """The pairs are those of a padded batch: dropout asks for the sequence and the position inside it."""
    rows, seed = tensors(device), torch.tensor([7], device=device)
    out = tilewise.attention(
        *as_nested(rows, device), dropout_p=0.5, dropout_seed=seed, mask=Causal(), impl="portable"
    )
    padded = [torch.zeros(4, x.shape[1], LONGEST, x.shape[2], device=device) for x in rows]
    for b in range(4):
        for x, each in zip(padded, (x.split(LENGTHS)[b] for x in rows), strict=True):
            x[b, :, : LENGTHS[b]] = each.transpose(0, 1)
    want = tilewise.attention(
        *padded, dropout_p=0.5, dropout_seed=seed, mask=Causal("top_left"), impl="portable"
    )
    assert_close(rows_of(out), torch.cat([want[b, :, :n].transpose(0, 1) for b, n in enumerate(LENGTHS)]))


# ---- What is in one sequence stays there


@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "dO"])
def test_nan_in_a_sequence_stays_there(poisoned, impl, device):
    """Also where a tile's rows or keys end in the middle of the memory that the next sequence begins in."""
    lengths, victim = (5, 20, 17, 9), 1
    rows = tensors(device, lengths, lengths)
    weights = torch.randn(sum(lengths), Q_HEADS, VALUE_DIM, device=device)

    def results():
        out = rows_of(
            tilewise.attention(*as_nested(rows, device, lengths, lengths), mask=Causal(), impl=impl)
        )
        return [x.split(lengths) for x in (out, *torch.autograd.grad(out, rows, weights))]

    clean = results()
    given = dict(zip("qkv", rows, strict=True)) | {"dO": weights}
    with torch.no_grad():
        given[poisoned].split(lengths)[victim].fill_(torch.nan)
    found = results()
    for before, after in zip(clean, found, strict=True):
        for b in range(len(lengths)):
            assert b == victim or torch.equal(before[b], after[b])
    assert any(each[victim].isnan().any() for each in found)


def test_rows_behind_the_last_sequence_see_nothing(device):
    """A buffer may be longer than what is packed in it, and hold NaN there."""
    values = torch.randn(30, 2, DIM, device=device)
    values[23:] = torch.nan
    nested = jagged(values, offsets(LENGTHS, device))
    out = rows_of(tilewise.attention(nested, nested, nested, impl="portable"))
    assert out.isfinite().all() and (out[23:] == 0).all() and (out[:23] != 0).all()


# ---- Around it


def test_a_module_takes_nested_input(device):
    module = SelfAttention(32, heads=4, kv_heads=2, out_projection=True, device=device)
    x = torch.randn(23, 32, device=device)
    nested = torch.nested.nested_tensor_from_jagged(x, offsets(LENGTHS, device))
    got = module(nested, mask=Causal())
    want = torch.cat([module(one, mask=Causal()) for one in x.split(LENGTHS) if len(one)])
    assert_close(got.values(), want)


@pytest.mark.oldest
def test_holes_are_refused_with_a_way_out_that_trains(device):
    """The way is taken from the message."""
    padded = torch.randn(3, 10, 32, device=device, requires_grad=True)
    starts, lengths = (torch.tensor(n, device=device) for n in ([0, 1, 0], [5, 2, 9]))
    x = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    project = nn.Linear(32, 96, device=device)

    def qkv(x):
        return [each.unflatten(-1, (2, 16)).transpose(1, 2) for each in project(x).chunk(3, dim=-1)]

    holes = x.unflatten(-1, (2, 16)).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="holes between its sequences") as raised:
        tilewise.attention(holes, holes, holes)
    (way,) = [part for part in str(raised.value).split(" of the tensor x")[0].split("make ")[1:]]
    compact = eval(way, {"torch": torch, "x": x})
    out = tilewise.attention(*qkv(compact), mask=Causal(), impl="portable")
    alone = [padded[i, s : s + n][None] for i, (s, n) in enumerate([(0, 5), (1, 2), (0, 9)])]
    want = torch.cat([tilewise.attention(*qkv(one), mask=Causal(), impl="torch")[0] for one in alone], dim=1)
    assert_close(rows_of(out), want.transpose(0, 1))
    weights = torch.randn_like(rows_of(out))
    (got,) = torch.autograd.grad(rows_of(out), padded, weights)
    assert_close(got, torch.autograd.grad(want.transpose(0, 1), padded, weights)[0])


# ---- Mistakes

MISTAKES = {
    "one is not nested": ("k has layout", lambda n, d: (n, d, n, {})),
    "not transposed": ("transpose", lambda n, d: (n.transpose(1, 2),) * 3 + ({},)),
    "a length too few": (
        r"Padding: kv_lens.shape=\(3,\) must broadcast to \(4,\)",
        lambda n, d: (n, n, n, dict(mask=Padding(d.new_zeros(3).int()))),
    ),
    "a bias of other heads": (
        r"bias.shape=\(3, 1, 1\) must broadcast to \(4, 2, any, any\)",
        lambda n, d: (n, n, n, dict(bias=d.new_zeros(3, 1, 1))),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, device):
    words, change = MISTAKES[name]
    nested = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS, device))
    q, k, v, arguments = change(nested, torch.randn(4, 2, 5, DIM, device=device))
    with pytest.raises(ValueError, match=words) as raised:
        tilewise.attention(q, k, v, **arguments)
    assert tilewise.why_not(q, k, v, **arguments) == [str(raised.value)]


def test_packings_that_do_not_fit_are_named(device):
    """k and v have one packing by identity: values are read only to say what went wrong."""
    first, second = offsets(LENGTHS, device), offsets(LENGTHS, device)
    x, y = (jagged(torch.randn(23, 2, DIM, device=device), starts) for starts in (first, second))
    other = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS[::-1], device))
    fewer = jagged(torch.randn(23, 2, DIM, device=device), offsets((20, 3), device))
    cases = [
        (x, x, y, r"equal in value, .*: make v with .*jagged\(values, k.offsets\(\)\)"),
        (x, fewer, fewer, f"batch sizes q: {len(LENGTHS)}, k: 2, v: 2 must be equal"),
        (x, x, other, r"must have the same offsets: make v with .*k\.offsets"),
    ]
    for q, k, v, words in cases:
        with pytest.raises(ValueError, match=words) as raised:
            tilewise.attention(q, k, v)
        assert tilewise.why_not(q, k, v) == [str(raised.value)]


def test_why_not_finds_nothing_wrong(device):
    nested = jagged(torch.randn(23, 2, DIM, device=device), offsets(LENGTHS, device))
    assert tilewise.why_not(nested, nested, nested, mask=Causal()) == []
    assert "sink=(3,)" in tilewise.why_not(nested, nested, nested, sink=torch.zeros(3, device=device))[0]
