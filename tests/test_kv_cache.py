"""`nn.KVCache` and `nn.PagedKVCache`: whatever comes in whichever pieces, as dense attention has it."""

import random

import pytest
import torch
import torch.nn.functional as F

from harness.oracle import _assert_close
from tilewise import Causal
from tilewise.nn import CacheFull, KVCache, PagedKVCache, Rotary
from tilewise_reference.yardstick import largest_difference

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
IMPLS = ("torch", "portable")


class Text:
    """q [length, heads, dim], k and v of a whole text, and how far attention has got."""

    def __init__(self, length, device, begins=None, at=0):
        sizes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
        self.qkv = [torch.randn(length, *size, device=device) for size in sizes]
        self.done, self.at, self.rotary = [], at, None
        if begins is not None:
            for mine, other in zip(self.qkv, begins.qkv, strict=True):
                mine[:at] = other[:at]

    @property
    def left(self):
        return len(self.qkv[0]) - self.at

    def take(self, count):
        """The next rows of q, k and v, [count, heads, dim]."""
        self.at += count
        return [x[self.at - count : self.at] for x in self.qkv]

    def result(self, dtype):
        """Causal attention over the whole text so far, [rows, heads, value_dim]: the last rows in `done`."""
        q, k, v = (x[: self.at].transpose(0, 1)[None].to(dtype) for x in self.qkv)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return whole[0].transpose(0, 1)[self.at - sum(map(len, self.done)) :]


def packed(texts, counts):
    """The next rows of several texts behind one another, and the offsets."""
    rows = [torch.cat(parts) for parts in zip(*map(Text.take, texts, counts), strict=True)]
    return rows, torch.tensor([0, *counts], device=rows[0].device).cumsum(0).to(torch.int32)


def batched(texts, count):
    """The next rows of several texts, as many of each: [batch, heads, count, dim]."""
    taken = [text.take(count) for text in texts]
    return [torch.stack(parts).transpose(1, 2) for parts in zip(*taken, strict=True)]


def unpack(texts, counts, out):
    for text, rows in zip(texts, out.split(list(counts)), strict=True):
        text.done.append(rows)


def unbatch(texts, out):
    for text, rows in zip(texts, out.transpose(1, 2), strict=True):
        text.done.append(rows)


def check(*texts):
    """All that came out, held to the rule of `harness.oracle`."""
    found = torch.cat([rows for text in texts for rows in text.done])
    exactly, in_dtype = (
        torch.cat([text.result(dtype) for text in texts]) for dtype in (torch.float64, torch.float32)
    )
    _assert_close("out", found, exactly, largest_difference(in_dtype, exactly))


def paged(device, pages=12, page_size=3, **options):
    return PagedKVCache(pages, page_size, KV_HEADS, DIM, VALUE_DIM, device=device, **options)


def feed(cache, sequences, texts, counts, **arguments):
    """The next rows of some texts through a paged cache."""
    (q, k, v), _ = packed(texts, counts)
    arguments = {"mask": Causal(), "impl": "torch"} | arguments
    unpack(texts, counts, cache.attend(sequences, q, k, v, new_lens=counts, **arguments))


# ---- In one piece


@pytest.mark.parametrize("turned", [False, True], ids=["as_is", "rotary"])
@pytest.mark.parametrize("impl", IMPLS)
def test_contiguous_is_dense(impl, turned, device):
    cache = KVCache(3, KV_HEADS, 20, DIM, VALUE_DIM, device=device)
    texts = [Text(20, device) for _ in range(3)]
    arguments = {"mask": Causal(), "impl": impl}
    if turned:
        rotary = Rotary(DIM)
        arguments["rotary"] = rotary.table(20, device)
        for text in texts:
            text.rotary = rotary
    (q, k, v), offsets = packed(texts, [5, 1, 9])
    unpack(texts, [5, 1, 9], cache.attend(q, k, v, q_offsets=offsets, max_new=9, **arguments))
    assert cache.lens.tolist() == [5, 1, 9] and cache.longest == 9
    for count in (1, 4, 1, 2):
        unbatch(texts, cache.attend(*batched(texts, count), **arguments))
    assert cache.lens.tolist() == [13, 9, 17] and cache.longest == 17
    check(*texts)


def test_reset_and_rows_appended_alone(device):
    cache = KVCache(2, KV_HEADS, 9, DIM, VALUE_DIM, device=device)
    cache.attend(*batched([Text(9, device), Text(9, device)], 9), impl="torch")
    cache.reset()
    texts = [Text(8, device), Text(8, device)]
    for count in (2, 5):
        cache.append(*batched(texts, count)[1:])
    assert cache.lens.tolist() == [7, 7] and cache.longest == 7
    unbatch(texts, cache.attend(*batched(texts, 1), mask=Causal(), impl="torch"))
    check(*texts)


def test_a_full_cache_loses_nothing(device):
    cache = KVCache(2, KV_HEADS, 6, DIM, VALUE_DIM, device=device)
    texts = [Text(6, device), Text(6, device)]
    unbatch(texts, cache.attend(*batched(texts, 5), mask=Causal(), impl="torch"))
    before = cache.k.clone(), cache.v.clone()
    q, k, v = batched([Text(2, device), Text(2, device)], 2)
    said = "2 more rows do not fit: the cache has room for 6 a sequence, and up to 5 are filled"
    for call in (lambda: cache.attend(q, k, v), lambda: cache.append(k, v)):
        with pytest.raises(CacheFull, match=said):
            call()
    assert all(map(torch.equal, map(torch.nan_to_num, before), map(torch.nan_to_num, (cache.k, cache.v))))
    assert cache.lens.tolist() == [5, 5] and cache.longest == 5
    unbatch(texts, cache.attend(*batched(texts, 1), mask=Causal(), impl="torch"))
    check(*texts)


def test_the_bound_of_packed_rows(device):
    """The host reads no offset: without max_new all rows might be one sequence's."""
    cache = KVCache(2, KV_HEADS, 6, DIM, device=device)
    q, new = torch.randn(8, HEADS, DIM, device=device), torch.randn(8, KV_HEADS, DIM, device=device)
    offsets = torch.tensor([0, 4, 8], device=device)
    with pytest.raises(CacheFull, match="8 more rows do not fit"):
        cache.attend(q, new, new, q_offsets=offsets, impl="torch")
    cache.attend(q, new, new, q_offsets=offsets, max_new=4, impl="torch")
    assert cache.lens.tolist() == [4, 4] and cache.lens.dtype == torch.int32 and cache.longest == 4


def test_a_mistake_counts_no_row(device):
    cache = KVCache(2, KV_HEADS, 6, DIM, VALUE_DIM, device=device)
    q, k, _ = batched([Text(2, device), Text(2, device)], 2)
    with pytest.raises(ValueError, match=r"new_v\.shape"):
        cache.attend(q, k, k)
    assert cache.lens.tolist() == [0, 0] and cache.longest == 0
    with pytest.raises(ValueError, match="capacity=0 must be an int of at least 1"):
        KVCache(2, KV_HEADS, 0, DIM)


# ---- In pages


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("impl", IMPLS)
def test_paged_is_dense(impl, page_size, device):
    """Random numbers of rows for random sequences, some of them none; then one row each."""
    cache = paged(device, pages=60 // page_size + 3, page_size=page_size)
    texts = [Text(20, device) for _ in range(3)]
    sequences = [cache.allocate() for _ in texts]
    for _ in range(4):
        chosen = torch.randperm(3)[:2].tolist()
        counts = torch.randint(0, 5, (2,)).tolist()
        feed(cache, [sequences[i] for i in chosen], [texts[i] for i in chosen], counts, impl=impl)
    for _ in range(2):
        unbatch(texts, cache.attend(sequences, *batched(texts, 1), mask=Causal(), impl=impl))
    assert [cache.length(each) for each in sequences] == [text.at for text in texts]
    used = sum(-(-text.at // page_size) for text in texts)
    assert cache.free_pages == len(cache.k[0]) - used
    check(*texts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [3, 4])
def test_forks_diverge(length, impl, device):
    """At the edge of a page and within one; both sequences write, either first."""
    cache = paged(device)
    text = Text(9, device)
    a = cache.allocate()
    feed(cache, [a], [text], [5])
    free = cache.free_pages
    b, c = cache.fork(a, length), cache.fork(a)
    assert cache.free_pages == free and [cache.length(each) for each in (a, b, c)] == [5, length, 5]
    others = [Text(9, device, text, length), Text(9, device, text, 5)]
    feed(cache, [b], others[:1], [2], impl=impl)
    unbatch([text, *others], cache.attend([a, b, c], *batched([text, *others], 1), mask=Causal(), impl=impl))
    feed(cache, [c, a], [others[1], text], [2, 3], impl=impl)
    check(text, *others)
    for each in (a, b, c):
        cache.free(each)
    assert cache.free_pages == len(cache.k[0])


def test_the_last_of_a_page_needs_no_copy(device):
    """Two that share a page and both write to it need one page more, not two."""
    cache = paged(device, pages=2, page_size=4)
    text = Text(4, device)
    a = cache.allocate()
    feed(cache, [a], [text], [2])
    b = cache.fork(a)
    other = Text(4, device, text, 2)
    feed(cache, [a, b], [text, other], [2, 2])
    assert cache.free_pages == 0
    check(text, other)
    cache.free(a)
    c = cache.fork(b, 3)
    cache.free(b)
    assert cache.free_pages == 1  # the page that b had is c's alone, who writes to it as it is
    last = Text(4, device, other, 3)
    feed(cache, [c], [last], [1])
    assert cache.free_pages == 1
    check(last)


@pytest.mark.parametrize("impl", IMPLS)
def test_pages_that_were_others(impl, device):
    cache = paged(device, pages=4)
    texts = [Text(9, device), Text(9, device)]
    a, b = cache.allocate(), cache.allocate()
    feed(cache, [a, b], texts, [7, 2])
    assert cache.free_pages == 0
    shared = cache.fork(b)
    cache.free(a)
    cache.free(b)
    assert cache.free_pages == 3  # the last page is still the fork's
    mine = cache.batch([shared])[1][0, 0].item()
    others = [page for page in range(4) if page != mine]
    cache.k[:, others], cache.v[:, others] = torch.nan, torch.nan
    c = cache.allocate()
    assert c not in (a, b, shared)
    text, again = Text(8, device), Text(3, device, texts[1], 2)
    feed(cache, [c], [text], [4], impl=impl)
    feed(cache, [shared, c], [again, text], [1, 1], impl=impl)
    check(text, again)


def test_full_pages_lose_nothing(device):
    cache = paged(device, pages=4)
    text, other = Text(9, device), Text(9, device)
    a = cache.allocate()
    feed(cache, [a], [text], [4])
    b, c = cache.fork(a), cache.allocate()
    before, free = [cache.batch([each]) for each in (a, b, c)], cache.free_pages
    pools = cache.k.nan_to_num(), cache.v.nan_to_num()
    # A copy of the page that a and b share, a page for b, and one for c: two are free.
    said = r"pages needed: 3, free: 2 of 4; free\(\) a sequence"
    rows = [torch.randn(8, heads, DIM, device=device) for heads in (HEADS, KV_HEADS)]
    with pytest.raises(CacheFull, match=said):
        cache.attend([c, b], rows[0], rows[1], rows[1][..., :VALUE_DIM], new_lens=[3, 5], impl="torch")
    with pytest.raises(CacheFull, match=said):
        cache.reserve([b, c], [5, 3])
    assert cache.free_pages == free
    for each, (lens, pages) in zip((a, b, c), before, strict=True):
        now = cache.batch([each])
        assert torch.equal(now[0], lens) and torch.equal(now[1], pages)
    assert torch.equal(cache.k.nan_to_num(), pools[0]) and torch.equal(cache.v.nan_to_num(), pools[1])
    cache.free(b)
    feed(cache, [a, c], [text, other], [5, 2])
    check(text, other)


def test_what_is_reserved_is_not_taken_again(device):
    cache = paged(device, pages=3)
    text = Text(9, device)
    a = cache.allocate()
    for rows in (7, 2, 9):
        cache.reserve([a], rows)
        assert cache.free_pages == 0 and cache.length(a) == 0
    feed(cache, [a], [text], [9])
    check(text)


@pytest.mark.parametrize("impl", IMPLS)
def test_layers_share_a_table(impl, device):
    """Each layer has rows of its own; a step that is broken off counts none; a copied page is all layers'."""
    cache = paged(device, pages=8, layers=2)
    texts = [[Text(7, device), Text(7, device)] for _ in range(2)]  # a layer, a sequence
    a, b = cache.allocate(), cache.allocate()
    broken = cache.step([a, b], [4, 2])
    junk = [torch.full((6, heads, dim), 9.0, device=device) for heads, dim in ((4, 8), (2, 8), (2, 6))]
    broken.attend(*junk, impl="torch")
    assert cache.length(a) == 0

    def run(sequences, counts, texts):
        step = cache.step(sequences, counts)
        for layer in range(2):
            assert cache.length(sequences[0]) == texts[layer][0].at
            (q, k, v), offsets = packed(texts[layer], counts)
            out = step.attend(q, k, v, layer=layer, mask=Causal(), impl=impl)
            unpack(texts[layer], counts, out)
            assert torch.equal(step.q_offsets, offsets)
        return step

    step = run([a, b], [4, 2], texts)
    assert step.kv_lens.tolist() == [0, 0] and cache.length(a) == 4 and cache.length(b) == 2
    c = cache.fork(b)
    third = [[Text(7, device, layer[1], 2)] for layer in texts]
    run([b], [1], [layer[1:] for layer in texts])
    run([c], [3], third)
    check(*texts[0], *texts[1], third[0][0], third[1][0])
    with pytest.raises(ValueError, match="a step serves once"):
        step.attend(*junk, impl="torch")
    with pytest.raises(ValueError, match="layer=2 must be from 0 to 1"):
        broken.attend(*junk, layer=2)


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_whatever_comes_goes_and_forks(page_size, device):
    """Random calls, against a plain list of rows for each sequence; a cache that is often full."""
    draw = random.Random(page_size)
    cache = PagedKVCache(8, page_size, 1, 1, device=device)
    rows, full, forked = {}, 0, 0
    for _ in range(150):
        what = draw.choice(["allocate", "append", "append", "append", "fork", "free"])
        if what == "allocate" and len(rows) < 4:
            rows[cache.allocate()] = []
        elif what == "fork" and rows and len(rows) < 4:
            parent = draw.choice(list(rows))
            length = draw.randint(0, len(rows[parent]))
            rows[cache.fork(parent, length)] = rows[parent][:length]
            forked += length % page_size > 0
        elif what == "free" and rows:
            gone = draw.choice(list(rows))
            cache.free(gone)
            del rows[gone]
        elif what == "append" and rows:
            chosen = draw.sample(list(rows), draw.randint(1, len(rows)))
            counts = [draw.randint(0, 4) for _ in chosen]
            new = torch.randn(sum(counts), 1, 1, device=device)
            try:
                cache.attend(chosen, new, new, -new, new_lens=counts, impl="torch")
            except CacheFull:
                full += 1
            else:
                for each, part in zip(chosen, new.flatten().split(counts), strict=True):
                    rows[each] = rows[each] + part.tolist()
        used = set()
        for each, wanted in rows.items():
            lens, pages = cache.batch([each])
            assert lens.tolist() == [len(wanted)]
            pages = pages[0, : -(-len(wanted) // page_size)].long()
            used |= set(pages.tolist())
            for pool, sign in ((cache.k, 1), (cache.v, -1)):
                assert (sign * pool[0, pages].flatten()[: len(wanted)]).tolist() == wanted
        assert cache.free_pages == 8 - len(used)
    assert full and (forked or page_size == 1)


def test_mistakes_with_sequences(device):
    cache = paged(device)
    a, b = cache.allocate(), cache.allocate()
    cache.free(b)
    for call in (cache.free, cache.fork, cache.length, lambda s: cache.reserve([a, s], 1)):
        with pytest.raises(ValueError, match="sequence 1 is not in the cache"):
            call(b)
    with pytest.raises(ValueError, match=r"a sequence is named twice in \[0, 0\]"):
        cache.reserve([a, a], 1)
    with pytest.raises(ValueError, match="length=1 must be from 0 to the 0 rows of sequence 0"):
        cache.fork(a, 1)
    for rows in ([1, 2], -1):
        with pytest.raises(ValueError, match="must be one number, or one a sequence for 1"):
            cache.reserve([a], rows)
    q, k, v = batched([Text(2, device)], 2)
    with pytest.raises(ValueError, match="has 2 rows, and the step is for"):
        cache.step([a], 1).attend(q, k, v)
    with pytest.raises(ValueError, match="page_size=0 must be an int of at least 1"):
        paged(device, page_size=0)
    assert cache.length(a) == 0
