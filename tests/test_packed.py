"""Packed sequences: each gets what it would get alone, to the bit, whatever stands beside it."""

import re

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import checkered_by_offset
from harness.oracle import check
from harness.sanitizer import sanitize
from tilewise import ALiBi, Bias, Causal, Documents, Intervals, Padding, RelativePosition, UserScore, Window
from tilewise.kernels.tile import PASSES
from tilewise.parts.shape import Packing, Shape
from tilewise.plan.tiles import gpu_tile

LENGTHS, KV_LENGTHS = (5, 0, 17, 20), (3, 2, 20, 30)
TOKENS = sum(LENGTHS)
Q_HEADS, KV_HEADS, DIM = 4, 2, 16
IMPLS = ("portable", "torch")


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


def offsets(lengths, device, dtype=torch.int32, first=0):
    return torch.tensor([first, *lengths], device=device).cumsum(0).to(dtype)


def inputs(device, tokens=TOKENS, kv_tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, Q_HEADS), (kv_tokens, KV_HEADS), (kv_tokens, KV_HEADS)
    return [torch.randn(*shape, DIM, generator=generator).to(device).requires_grad_() for shape in shapes]


def run(q, k, v, seed=1, **arguments):
    """out, lse and the gradients of q, k and v for gradients of both, the same for the same rows."""
    out, lse = tilewise.packed_attention(q, k, v, return_lse=True, **arguments)
    generator = torch.Generator().manual_seed(seed)
    do = torch.randn(out.shape[0], 1, 1, generator=generator).to(out.device).expand_as(out)
    dlse = torch.randn(lse.shape[1], generator=generator).to(out.device).expand_as(lse)
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (do, dlse))


def alone(q, k, v, lengths, kv_lengths, at, seed=1, **arguments):
    """The same of sequence `at` alone, from its rows."""
    first, kv_first = sum(lengths[:at]), sum(kv_lengths[:at])
    one, kv_one = slice(first, first + lengths[at]), slice(kv_first, kv_first + kv_lengths[at])
    parts = [x[rows].detach().requires_grad_() for x, rows in ((q, one), (k, kv_one), (v, kv_one))]
    dense = [x.transpose(0, 1)[None] for x in parts]
    out, lse = tilewise.attention(*dense, return_lse=True, **arguments)
    generator = torch.Generator().manual_seed(seed)
    do = torch.randn(len(q), 1, 1, generator=generator).to(out.device)[one]
    dlse = torch.randn(len(q), generator=generator).to(out.device)[one]
    do, dlse = do.transpose(0, 1)[None].expand_as(out), dlse.expand_as(lse)
    grads = torch.autograd.grad((out, lse), parts, (do, dlse))
    return (out[0].transpose(0, 1), lse[0], *grads), one, kv_one


@pytest.mark.oldest
@pytest.mark.parametrize("mask", [None, Causal(), Window(4, 1), Causal("top_left")], ids=str)
def test_a_sequence_has_the_bits_that_it_has_alone(mask, device):
    """Its last query stands at its own last key, also where it has more keys than queries."""
    q, k, v = inputs(device, TOKENS, sum(KV_LENGTHS))
    found = run(
        q, k, v, q_offsets=offsets(LENGTHS, device), kv_offsets=offsets(KV_LENGTHS, device, torch.int64),
        mask=mask, impl="portable",
    )  # fmt: skip
    for at in (0, 2, 3):
        wanted, rows, kv_rows = alone(q, k, v, LENGTHS, KV_LENGTHS, at, mask=mask, impl="portable")
        of_rows = (rows, (slice(None), rows), rows, kv_rows, kv_rows)
        for got, want, where in zip(found, wanted, of_rows, strict=True):
            assert torch.equal(got[where], want), at


def test_a_longer_neighbour_changes_no_bit(device):
    q, k, v = inputs(device)
    grown = (6, *LENGTHS[1:])
    wider = [torch.cat([x[:5], x[:1], x[5:]]).detach().requires_grad_() for x in (q, k, v)]
    first = tilewise.packed_attention(q, k, v, q_offsets=offsets(LENGTHS, device), impl="portable")
    second = tilewise.packed_attention(*wider, q_offsets=offsets(grown, device), impl="portable")
    assert torch.equal(first[5:], second[6:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "where, junk", [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("do", torch.nan)]
)
def test_nothing_of_one_sequence_reaches_another(where, junk, impl, device):
    """All ones, so that every product is felt: 0 · NaN would be."""
    lengths = (1, 1, 20)
    starts = offsets(lengths, device)
    tensors = {name: torch.ones(22, 1, DIM, device=device) for name in ("q", "k", "v", "do")}
    tensors[where][1] = junk
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")
    out, lse = tilewise.packed_attention(q, k, v, q_offsets=starts, return_lse=True, impl=impl)
    grads = torch.autograd.grad((out, lse), (q, k, v), (tensors["do"], torch.ones_like(lse)))
    others = [0, *range(2, 22)]
    for found in (out, lse.transpose(0, 1), *grads):
        assert found[others].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_no_sequence_give_nothing_and_take_nothing(impl, device):
    """Before the first sequence, behind the last: 0 and -inf, a gradient of 0, for NaN too, and no part of
    the sink's gradient."""
    q, k, v = inputs(device, 30, 34)
    with torch.no_grad():
        for x, rows in ((q, (0, 1, 25, 29)), (k, (0, 33)), (v, (1, 32))):
            x[list(rows)] = torch.nan
    sink = torch.randn(Q_HEADS, device=device, requires_grad=True)
    starts, kv_starts = offsets((20, 3), device, first=2), offsets((9, 20), device, first=3)
    out, lse = tilewise.packed_attention(
        q, k, v, q_offsets=starts, kv_offsets=kv_starts, sink=sink, return_lse=True, impl=impl
    )
    outside = [0, 1, *range(25, 30)]
    assert (out[outside] == 0).all() and (lse[:, outside] == -torch.inf).all()
    do, dlse = torch.ones_like(out), torch.ones_like(lse)
    do[outside], dlse[:, outside] = torch.nan, torch.nan
    dq, dk, dv, dsink = torch.autograd.grad((out, lse), (q, k, v, sink), (do, dlse))
    assert (dq[outside] == 0).all() and (dk[[*range(3), 32, 33]] == 0).all()
    assert (dv[[*range(3), 32, 33]] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dsink))


@pytest.mark.parametrize("batch", [1, 150])
def test_more_sequences_than_rows(batch, device):
    """A search in several steps: most sequences have no row."""
    lengths = [0] * batch
    lengths[batch // 3] = 19
    lengths[-1] += 2
    q, k, v = (x.detach() for x in inputs(device, sum(lengths), sum(lengths)))
    check(q, k, v, q_offsets=offsets(lengths, device), mask=Causal())


BAD = {
    "decreasing": [0, 20, 7, 30],
    "beyond the end": [0, 20, 200, 300],
    "below 0": [-50, 5, 9, 30],
    "huge": [0, 2**40, 5, 2**62],
    "back to front": [30, 20, 10, 0],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_offsets_read_and_write_nothing_outside(name, device):
    """And `check_offsets` says what is wrong with them, as plain PyTorch does."""
    q, k, v = inputs(device, 30, 30)
    bad = torch.tensor(BAD[name], device=device)
    good = torch.tensor([0, 10, 20, 30], device=device)
    mask = Padding(torch.tensor([3, 9, 9], device=device)) & torch.ones(
        3, 1, 25, 1, dtype=torch.bool, device=device
    )
    for q_offsets, kv_offsets in ((bad, None), (bad, good), (good, bad)):
        with sanitize(races=False):
            out = tilewise.packed_attention(
                q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, mask=mask,
                score=ALiBi(torch.ones(3, Q_HEADS, device=device, requires_grad=True)), impl="portable",
            )  # fmt: skip
            out.sum().backward()
        with pytest.raises(ValueError, match=r"offsets\[\d\]=") as raised:
            tilewise.check_offsets(q_offsets, kv_offsets, tokens=30)
        with pytest.raises(ValueError) as plain:
            tilewise.packed_attention(q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, impl="torch")
        assert str(plain.value) == str(raised.value)
    tilewise.check_offsets(good, tokens=30)


TENSORS = {
    "mask": lambda b, m, r: dict(mask=r(b, 1, m, m) > 0),
    "bias": lambda b, m, r: dict(bias=r(b, 1, m, m)),
    "intervals": lambda b, m, r: dict(mask=Intervals((r(b, 1, m) * 0).int(), (r(b, 1, m).abs() * 9).int())),
    "documents": lambda b, m, r: dict(mask=Documents((r(b, m) * 2).int())),
    "bias before": lambda b, m, r: dict(score=Bias(r(m, m))),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_along_positions_may_end_before_a_sequence(name, device):
    """What lies behind its end is masked out, or, of a bias, NaN; nothing is read there. Plain PyTorch, which
    knows the lengths, refuses."""
    q, k, v = inputs(device, 23, 23)
    starts = offsets((5, 18), device)

    def randn(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(device)

    with sanitize():
        out, lse = tilewise.packed_attention(
            q, k, v, q_offsets=starts, **TENSORS[name](2, 12, randn), return_lse=True, impl="portable"
        )
    wanted = tilewise.packed_attention(q, k, v, q_offsets=starts, **TENSORS[name](2, 18, randn))
    assert out[:5].isfinite().all() and wanted.isfinite().all()
    if "bias" in name:
        assert out[5 + 12 :].isnan().all()
    else:
        assert (lse[:, 5 + 12 :] == -torch.inf).all() and (out[5 + 12 :] == 0).all()
    with pytest.raises(ValueError, match="sequence 1 has 18 and 18: they must be as long as the longest"):
        tilewise.packed_attention(
            q, k, v, q_offsets=starts, **TENSORS[name](2, 12, randn), impl="torch"
        )  # fmt: skip


def test_gradients_of_what_each_sequence_has_for_itself(device):
    """Slopes a sequence, whose sums over tiles are taken for each; more tiles than one step of the sum."""
    q, k, v = inputs(device)
    slopes = torch.rand(4, Q_HEADS, device=device, requires_grad=True)
    starts = offsets(LENGTHS, device)
    out = tilewise.packed_attention(q, k, v, q_offsets=starts, score=ALiBi(slopes), impl="portable")
    wanted = tilewise.packed_attention(q, k, v, q_offsets=starts, score=ALiBi(slopes), impl="torch")
    do = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(x, slopes, do) for x in (out, wanted))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got[1] == 0).all(), "a sequence without rows"


def test_one_packed_projection_is_three_views(device):
    """[tokens, 3, heads, dim], as a module projects it: no copy, and out lies as q does."""
    qkv = torch.randn(20, 3, Q_HEADS, DIM, device=device, requires_grad=True)
    q, k, v = qkv.unbind(1)
    starts = offsets((7, 13), device)
    out = tilewise.packed_attention(q, k, v, q_offsets=starts, mask=Causal(), impl="portable")
    assert out.is_contiguous() and out.shape == (20, Q_HEADS, DIM)
    want = tilewise.packed_attention(q, k, v, q_offsets=starts, mask=Causal(), impl="torch")
    do = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, do), torch.autograd.grad(want, qkv, do), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_for_other_lengths(impl, device):
    """The lengths are the device's: a compiled graph serves all of them, with gradients."""

    def call(q, k, v, starts):
        return tilewise.packed_attention(q, k, v, q_offsets=starts, mask=Causal(), impl=impl, return_lse=True)

    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for lengths in ((5, 15, 3), (20, 0, 3)):
        q, k, v = inputs(device, 23, 23, seed=sum(lengths))
        starts = offsets(lengths, device)
        results = []
        for function in (call, compiled):
            out, lse = function(q, k, v, starts)
            lse = torch.where(lse.isfinite(), lse, 0.0)
            results.append((out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), (q, k, v))))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def test_nothing_waits_for_the_host(device, monkeypatch):
    """No length is read: no tensor becomes a number on the way, forward or backward."""

    def read(*_):
        raise AssertionError("the host reads a tensor")

    q, k, v = inputs(device)
    slopes = torch.rand(4, Q_HEADS, device=device, requires_grad=True)
    table = torch.randn(Q_HEADS, 8, device=device, requires_grad=True)
    score = [ALiBi(slopes), RelativePosition(table, 6)]
    starts, kv_starts = offsets(LENGTHS, device), offsets(LENGTHS, device)
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "cpu", "numpy"):
        if name not in ("__bool__",) or device.type == "cuda":
            monkeypatch.setattr(torch.Tensor, name, read)
    if device.type != "cuda":
        monkeypatch.setattr("tilewise.kernels.forward.forward_kernel", Launches())
        for kernel in ("backward.dkv_kernel", "backward.dq_kernel", "prepare.prepare_kernel"):
            monkeypatch.setattr(f"tilewise.kernels.{kernel}", Launches())
        for kernel in ("parameter_kernel", "sequence_sums_kernel"):
            monkeypatch.setattr(f"tilewise.kernels.parameters.{kernel}", Launches())
    out = tilewise.packed_attention(
        q, k, v, q_offsets=starts, kv_offsets=kv_starts, score=score, mask=Causal(), impl="portable"
    )
    torch.autograd.grad(out, (q, k, v, slopes, table), torch.ones_like(out))


class Launches:
    """A kernel that only takes its launch: the interpreter itself reads tensors."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


MISTAKES = {
    "rank": (dict(), r"q.shape=\(1, 9, 4, 16\) must have 3 dimensions, \[tokens, heads, dim\]"),
    "dtype": (dict(q_offsets=torch.tensor([0.0, 9.0])), "q_offsets=torch.float32 must be a tensor of dtype"),
    "list": (dict(q_offsets=[0, 9]), r"q_offsets=\[0, 9\] must be a tensor"),
    "shape": (dict(q_offsets=torch.tensor(9)), r"q_offsets.shape=\(\) must be \[batch \+ 1\]"),
    "counts": (
        dict(kv_offsets=torch.tensor([0, 4, 9])),
        r"q_offsets.shape=\(2,\), kv_offsets.shape=\(3,\) must be equal",
    ),
    "tokens": (dict(k=torch.zeros(7, 4, 16)), "kv_offsets=None says that keys are packed as queries are"),
    "hopper": (dict(impl="hopper"), "q_offsets pack sequences into one tensor"),
    "name": (dict(max_seqlen_q=9), "packed_attention\\(\\) has no max_seqlen_q="),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_what_is_wrong(name, device):
    changed, words = MISTAKES[name]
    q = torch.randn(9, 4, 16, device=device).to(torch.bfloat16 if name == "hopper" else torch.float32)
    given = dict(q=q, k=q, v=q, q_offsets=torch.tensor([0, 9], device=device)) | changed
    if name == "rank":
        given["q"] = q[None]
    if name == "tokens":
        given["v"] = given["k"]
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with pytest.raises((ValueError, TypeError), match=words):
        tilewise.packed_attention(**given)
    q, k, v = (given.pop(x) for x in "qkv")
    assert any(re.search(words, reason) for reason in tilewise.why_not(q, k, v, **given))


@triton.jit
def by_query(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0] + q_idx)


@triton.jit
def by_key(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0] + kv_idx)


@triton.jit
def by_pair(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0] + q_idx * 18 + kv_idx)


@triton.jit
def by_sequence_and_query(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0] + batch * 18 + q_idx)


@triton.jit
def by_sequence_and_head(s, batch, head, q_idx, kv_idx, args):
    return s + tl.load(args[0] + batch * 4 + head)


POSITIONED = dict(
    q=by_query, k=by_key, qk=by_pair, bq=by_sequence_and_query, bh=by_sequence_and_head
)  # fmt: skip
TWINS = dict(
    q=lambda s, b, h, q, k, x: s + x[q],
    k=lambda s, b, h, q, k, x: s + x[k],
    qk=lambda s, b, h, q, k, x: s + x[q, k],
    bq=lambda s, b, h, q, k, x: s + x[b, q],
    bh=lambda s, b, h, q, k, x: s + x[b, h],
)


def test_user_parameters_along_positions(device):
    """A learned number a position, as long as the longest sequence: its gradient sums over sequences."""
    q, k, v = inputs(device, 23, 23)
    starts = offsets((5, 18), device)
    for axes, shape in (("q", (18,)), ("k", (18,)), ("qk", (18, 18)), ("bq", (2, 18)), ("bh", (2, Q_HEADS))):
        number = torch.randn(shape, device=device, requires_grad=True)
        score = UserScore(
            POSITIONED[axes], (number,), twin=TWINS[axes], derivative=checkered_by_offset,
            parameters={0: (axes, checkered_by_offset)},
        )  # fmt: skip
        results = []
        for impl in IMPLS:
            out = tilewise.packed_attention(q, k, v, q_offsets=starts, score=score, impl=impl)
            results.append(torch.autograd.grad(out, number, out.detach().sign())[0])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_cosines_of_packed_rows(device):
    q, k, v = (x.detach() for x in inputs(device))
    check(q, k, v, q_offsets=offsets(LENGTHS, device), similarity="cosine", mask=Causal())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_do_not_depend_on_what_else_is_packed(arch):
    """Nor on how much: the bits of a sequence are those of its tiles."""

    def tiles(tokens, batch):
        starts = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        shape = Shape(batch, 4, 2, tokens, tokens, 64, 64, Packing(starts, None))
        return [gpu_tile(arch, 2, shape, work) for work in PASSES]

    assert tiles(3, 1) == tiles(3, 200) == tiles(100_000, 7)
