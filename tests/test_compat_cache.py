"""`compat` over caches: FlashAttention's documentation of each sequence, and what the cache holds then."""

import pytest
import torch

import tilewise
from harness.interpreted import set_interpreted
from tilewise import compat

Tensor = torch.Tensor
HEADS, KV_HEADS, DIM, CAPACITY = 4, 2, 16, 40
LENGTHS, NEW = (7, 0, 35), 3
PAGE, MAX_PAGES = 8, 5


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


@pytest.fixture
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- What FlashAttention's documentation says of one sequence


def dense(q: Tensor, k: Tensor, v: Tensor, options: dict, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [length, heads, dim] and lse [heads, length] in fp64 of q [length, heads, dim] over the keys of one
    sequence; slopes [heads]."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    s = q @ k.transpose(1, 2) * options.get("softmax_scale", DIM**-0.5)
    if options.get("softcap", 0) > 0:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    place = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (place - key).abs()
    left, right = options.get("window_size", (-1, -1))
    if options.get("causal"):
        right = 0
    keep = torch.ones_like(place - key, dtype=torch.bool)
    if left >= 0:
        keep &= key >= place - left
    if right >= 0:
        keep &= key <= place + right
    s = s.masked_fill(~keep, -torch.inf)
    lse = s.logsumexp(-1)
    return (torch.nan_to_num(torch.exp(s - lse[..., None])) @ v).transpose(0, 1), lse


def turned(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [length, heads, dim] turned by positions [length]."""
    pairs = cos.shape[1]
    place = torch.arange(pairs, device=x.device)
    first, second = (2 * place, 2 * place + 1) if interleaved else (place, place + pairs)
    c, s = (table[position][:, None] for table in (cos, sin))
    out = x.clone()
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., first] * s + x[..., second] * c
    return out


class Caches:
    """The same keys and values dense [batch, capacity, ...] and in pages; NaN where nothing is filled."""

    def __init__(self, device):
        self.lens = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        self.k, self.v = (torch.randn(3, CAPACITY, KV_HEADS, DIM, device=device) for _ in "kv")
        for x in (self.k, self.v):
            for b, length in enumerate(LENGTHS):
                x[b, length:] = torch.nan
        self.table = torch.randperm(3 * MAX_PAGES, device=device).int().view(3, MAX_PAGES)
        self.pages_k, self.pages_v = map(self.as_pages, (self.k, self.v))

    def as_pages(self, x: Tensor) -> Tensor:
        """One page more than the table names."""
        pages = torch.full((3 * MAX_PAGES + 1, PAGE, KV_HEADS, DIM), torch.nan, device=x.device)
        pages[self.table.long()] = x.unflatten(1, (MAX_PAGES, PAGE))
        return pages


def assert_close(got: Tensor, want: Tensor) -> None:
    """To the roundings of fp32 sums over up to 40 numbers of size 1."""
    largest = max([1.0, *want[want.isfinite()].abs().tolist()])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=256 * 2.0**-23 * largest)


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(5, 1)),
    "causal window": dict(causal=True, window_size=[4, 7]),
    "scale and softcap": dict(softmax_scale=0.7, softcap=0.9),
    "alibi": dict(alibi_slopes=(HEADS,)),
    "alibi of each batch": dict(causal=True, softcap=0.7, alibi_slopes=(3, HEADS)),
}


def with_slopes(options: dict, device) -> dict:
    return {k: torch.rand(v, device=device) if k == "alibi_slopes" else v for k, v in options.items()}


def slopes_of(options: dict, b: int) -> Tensor | None:
    slopes = options.get("alibi_slopes")
    return slopes[b] if slopes is not None and slopes.dim() == 2 else slopes


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("q_len, new_len", [(1, 1), (3, 3), (4, 0), (2, 5)])
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_with_kvcache(name, q_len, new_len, paged, device):
    options, caches = with_slopes(OPTIONS[name], device), Caches(device)
    q = torch.randn(3, q_len, HEADS, DIM, device=device)
    new = [torch.randn(3, new_len, KV_HEADS, DIM, device=device) for _ in "kv"] if new_len else [None, None]
    k, v = (caches.pages_k, caches.pages_v) if paged else (caches.k.clone(), caches.v.clone())
    before = k.clone(), v.clone()
    out, lse = compat.flash_attn_with_kvcache(
        q, k, v, *new, cache_seqlens=caches.lens, block_table=caches.table if paged else None, **options,
        return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (3, HEADS, q_len) and lse.dtype == torch.float32
    for b, length in enumerate(LENGTHS):
        keys = [x[b, :length] for x in (caches.k, caches.v)]
        if new_len:
            keys = [torch.cat((old, x[b])) for old, x in zip(keys, new, strict=True)]
        want, want_lse = dense(q[b], *keys, options, slopes_of(options, b))
        assert_close(out[b], want), assert_close(lse[b], want_lse)
    for x, old, given in zip((k, v), before, new, strict=True):
        wanted = old
        for b, length in enumerate(LENGTHS if new_len else ()):
            for i in range(new_len):
                row = length + i
                block = int(caches.table[b, row // PAGE]) if paged else b
                wanted[block, row % PAGE if paged else row] = given[b, i]
        assert torch.equal(x.nan_to_num(7), wanted.nan_to_num(7)), "the new rows, and nothing else"


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_len, new_len", [(1, 1), (3, 3), (2, 5), (4, 2)])
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(9, 2))], ids=str)
def test_rotary_positions(options, q_len, new_len, interleaved, device):
    """Keys turn by cache_seqlens, cache_seqlens + 1, ...; so do queries where causal or local, else all by
    cache_seqlens."""
    caches, pairs = Caches(device), 4
    angle = torch.rand(CAPACITY + 9, pairs, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    q = torch.randn(3, q_len, HEADS, DIM, device=device)
    new_k, new_v = (torch.randn(3, new_len, KV_HEADS, DIM, device=device) for _ in "kv")
    k = caches.k.clone()
    out = compat.flash_attn_with_kvcache(
        q, k, caches.v.clone(), new_k, new_v, cos, sin, caches.lens, rotary_interleaved=interleaved, **options
    )
    for b, length in enumerate(LENGTHS):
        step = torch.arange(max(q_len, new_len), device=device)
        ones_k = turned(new_k[b], length + step[:new_len], cos, sin, interleaved)
        place = length + (step[:q_len] if options else 0 * step[:q_len])
        one_q = turned(q[b], place, cos, sin, interleaved)
        torch.testing.assert_close(k[b, length : length + new_len], ones_k, rtol=0, atol=1e-6)
        keys = torch.cat((caches.k[b, :length], ones_k)), torch.cat((caches.v[b, :length], new_v[b]))
        assert_close(out[b], dense(one_q, *keys, options, None)[0])


@pytest.mark.parametrize("lens", [9, None], ids=str)
def test_one_length_for_all_and_none_for_a_full_cache(lens, device):
    q = torch.randn(2, 2, HEADS, DIM, device=device)
    k, v = (torch.randn(2, CAPACITY, KV_HEADS, DIM, device=device) for _ in "kv")
    out = compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True, num_splits=3)
    for b in range(2):
        assert_close(out[b], dense(q[b], k[b, :lens], v[b, :lens], dict(causal=True), None)[0])


def test_a_row_of_the_caches_batch_for_each_sequence(device):
    caches, index = Caches(device), (2, 0)
    q = torch.randn(2, 1, HEADS, DIM, device=device)
    new_k, new_v = (torch.randn(2, 1, KV_HEADS, DIM, device=device) for _ in "kv")
    k, v, where = caches.k.clone(), caches.v.clone(), torch.tensor(index, dtype=torch.int32, device=device)
    lens = caches.lens[where.long()]
    out = compat.flash_attn_with_kvcache(
        q, k, v, new_k, new_v, cache_seqlens=lens, cache_batch_idx=where, causal=True
    )
    for b, row in enumerate(index):
        length = LENGTHS[row]
        assert torch.equal(k[row, length], new_k[b, 0]) and torch.equal(v[row, length], new_v[b, 0])
        assert_close(out[b], dense(q[b], k[row, : length + 1], v[row, : length + 1], {}, None)[0])
    assert torch.equal(k[1].nan_to_num(7), caches.k[1].nan_to_num(7))


Q_LENS = (3, 0, 4)


def packed_queries(device) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.tensor([0, *Q_LENS], device=device).cumsum(0).int()
    kv_starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    return torch.randn(sum(Q_LENS), HEADS, DIM, device=device), starts, kv_starts


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_over_pages(name, device):
    """cu_seqlens_k gives the lengths of what the pages hold."""
    options, caches = with_slopes(OPTIONS[name], device), Caches(device)
    q, starts, kv_starts = packed_queries(device)
    out = compat.flash_attn_varlen_func(
        q, caches.pages_k, caches.pages_v, starts, kv_starts, 4, 35, **options, block_table=caches.table
    )
    for b, one in enumerate(q.split(Q_LENS)):
        keys = [x[b, : LENGTHS[b]] for x in (caches.k, caches.v)]
        want, _ = dense(one, *keys, options, slopes_of(options, b))
        assert_close(out[starts[b] : starts[b + 1]], want)
    if options and set(options) <= {"causal", "window_size"}:
        window = (-1, 0) if "window_size" not in options else tuple(options["window_size"])
        window = (window[0], 0) if options.get("causal") else window
        theirs, lse = compat.varlen_attn(
            q, caches.pages_k, caches.pages_v, starts, None, 4, 35, window_size=window, enable_gqa=True,
            seqused_k=caches.lens, block_table=caches.table, return_aux=compat.AuxRequest(lse=True),
        )  # fmt: skip
        assert torch.equal(theirs, out) and lse.shape == (HEADS, sum(Q_LENS))


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_plain_pytorch_does_the_same(paged, device, monkeypatch):
    caches = Caches(device)
    angle = torch.rand(CAPACITY, 4, device=device)
    q, new = torch.randn(3, 2, HEADS, DIM, device=device), torch.randn(3, NEW, KV_HEADS, DIM, device=device)
    table = caches.table if paged else None
    results = []
    for interpreted in (True, False):
        set_interpreted(monkeypatch, interpreted)
        k, v = (x.clone() for x in ((caches.pages_k, caches.pages_v) if paged else (caches.k, caches.v)))
        given = dict(cache_seqlens=caches.lens, block_table=table)
        out = compat.flash_attn_with_kvcache(q, k, v, new, 2 * new, angle.cos(), angle.sin(), **given)
        results.append((out, k.nan_to_num(7), v.nan_to_num(7)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_graph_writes_into_the_cache_too(device, forget_graphs):
    caches, angle = Caches(device), torch.rand(CAPACITY, 4, device=device)
    q, new = torch.randn(3, 2, HEADS, DIM, device=device), torch.randn(3, NEW, KV_HEADS, DIM, device=device)
    results = []
    for call in (written_to, torch.compile(written_to, fullgraph=True, backend="aot_eager")):
        k, v = caches.k.clone(), caches.v.clone()
        out = call(q, k, v, new, angle, caches.lens)
        results.append((out, k.nan_to_num(7), v.nan_to_num(7)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def written_to(q, k_cache, v_cache, new, angle, lens):
    return compat.flash_attn_with_kvcache(q, k_cache, v_cache, new, 2 * new, angle.cos(), angle.sin(), lens)


# ---- What is refused


def given_for(device) -> dict:
    caches = Caches(device)
    q, new = torch.zeros(3, 1, HEADS, DIM, device=device), torch.zeros(3, 1, KV_HEADS, DIM, device=device)
    return dict(q=q, k_cache=caches.k, v_cache=caches.v, k=new, v=new, cache_seqlens=caches.lens)


def zeros(*sizes: int, dtype=torch.float32):
    return lambda device: torch.zeros(sizes, dtype=dtype, device=device)


TABLE = dict(rotary_cos=zeros(CAPACITY, 4), rotary_sin=zeros(CAPACITY, 4))
WRONG = [
    (dict(cache_leftpad=zeros(3, dtype=torch.int32)), NotImplementedError, "cache_leftpad: a sequence"),
    (dict(cache_seqlens=None), ValueError, "k is given without cache_seqlens"),
    (dict(cache_seqlens=zeros(2, dtype=torch.int32)), ValueError, r"cache_seqlens.shape=\(2,\) must be"),
    (dict(cache_seqlens=0.5), ValueError, "cache_seqlens=0.5 must be a tensor"),
    (dict(v=None), ValueError, "v is a NoneType"),
    (dict(k=zeros(3, 1, HEADS, DIM)), ValueError, r"k.shape=.* must be \[3, new_length, 2, 16\]"),
    (dict(k=zeros(3, 1, 2, DIM, dtype=torch.float16)), ValueError, "^k is torch.float16"),
    (TABLE | dict(k=None, v=None), ValueError, "rotary_cos goes with k and v"),
    (TABLE | dict(rotary_sin=None), ValueError, "rotary_sin is a NoneType"),
    (TABLE | dict(rotary_cos=zeros(30, 4), rotary_sin=zeros(30, 4)), ValueError, "30 positions.* for 40"),
    (dict(rotary_cos=zeros(40, 9), rotary_sin=zeros(40, 9)), ValueError, "rotary_cos turns 18 dimensions"),
    (dict(cache_batch_idx=zeros(3)), ValueError, "cache_batch_idx=.* must be a tensor of one dimension"),
    (dict(cache_batch_idx=zeros(2, dtype=torch.int32)), ValueError, r"must be \[batch\] = \[3\]"),
    (dict(cache_batch_idx=zeros(3, dtype=torch.int32), block_table=zeros(3, 1, dtype=torch.int32)),
     ValueError, "cache_batch_idx and block_table both"),
    (dict(block_table=zeros(2, 1, dtype=torch.int32)), ValueError, r"block_table.shape=\(2, 1\) must be \[3"),
    (dict(block_table=zeros(3, 1)), ValueError, "block_table.dtype=torch.float32"),
    (dict(q=zeros(2, 1, HEADS, DIM), k=None, v=None), ValueError, "batch"),
    (dict(q=zeros(3, 1, 3, DIM)), ValueError, "3 heads of queries must be a multiple of 2"),
    (dict(k_cache=zeros(3, CAPACITY, 2)), ValueError, "k_cache.shape="),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, said", WRONG, ids=[f"{i}-{min(w[0])}" for i, w in enumerate(WRONG)])
def test_errors_name_the_argument(changes, error, said, device, nothing_runs):
    made = {name: make(device) if callable(make) else make for name, make in changes.items()}
    with pytest.raises(error, match=said):
        compat.flash_attn_with_kvcache(**given_for(device) | made)


@pytest.mark.parametrize("name", ["block_table", "page_table", "k_cache", "v_cache"])
def test_names_of_caches_elsewhere_lead_to_cached_attention(name):
    x = torch.zeros(1, 1, 1, 16)
    (reason,) = tilewise.why_not(x, x, x, **{name: x})
    assert "call tilewise.cached_attention" in reason and "compat.flash_attn_with_kvcache" in reason


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_a_gradient_is_refused_before_anything_is_written(name, device):
    given = given_for(device)
    before = given["k_cache"].clone()
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} requires a gradient.*torch.no_grad\(\)"):
        compat.flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"].nan_to_num(7), before.nan_to_num(7))
    with torch.no_grad():
        assert not compat.flash_attn_with_kvcache(**given).requires_grad


def test_varlen_over_pages_has_no_gradient_and_says_so(device, nothing_runs):
    caches = Caches(device)
    q, starts, kv_starts = packed_queries(device)
    pages = caches.pages_k.requires_grad_(), caches.pages_v
    given = dict(max_seqlen_q=4, max_seqlen_k=35, block_table=caches.table)
    with pytest.raises(ValueError, match=r"^k requires a gradient, and cached_attention has none"):
        compat.flash_attn_varlen_func(q, *pages, starts, kv_starts, **given)
    with pytest.raises(ValueError, match=r"^key requires a gradient"):
        compat.varlen_attn(
            q, *pages, starts, None, 4, 35, enable_gqa=True, seqused_k=caches.lens, block_table=caches.table
        )
    for changes, said in (
        (dict(k=q), r"k.shape=.* must be \[pages, page_size"),
        (dict(cu_seqlens_k=kv_starts[:2]), "cu_seqlens_q has 4 offsets and cu_seqlens_k 2"),
        (dict(cu_seqlens_k=kv_starts.float()), "cu_seqlens_k=.* torch.int32"),
        (dict(block_table=caches.table[:2]), r"block_table.shape=\(2, 5\) must be \[3, max_pages\]"),
    ):
        arguments = dict(q=q, k=pages[0], v=pages[1], cu_seqlens_q=starts, cu_seqlens_k=kv_starts) | given
        with pytest.raises(ValueError, match=said):
            compat.flash_attn_varlen_func(**arguments | changes)
