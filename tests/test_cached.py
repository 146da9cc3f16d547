"""A cache of keys and values: each sequence stands at its own positions, in one piece or in pages."""

import random
import re

import pytest
import torch

import tilewise
from harness.features import build, judge
from harness.oracle import check
from harness.sanitizer import sanitize
from tilewise import ALiBi, Causal, Padding, RelativePosition, Softcap, Window
from tilewise.nn import Rotary
from tilewise.parts.shape import Cache as Filled
from tilewise.parts.shape import Shape
from tilewise.plan.tiles import gpu_tile

Q_HEADS, KV_HEADS, DIM, VALUE_DIM, CAPACITY = 4, 2, 16, 24, 64
LENS = (5, 0, 40)
IMPLS = ("portable", "torch")
PAGES = (None, 16, 5, 1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Cache:
    """A cache with these lengths, NaN behind them, in one piece or in pages of any order."""

    def __init__(self, device, page_size=None, lens=LENS, capacity=CAPACITY, kv_heads=KV_HEADS):
        batch = len(lens)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)
        self.dense = [randn(batch, kv_heads, capacity, d, seed=d).to(device) for d in (DIM, VALUE_DIM)]
        for x in self.dense:
            for b, n in enumerate(lens):
                x[b, :, n:] = torch.nan
        self.pages, self.k, self.v = None, *(x.clone() for x in self.dense)
        if page_size is not None:
            each = -(-capacity // page_size)
            order = random.Random(page_size).sample(range(batch * each), batch * each)
            self.pages = torch.tensor(order, device=device).reshape(batch, each)
            self.k, self.v = (self.paged(x, page_size) for x in self.dense)

    def paged(self, x, page_size):
        """[batch, heads, capacity, dim] as a pool [pages, page_size, heads, dim]."""
        batch, heads, capacity, dim = x.shape
        rows = self.pages.shape[1] * page_size
        padded = torch.full((batch, rows, heads, dim), torch.nan, device=x.device)
        padded[:, :capacity] = x.transpose(1, 2)
        pool = torch.empty(self.pages.numel(), page_size, heads, dim, device=x.device)
        pool[self.pages] = padded.reshape(batch, -1, page_size, heads, dim)
        return pool

    def rows(self, x):
        """What a cache holds, [batch, heads, capacity, dim]."""
        return x if self.pages is None else x[self.pages].flatten(1, 2).transpose(1, 2)[:, :, :CAPACITY]

    def given(self):
        return dict(kv_lens=self.lens, pages=self.pages)


def new_rows(device, count):
    """New queries, keys and values for each sequence."""
    batch = len(LENS)
    q = randn(batch, Q_HEADS, count, DIM, seed=1).to(device)
    k = randn(batch, KV_HEADS, count, DIM, seed=2).to(device)
    return q, k, randn(batch, KV_HEADS, count, VALUE_DIM, seed=3).to(device)


def one_by_one(cache, q, new_k, new_v, rotary=None, **arguments):
    """out of each sequence by itself, over the keys that it has, and the keys and values."""
    outs, keys = [], []
    for b, n in enumerate(cache.lens.tolist()):
        one_q, one_k, one_v = q[b : b + 1], new_k[b : b + 1], new_v[b : b + 1]
        if rotary is not None:
            one_q, one_k = rotary(one_q, one_k, positions=n)
        k = torch.cat([cache.dense[0][b : b + 1, :, :n], one_k], 2)
        v = torch.cat([cache.dense[1][b : b + 1, :, :n], one_v], 2)
        given = {name: f(b) if callable(f) else f for name, f in arguments.items()}
        outs.append(tilewise.attention(one_q, k, v, **given, impl="torch"))
        keys.append((k, v))
    return torch.cat(outs), keys


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=64 * 2.0**-23 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("impl", IMPLS)
def test_new_rows_are_written_and_attended_to(impl, page_size, count, device):
    """By decoding, a few guesses at once, and a piece of a prefill; the rest of the cache stays as it is."""
    cache, (q, new_k, new_v) = Cache(device, page_size), new_rows(device, count)
    out = tilewise.cached_attention(
        q, cache.k, cache.v, new_k=new_k, new_v=new_v, **cache.given(), mask=Causal(), impl=impl
    )
    wanted, keys = one_by_one(cache, q, new_k, new_v, mask=Causal())
    assert_close(out, wanted)
    for held, dense, part in ((cache.k, cache.dense[0], 0), (cache.v, cache.dense[1], 1)):
        after = dense.clone()
        for b, n in enumerate(LENS):
            after[b, :, : n + count] = keys[b][part][0]
        assert torch.equal(cache.rows(held).nan_to_num(7), after.nan_to_num(7))


@pytest.mark.oldest
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [DIM, 6])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_turned_by_their_positions(impl, rotary_dim, style, device):
    rotary = Rotary(DIM, rotary_dim=rotary_dim, style=style)
    table = rotary.table(CAPACITY, device)
    cache, (q, new_k, new_v) = Cache(device, 16), new_rows(device, 3)
    out = tilewise.cached_attention(
        q, cache.k, cache.v, new_k=new_k, new_v=new_v, rotary=table, **cache.given(), mask=Causal(), impl=impl
    )
    wanted, keys = one_by_one(cache, q, new_k, new_v, rotary, mask=Causal())
    assert_close(out, wanted)
    for b, n in enumerate(LENS):
        assert_close(cache.rows(cache.k)[b, :, n : n + 3], keys[b][0][0, :, n:])


PLACED = {
    "window": dict(mask=Window(7, 0)),
    "alibi": dict(score=ALiBi(torch.rand(Q_HEADS))),
    "relative": dict(score=RelativePosition(randn(Q_HEADS, 8), 6), mask=Causal()),
    "left padding": dict(mask=lambda b: Padding([3, 9, 30][b], side="left")),
    "softcap and sink": dict(score=Softcap(2.0), sink=randn(Q_HEADS)),
    "cosine": dict(similarity="cosine", scale=3.0),
    "top left": dict(mask=Causal("top_left")),
}


@pytest.mark.parametrize("name", PLACED)
def test_positions_are_those_of_the_sequence(name, device):
    """Not those of the buffer: corners, windows and distances of each by its own length."""

    def moved(x):
        for attribute in ("slopes", "table", "buckets"):
            if hasattr(x, attribute):
                setattr(x, attribute, getattr(x, attribute).to(device))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    given = {key: moved(value) for key, value in PLACED[name].items()}
    batched = dict(given)
    if name == "left padding":
        batched["mask"] = Padding(torch.tensor([3, 9, 30], device=device), side="left")
    cache, (q, new_k, new_v) = Cache(device, 5), new_rows(device, 3)
    out = tilewise.cached_attention(
        q, cache.k, cache.v, new_k=new_k, new_v=new_v, **cache.given(), **batched, impl="portable"
    )
    assert_close(out, one_by_one(cache, q, new_k, new_v, **given)[0])


def test_bits_depend_on_nothing_but_the_sequence(device):
    """With splits of a given size: not on the batch, nor on how many queries come in one call, nor on the
    capacity, nor on pages."""
    tokens = 50
    q = randn(1, Q_HEADS, tokens, DIM, seed=5).to(device)
    k, v = (
        randn(1, KV_HEADS, tokens, DIM, seed=6).to(device),
        randn(1, KV_HEADS, tokens, DIM, seed=7).to(device),
    )

    def in_pieces(chunks, capacity, page_size=None, beside=0):
        batch = 1 + beside
        shape = (batch, KV_HEADS, capacity, DIM)
        pages = None
        if page_size is not None:
            each = -(-capacity // page_size)
            pages = torch.arange(batch * each, device=device).reshape(batch, each).flip(1)
            shape = (batch * each, page_size, KV_HEADS, DIM)
        cache_k, cache_v = (torch.full(shape, torch.nan, device=device) for _ in range(2))
        lens, outs, at = torch.zeros(batch, dtype=torch.int32, device=device), [], 0
        for count in chunks:
            rows = slice(at, at + count)
            new = [torch.cat([x[:, :, rows]] * batch) for x in (q, k, v)]
            for x in new[1:]:
                x[1:] += 1
            out = tilewise.cached_attention(
                new[0], cache_k, cache_v, new_k=new[1], new_v=new[2], kv_lens=lens, pages=pages,
                mask=Causal(), split_size=16, impl="portable",
            )  # fmt: skip
            lens, at = lens + count, at + count
            outs.append(out[:1])
        return torch.cat(outs, 2)

    at_once = in_pieces([tokens], tokens)
    for chunks, options in (
        ([20, 30], dict(capacity=64)),
        ([47, 1, 1, 1], dict(capacity=100, page_size=7)),
        ([45, 5], dict(capacity=70, beside=2)),
    ):
        assert torch.equal(in_pieces(chunks, **options), at_once), (chunks, options)


def test_splits_are_merged_to_the_same_result(device):
    """As the chip has room, of a given size, or in one piece: one result, to rounding; empty splits too."""
    cache, (q, _, _) = Cache(device), new_rows(device, 2)
    sink = torch.randn(Q_HEADS, device=device)
    given = dict(**cache.given(), sink=sink, mask=Causal(), return_lse=True)
    wanted = tilewise.cached_attention(q, cache.k, cache.v, **given, impl="torch")
    for size in (None, 16, 48, 1024):
        found = tilewise.cached_attention(q, cache.k, cache.v, **given, split_size=size, impl="portable")
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want)
    assert (found[0][1] == 0).all() and torch.equal(found[1][1], sink[:, None].expand(Q_HEADS, 2))


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_of_many_lengths(impl, device):
    """Packed queries over one cache: some decode, one is prefilled, one has nothing to ask."""
    counts, page_size = (1, 0, 12), 16
    cache = Cache(device, page_size)
    starts = torch.tensor([0, *counts], device=device).cumsum(0)
    q, new_k = (randn(13, h, DIM, seed=h).to(device) for h in (Q_HEADS, KV_HEADS))
    new_v = randn(13, KV_HEADS, VALUE_DIM, seed=9).to(device)
    table = Rotary(DIM).table(CAPACITY, device)
    out, lse = tilewise.cached_attention(
        q, cache.k, cache.v, new_k=new_k, new_v=new_v, q_offsets=starts, rotary=table, **cache.given(),
        mask=Causal(), return_lse=True, impl=impl,
    )  # fmt: skip
    assert out.shape == (13, Q_HEADS, VALUE_DIM) and lse.shape == (Q_HEADS, 13)
    for b, (n, count) in enumerate(zip(LENS, counts, strict=True)):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        one_q, one_k, one_v = (x[rows].transpose(0, 1)[None] for x in (q, new_k, new_v))
        if count == 0:
            continue
        one_q, one_k = Rotary(DIM)(one_q, one_k, positions=n)
        k = torch.cat([cache.dense[0][b : b + 1, :, :n], one_k], 2)
        v = torch.cat([cache.dense[1][b : b + 1, :, :n], one_v], 2)
        want = tilewise.attention(one_q, k, v, mask=Causal(), impl="torch")
        assert_close(out[rows].transpose(0, 1)[None], want)


def test_what_has_no_room_is_left_out(device):
    """At the cache's end; and nothing outside is written."""
    cache, (q, new_k, new_v) = Cache(device, lens=(62, 64, 0)), new_rows(device, 3)
    with sanitize():
        tilewise.cached_attention(
            q, cache.k, cache.v, new_k=new_k, new_v=new_v, **cache.given(), impl="portable"
        )
    assert torch.equal(cache.k[0, :, 62:], new_k[0, :, :2]) and torch.equal(cache.k[1], cache.dense[0][1])


def test_bad_lengths_and_pages_touch_nothing_outside(device):
    """Junk behind the pages in use, and junk instead of them; plain PyTorch says what is wrong."""
    cache, (q, new_k, new_v) = Cache(device, 16), new_rows(device, 3)
    cache.pages[0, 1:], cache.pages[1, 1:] = -7, 2**40
    given = dict(new_k=new_k, new_v=new_v, mask=Causal())
    with sanitize():
        out = tilewise.cached_attention(q, cache.k, cache.v, **cache.given(), **given, impl="portable")
    assert out.isfinite().all()
    for lens, table in (
        ((-5, 3, 100), cache.pages),
        ((-5, 2**40, 3), cache.pages),
        (LENS, torch.full_like(cache.pages, 99)),
    ):
        bad = dict(kv_lens=torch.tensor(lens, device=device), pages=table)
        with sanitize(races=False):
            tilewise.cached_attention(q, cache.k, cache.v, **bad, impl="portable")
        with pytest.raises(ValueError, match=r"kv_lens\[0\]=-5|pages\[0\]=\[99\]"):
            tilewise.cached_attention(q, cache.k, cache.v, **bad, impl="torch")


@pytest.mark.parametrize("features", ["grouped_heads causal", "one_kv_head bool_mask user_score", "dropout"])
@pytest.mark.parametrize("rows", ["cached_rows", "paged_rows"])
def test_features_over_a_cache(features, rows, device):
    judge(build(device, random.Random(features), [*features.split(), rows]))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_for_other_lengths(impl, device):
    """A compiled step writes into the cache that it is given, and serves every length."""
    table = Rotary(DIM).table(CAPACITY, device)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def step(q, k, v, lens, new_k, new_v):
        return tilewise.cached_attention(
            q, k, v, kv_lens=lens, new_k=new_k, new_v=new_v, rotary=table, mask=Causal(), impl=impl
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for lens in (LENS, (7, 30, 1)):
        results = []
        for function in (step, compiled):
            cache, (q, new_k, new_v) = Cache(device, lens=lens), new_rows(device, 1)
            results.append((function(q, cache.k, cache.v, cache.lens, new_k, new_v), cache.k, cache.v))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert len(graphs) == 1


def test_the_ops_pass_pytorchs_checks(device):
    cache, (q, new_k, new_v) = Cache(device, 16), new_rows(device, 2)
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    for x in (k, v):
        x.nan_to_num_(3.0)
    cos, sin, interleaved = Rotary(DIM).table(80, device)
    where = (cache.lens, cache.pages, None)
    append, turn = torch.ops.tilewise.append_to_cache, torch.ops.tilewise.turn_queries
    given = (k, v, new_k, new_v, *where, cos, sin, interleaved, "portable")
    torch.library.opcheck(append, given)
    torch.library.opcheck(turn, (q, k, *where, cos, sin, interleaved, "portable"))


MISTAKES = {
    "lens": (dict(kv_lens=torch.tensor([1.0, 2, 3])), "kv_lens=torch.float32 must be a tensor of dtype"),
    "batch": (dict(kv_lens=torch.tensor([1, 2])), r"kv_lens.shape=\(2,\) must be \[batch\] = \[3\]"),
    "table": (
        dict(pages=torch.zeros(3, dtype=torch.int32)),
        r"pages=\(3,\) must be a tensor \[batch",
    ),
    "table of others": (dict(pages=torch.zeros(2, 4, dtype=torch.int32)), "pages.shape=.*with 3 for batch"),
    "split": (dict(split_size=20), "split_size=20 must be None .* or a multiple of 16"),
    "new alone": (
        dict(new_k=randn(3, KV_HEADS, 1, DIM)),
        "new_v=None must be a tensor: new_k and",
    ),
    "new shape": (
        dict(new_k=randn(3, KV_HEADS, 1, DIM), new_v=randn(3, KV_HEADS, 2, VALUE_DIM)),
        r"new_v.shape=\(3, 2, 2, 24\) must be \[3, 2, 1, 24\]",
    ),
    "new trained": (
        dict(new_k=randn(3, KV_HEADS, 1, DIM).requires_grad_(), new_v=randn(3, KV_HEADS, 1, VALUE_DIM)),
        "new_k requires a gradient, and cached_attention has none",
    ),
    "rotary": (dict(rotary=Rotary(DIM)), "rotary=.* must be what Rotary.table"),
    "short table": (dict(rotary=Rotary(DIM).table(10)), r"rotary has 10 positions.*give table\(64\)"),
    "gradient": (
        dict(sink=torch.zeros(Q_HEADS, requires_grad=True)),
        "sink requires a gradient, and",
    ),
    "hopper": (dict(impl="hopper"), "a cache ends inside the tensor"),
    "name": (dict(cache_seqlens=3), r"cached_attention\(\) has no cache_seqlens="),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_what_is_wrong_and_change_nothing(name, device):
    changed, words = MISTAKES[name]
    cache, (q, _, _) = Cache(device), new_rows(device, 1)
    if name == "hopper":
        q, cache.k, cache.v = (x.to(torch.bfloat16) for x in (q, cache.k, cache.v))
    before = cache.k.clone()
    given = dict(kv_lens=cache.lens)
    for argument, x in changed.items():
        given[argument] = x
        if isinstance(x, torch.Tensor):
            given[argument] = x.detach().to(device).requires_grad_(x.requires_grad)
    with pytest.raises((ValueError, TypeError)) as raised:
        tilewise.cached_attention(q, cache.k, cache.v, **given)
    assert re.search(words, str(raised.value)), raised.value
    assert torch.equal(before.nan_to_num(7), cache.k.nan_to_num(7))


def test_a_half_precision_cache(device):
    cache, (q, _, _) = Cache(device, 16), new_rows(device, 3)
    half = [x.to(torch.bfloat16) for x in (q, cache.k, cache.v)]
    check(*half, **cache.given(), mask=Causal())


def test_bits_of_a_window_do_not_depend_on_other_rows(device):
    """Some tiles of keys count in full for one row alone, and not for all rows of its tile."""
    k, v = (randn(1, KV_HEADS, 200, DIM, seed=seed).to(device) for seed in (6, 7))
    q, lens = randn(1, Q_HEADS, 40, DIM, seed=5).to(device), torch.tensor([200], device=device)

    def run(rows, count):
        return tilewise.cached_attention(
            q[:, :, rows], k, v, kv_lens=torch.full_like(lens, count), mask=Window(120, 0), split_size=256,
            impl="portable",
        )  # fmt: skip

    at_once = run(slice(0, 40), 200)
    for row in (0, 24, 25, 26, 30, 39):
        assert torch.equal(run(slice(row, row + 1), 161 + row), at_once[:, :, row : row + 1]), row


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_of_given_splits_do_not_depend_on_the_queries(arch):
    def tile(q_len, batch):
        lens = torch.empty(batch, dtype=torch.int32, device="meta")
        return gpu_tile(arch, 2, Shape(batch, 8, 2, q_len, 4096, 64, 64, None, Filled(lens, None, 512)))

    assert tile(1, 1) == tile(300, 1) == tile(5, 64)
