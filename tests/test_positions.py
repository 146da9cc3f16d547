"""Positions are those of the sequence: `align` puts the queries where they stand among its keys, and what is
not clear is refused."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise
import tilewise_reference
from harness.features import build, judge
from harness.gradients import check_gradients, exact_gradients, trained
from harness.oracle import exact, kept_pairs
from harness.problem import SMALL
from tilewise import ALiBi, Causal, Documents, Padding, Prefix, RelativePosition, Window
from tilewise.plan import checks
from tilewise.plan.request import make_request, request_of
from tilewise.pytorch.plain import causal_of
from tilewise_reference import masks, scores

LENS, CAPACITY, ROWS = (5, 40, 64), 64, 3  # three queries over a buffer of keys that sequences fill so far
IMPLS = ["portable", "torch"]


def static_cache(device):
    q = torch.randn(3, 2, ROWS, 16, device=device)
    k, v = torch.randn(2, 3, 1, CAPACITY, 16, device=device)
    return q, k, v, torch.tensor(LENS, device=device)


def by_sequence(q, k, v, do, dlse, mask, *parameters):
    """out, lse and the gradients by the float64 oracle, which is given of each sequence the keys that are
    there and no align. mask(kv_len, *parameters) -> the arguments of the oracle."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *parameters)]
    outs, lses = [], []
    for b, n in enumerate(LENS):
        one = (leaves[0][b : b + 1], *(x[b : b + 1, :, :n] for x in leaves[1:3]))
        out, lse = tilewise_reference.attention(*one, **mask(n, *leaves[3:]), return_lse=True)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    grads = torch.autograd.grad((out, lse), leaves, (do.double(), dlse.double()), allow_unused=True)
    return out.detach(), lse.detach(), grads


PARTS = {
    "causal": (
        lambda at, x: dict(mask=Causal(at)),
        lambda n, x: dict(mask=[masks.causal(ROWS, n)]),
        None,
    ),
    "window": (
        lambda at, x: dict(mask=Window(4, 1, at)),
        lambda n, x: dict(mask=[masks.window(4, 1, ROWS, n)]),
        None,
    ),
    "prefix": (
        lambda at, x: dict(mask=Prefix(2, at)),
        lambda n, x: dict(mask=[masks.prefix(2, ROWS, n)]),
        None,
    ),
    "slopes": (
        lambda at, x: dict(score=ALiBi(x, at)),
        lambda n, x: dict(score=[scores.alibi(x, ROWS, n)]),
        (2,),
    ),
    "table": (
        lambda at, x: dict(score=RelativePosition(x, 12, True, at)),
        lambda n, x: dict(score=[scores.relative_position(x, ROWS, n, 12, True)]),
        (2, 8),
    ),
}


@pytest.mark.oldest
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PARTS)
def test_the_last_query_at_the_last_key_of_a_cache(device, name, impl):
    """What the oracle says of each sequence alone is what it says of them together, and so do the kernels."""
    make, of_oracle, shape = PARTS[name]
    q, k, v, lens = static_cache(device)
    parameters = [] if shape is None else [torch.randn(shape, device=device)]
    arguments = make(lens - ROWS, parameters[0] if parameters else None)
    arguments["mask"] = Padding(lens) & arguments["mask"] if "mask" in arguments else Padding(lens)
    do, dlse = torch.randn_like(q), torch.randn(q.shape[:3], device=device)
    check_gradients(q, k, v, do, dlse, **arguments, impl=impl)

    request = make_request(q, k, v, **arguments)
    oracle = lambda n, *x: of_oracle(n, *(x or (None,)))  # noqa: E731
    out, lse, grads = by_sequence(q, k, v, do, dlse, oracle, *parameters)
    for got, want in zip(exact(request), (out, lse), strict=True):
        torch.testing.assert_close(got, want)
    found = exact_gradients(request, do, dlse)
    assert list(found) == ["q", "k", "v", *trained(request)] and len(found) == 3 + len(parameters)
    for got, want in zip(found.values(), grads, strict=True):
        torch.testing.assert_close(got, want)
    other = exact(make_request(q, k, v, **arguments | make_at_the_end(arguments)))[0]
    assert not torch.allclose(other, out)  # the buffer's end is another place


def make_at_the_end(arguments):
    """The same arguments with every corner at the buffer's end."""
    changed = {}
    for name, given in arguments.items():
        parts = given.parts() if isinstance(given, tilewise.Mask) else (given,)
        for part in parts:
            if hasattr(part, "align"):
                part.align = "bottom_right"
        changed[name] = given
    return changed


def test_documents_with_keys_of_other_lengths(device):
    """Which have corners of their own in packed attention, and none that is clear in a dense call."""
    q_offsets, kv_offsets = (torch.tensor(x, device=device) for x in ([0, 2, 7], [0, 9, 20]))
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (7, 20, 20))
    documents = Documents.from_offsets(q_offsets, kv_offsets, q_len=7, kv_len=20)
    dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
    for mask in (documents & Causal(), documents & Window(3, 0), Prefix(2) & documents):
        with pytest.raises(ValueError, match=r"beside Documents with kv_ids.*packed_attention.*bottom_right"):
            tilewise.attention(*dense, mask=mask)
    check_gradients(q, k, v, mask=Causal(), q_offsets=q_offsets, kv_offsets=kv_offsets)
    check_gradients(*dense, mask=documents & Causal("bottom_right"))
    packed = exact(request_of(q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets))[0]
    together = exact(make_request(*dense, mask=documents))[0]
    torch.testing.assert_close(together, packed)


# ---- Numbers and tensors


ALIGNED = {
    "causal": lambda p, align: p.add_mask(Causal(align)),
    "window": lambda p, align: p.add_mask(Window(4, 2, align)),
    "window to the left": lambda p, align: p.add_mask(Window(None, 2, align)),
    "window to the right": lambda p, align: p.add_mask(Window(4, None, align)),
    "prefix": lambda p, align: p.add_mask(Prefix(torch.tensor([3, 9], device=p.device), align)),
    "alibi": lambda p, align: p.scores.append(ALiBi(p.randn(2, 2), align)),
    "relative position": lambda p, align: p.scores.append(RelativePosition(p.randn(2, 8), 12, True, align)),
}
ALIGNS = {
    "before": lambda d: -6,
    "far before": lambda d: -100,
    "behind": lambda d: 11,
    "far behind": lambda d: 100,
    "of each": lambda d: torch.tensor([-6, 15], device=d),
    "of each, in 32 bits": lambda d: torch.tensor([30, -3], dtype=torch.int32, device=d),
    "of every other": lambda d: torch.tensor([-2, 2**30, 8, 2**30], device=d)[::2],
    "one of all": lambda d: torch.tensor([4], device=d),
    "without dimensions": lambda d: torch.tensor(-1, device=d),
}


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("part", ALIGNED)
def test_every_part_takes_positions(device, part, align):
    p = build(device, random.Random(0), [], **SMALL)
    ALIGNED[part](p, ALIGNS[align](device))
    judge(p, backward=align in ("before", "of each"))


@pytest.mark.parametrize("part", ALIGNED)
@pytest.mark.parametrize("rows", ["packed_rows", "packed_apart"])
def test_packed_sequences_take_positions(device, part, rows):
    for align in (-3, torch.tensor([4, -2], device=device)):
        p = build(device, random.Random(1), [rows], **SMALL)
        ALIGNED[part](p, align)
        judge(p, backward=isinstance(align, torch.Tensor))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cache_takes_positions(device, impl):
    q, k, v, lens = static_cache(device)
    for align in (2, torch.tensor([1, 30, 7], device=device)):
        given = dict(mask=Causal(align), score=ALiBi(torch.ones(2, device=device), align), impl=impl)
        got = tilewise.cached_attention(q, k, v, kv_lens=lens, **given)
        want = tilewise.attention(q, k, v, **given | dict(mask=Causal(align) & Padding(lens)))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("part", [name for name in ALIGNED if name not in ("alibi", "relative position")])
def test_further_than_32_bits(device, part, sign):
    p = build(device, random.Random(0), [], **SMALL)
    ALIGNED[part](p, torch.tensor([sign * 2**40, sign * (2**31 - 1)], device=device))
    judge(p)
    bounds = p.mask.bounds(make_request(*p.tensors(), mask=p.mask).shape)
    sees = bounds.lo.clamp(min=0) < bounds.hi.clamp(max=p.kv_len)
    assert torch.equal(sees.expand(2, 2, 17), kept_pairs(make_request(*p.tensors(), mask=p.mask)).any(3))


def test_a_query_stands_where_align_says(device):
    """By hand, not by the oracle's own words."""
    at = torch.tensor([-2, 4], device=device)
    q, k = (torch.zeros(2, 1, n, 8, device=device) for n in (5, 7))
    kept = kept_pairs(make_request(q, k, k, mask=Causal(at)))
    assert kept.sum(3).tolist() == [[[0, 0, 1, 2, 3]], [[5, 6, 7, 7, 7]]]
    kept = kept_pairs(make_request(q, k, k, mask=Window(1, 0, 3)))
    assert kept.sum(3).tolist() == [[[2, 2, 2, 2, 1]]] * 2 and kept[0, 0, 0].nonzero()[:, 0].tolist() == [
        2,
        3,
    ]


@pytest.mark.parametrize(
    "align, fused", [(0, True), (6, False), (9, False), (1, None), (-1, None), ("bottom_right", None)]
)
def test_what_the_fused_kernel_of_pytorch_answers(align, fused):
    """Its causal mask begins at the top left; no mask is needed where row 0 sees every key."""
    q, k = (torch.randn(2, 1, n, 8) for n in (5, 7))
    assert causal_of(make_request(q, k, k, mask=Causal(align))) is fused
    assert causal_of(make_request(q, k, k, mask=Causal(torch.tensor([0, 0])))) is None
    check_gradients(q, k, k.clone(), mask=Causal(align), impl="torch")


def test_numbers_and_tensors_compile_two_graphs(device):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, lens, number):
        mask = Causal(lens - q.shape[2]) & Padding(lens) & Window(5, None, number)
        return tilewise.attention(q, k, k, mask=mask, impl="portable")

    for n in range(5, 12):
        q, k = (torch.randn(2, 1, rows, 8, device=device) for rows in (n - 2, n))
        lens = torch.tensor([n - 1, n], device=device)
        mask = Causal(lens - n + 2) & Padding(lens) & Window(5, None, n - 4)
        want = tilewise.attention(q, k, k, mask=mask, impl="portable")
        assert torch.equal(attend(q, k, lens, n - 4), want)
    assert counter.frame_count <= 2


# ---- What is no align, and what is not clear


@pytest.mark.parametrize(
    "align", [True, 2.0, "left", [1], torch.tensor([0.5]), torch.tensor([True]), 2**40], ids=str
)
@pytest.mark.parametrize("part", ["causal", "window", "prefix", "alibi", "relative position"])
def test_what_is_no_align(part, align):
    p = build(torch.device("cpu"), random.Random(0), [], **SMALL)
    with pytest.raises(ValueError, match=r"align.*(int32 or int64 tensor \[batch\]|must be from -)"):
        ALIGNED[part](p, align)


def test_positions_of_another_batch_are_refused(device):
    q = torch.zeros(2, 2, 3, 8, device=device)
    at = torch.zeros(3, dtype=torch.int64, device=device)
    for given in (
        dict(mask=Causal(at)),
        dict(mask=Prefix(1, at)),
        dict(score=ALiBi(torch.ones(2, device=device), at)),
        dict(score=RelativePosition(torch.ones(2, 8, device=device), align=at)),
    ):
        with pytest.raises(ValueError, match=r"align.shape=\(3,\) must broadcast to \(2,\)"):
            tilewise.attention(q, q, q, **given)


UNCLEAR = {
    "Causal": lambda align: dict(mask=Causal(align)),
    "Window": lambda align: dict(mask=Window(3, None, align)),
    "Prefix": lambda align: dict(mask=Prefix(2, align)),
    "ALiBi": lambda align: dict(score=ALiBi(torch.ones(2), align)),
    "RelativePosition": lambda align: dict(score=RelativePosition(torch.ones(2, 8), align=align)),
}


def beside(part, align, mask):
    given = UNCLEAR[part](align)
    return given | dict(mask=given["mask"] & mask if "mask" in given else mask)


@pytest.mark.parametrize("q_len", [1, 3, 9])
@pytest.mark.parametrize("lengths", [4, torch.tensor([4, 6])], ids=["number", "tensor"])
@pytest.mark.parametrize("part", UNCLEAR)
def test_a_corner_beside_padding_must_be_said(part, lengths, q_len):
    q, k = (torch.randn(2, 2, n, 8) for n in (q_len, 7))
    words = rf"{part} beside Padding, with q_len={q_len} and kv_len=7.*align=kv_lens - q_len.*'bottom_right'"
    with pytest.raises(ValueError, match=words):
        tilewise.attention(q, k, k, **beside(part, None, Padding(lengths)))
    for align in ("bottom_right", "top_left", 7 - q_len, torch.tensor([4, 6]) - q_len):
        assert tilewise.why_not(q, k, k, **beside(part, align, Padding(lengths))) == []
    assert tilewise.why_not(k, k, k, **beside(part, None, Padding(lengths))) == []  # a padded batch
    assert tilewise.why_not(q, k, k, **beside(part, None, Padding(lengths, "left"))) == []


@pytest.mark.parametrize("part", UNCLEAR)
def test_a_corner_beside_documents_with_other_keys_must_be_said(part):
    q, ids = torch.randn(2, 2, 5, 8), torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=f"{part} beside Documents with kv_ids.*packed_attention"):
        tilewise.attention(q, q, q, **beside(part, None, Documents(ids, ids.clone())))
    for mask in (
        Documents(ids),
        Documents(ids, ids),
        Documents.from_offsets(torch.tensor([0, 2, 4]), q_len=5),
    ):
        assert tilewise.why_not(q, q, q, **beside(part, None, mask)) == []
    assert tilewise.why_not(q, q, q, **beside(part, 0, Documents(ids, ids.clone()))) == []


def test_all_that_is_not_clear_is_named():
    q, k = (torch.randn(2, 2, n, 8) for n in (3, 7))
    mask = Causal() & Window(None, None) & Padding(4) & Prefix(1, "top_left")
    with pytest.raises(ValueError, match=r"^Causal and ALiBi beside Padding"):
        tilewise.attention(q, k, k, mask=mask, score=ALiBi(torch.ones(2)))
    assert tilewise.why_not(q, k, k, mask=Window(None, None) & Padding(4)) == []


def test_sequences_with_corners_of_their_own_are_clear(device):
    q, k, v, lens = static_cache(device)
    packed = [torch.randn(n, 2, 16, device=device) for n in (6, 30, 30)]
    offsets = [torch.tensor(x, device=device) for x in ([0, 1, 2, 6], [0, 10, 20, 30])]
    for mask in (Causal() & Padding(lens), Window(3, 0) & Padding(4)):
        check_gradients(*packed, mask=mask, q_offsets=offsets[0], kv_offsets=offsets[1])
        assert tilewise.cached_attention(q, k, v, kv_lens=lens, mask=mask).isfinite().all()


@pytest.mark.parametrize(
    "clear, unclear",
    [
        (Causal("bottom_right") & Padding(4), Causal() & Padding(4)),
        (Causal() & Padding(4, "left"), Causal() & Padding(4)),
        (Window(None, None) & Padding(4), Window(3, None) & Padding(4)),
    ],
)
def test_what_is_remembered_as_clear_is_told_from_what_is_not(device, clear, unclear):
    q, k = (torch.randn(2, 2, n, 8, device=device) for n in (3, 7))
    checks.check(make_request(q, k, k, mask=clear))
    with pytest.raises(ValueError, match="beside Padding"):
        checks.check(make_request(q, k, k, mask=unclear))


# ---- Documents from offsets


def test_documents_from_offsets(device):
    q_offsets, kv_offsets = (torch.tensor(x, device=device) for x in ([1, 3, 3, 6], [0, 2, 4, 5]))
    mask = Documents.from_offsets(q_offsets.int(), kv_offsets, q_len=8, kv_len=7)
    assert mask.ids.tolist() == [-1, 0, 0, 2, 2, 2, -1, -1]
    assert mask.kv_ids.tolist() == [0, 0, 1, 1, 2, -2, -2]
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (8, 7, 7))
    out = tilewise.attention(q, k, v, mask=mask)
    assert not out[:, :, [0, 6, 7]].any() and out[:, :, 1:6].any(3).all()
    check_gradients(q, k, v, mask=mask)
    alike = Documents.from_offsets(q_offsets, q_len=8)
    assert alike.are_alike and not mask.are_alike
    assert alike.kv_ids.tolist() == [-2, 0, 0, 2, 2, 2, -2, -2]
    check_gradients(*(x[:, :, :8] for x in torch.randn(3, 1, 2, 8, 8, device=device)), mask=alike & Causal())
    assert not Documents.from_offsets(q_offsets, q_len=8, kv_len=9).are_alike


@pytest.mark.parametrize("wrong", [torch.tensor([0.0, 3.0]), torch.tensor([0]), [0, 3]], ids=str)
def test_what_is_no_offsets(wrong):
    with pytest.raises(ValueError, match="q_offsets"):
        Documents.from_offsets(wrong, q_len=3)
