"""Masks joined by `|` and turned by `~`: every pair that counts, none that does not, and hulls to skip by."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import OPERANDS, Problem, build, dilated_keep, dilated_keep_twin, judge
from harness.oracle import check, kept_pairs
from tilewise import AnyOf, BlockCausal, Causal, Documents, Intervals, Not, Padding, UserMask, Window
from tilewise.api import answer
from tilewise.kernels.tile import Tile
from tilewise.parts.masks.algebra import All
from tilewise.parts.masks.mask import as_mask
from tilewise.parts.place import Place
from tilewise.plan.look import look
from tilewise.plan.request import make_request, request_of
from tilewise.pytorch.encoding import decode, encode
from tilewise.tools.explain.coverage import evaluate

SIZES = dict(batch=1, q_len=17, kv_len=20)


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(Tile(16, 16)):
        yield


def drawn(name: str, device: torch.device, seed: int = 0, **sizes: int) -> Problem:
    """A problem with this mask feature that keeps some pairs and leaves out some, so that ~ does too."""
    for attempt in range(seed * 100, seed * 100 + 100):
        p = build(device, random.Random(f"{name} {attempt}"), [name], **(SIZES | sizes))
        keep = kept_pairs(make_request(*p.tensors(), mask=p.mask))
        if 0.05 < keep.float().mean() < 0.95:
            return p
    raise AssertionError(name)


def bits(tensors: tuple[torch.Tensor, ...], mask: object) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out, lse = tilewise.attention(q, k, v, mask=mask, return_lse=True, impl="portable")
    do = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return [out, lse, *torch.autograd.grad(out, (q, k, v), do)]


# ---- What operators make of every kind of mask


@pytest.mark.parametrize("name", [each.__name__ for each in OPERANDS])
def test_every_mask_inside_of_others(name, device):
    """A mask inside `&` inside `|`, and its opposite, forward and backward against float64."""
    p = drawn(name, device)
    mask = as_mask(p.mask)
    p.mask = mask & Window(None, 9, "top_left") | ~mask & Window(2, 1, "bottom_right")
    judge(p, backward=True)


def test_de_morgan_to_the_last_bit(device):
    given = drawn("causal", device).tensors()
    ids = torch.arange(20, device=device) // 7
    a, b = Window(7, 4, "top_left"), Documents(ids[:17], ids)
    for one, other in (
        (Not(AnyOf(a, b)), ~a & ~b),
        (~(a & b), ~a | ~b),
        (a & (b | a), a),
    ):
        for x, y in zip(bits(given, one), bits(given, other), strict=True):
            assert torch.equal(x, y), (one, other)


def test_disjoint_causal_pieces_make_the_whole(device):
    """Runs of keys, of each of which one part sees the past, are the past."""
    given = drawn("causal", device).tensors()
    start = [Intervals(*torch.tensor([[n], [n + 16]], device=device)) for n in range(0, 32, 16)]
    causal = Causal("bottom_right")
    wanted = bits(given, causal)
    for mask in (AnyOf(*[causal & each for each in start]), (start[0] | ~start[0]) & causal):
        for ours, theirs in zip(bits(given, mask), wanted, strict=True):
            assert torch.equal(ours, theirs), mask


def test_keys_that_nobody_sees_may_be_nan(device):
    p = drawn("causal", device)
    q, k, v = p.tensors()
    mask = (
        Window(3, 0, "top_left") & Padding(4)
        | ~Padding(18)
        | Intervals(*torch.tensor([[9], [11]]).to(device))
    )
    hidden = ~kept_pairs(make_request(q, k, v, mask=mask)).any(2)[..., None]
    assert hidden.any() and not hidden.all()
    results = []
    for junk in (0.0, torch.nan):
        dirty = [x.masked_fill(hidden, junk).requires_grad_() for x in (k, v)]
        out = tilewise.attention(q, *dirty, mask=mask, impl="portable")
        results.append([out, *torch.autograd.grad(out.sum(), dirty)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


# ---- Intervals, and what walks make of them


@pytest.mark.parametrize("name", ["either", "opposite"])
def test_bounds_are_those_of_the_device_function(name, device):
    asked = 0
    for seed in range(25):
        p = build(device, random.Random(f"{name} {seed}"), [name], **(SIZES | dict(batch=2)))
        request = make_request(*p.tensors(), mask=p.mask)
        for mask in request.masks:
            bounds, bound = mask.bounds(request.shape), mask.bind(request.shape)
            if bounds is None:
                continue
            asked += 1
            found = evaluate(bound, request.shape, device)
            for ours, theirs in zip(bounds, found, strict=True):
                assert torch.equal(ours.expand(request.shape.scores[:3]), theirs), mask
    assert asked > 10


@triton.jit
def coverage_kernel(
    found_ptr, q_len, kv_len, args, COVERAGE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """What the rows of a head of a batch see of runs of keys, [batch, 2, ROWS, RUNS]."""
    batch, head = tl.program_id(0), tl.program_id(1)
    rows, runs = tl.arange(0, ROWS)[:, None], tl.arange(0, RUNS)[None, :]
    first, last = tl.minimum(runs * RUN, kv_len - 1), tl.minimum(runs * RUN + RUN - 1, kv_len - 1)
    found = COVERAGE(tl.minimum(rows, q_len - 1), first, last, batch, head, args)
    at = ((batch * 2 + head) * ROWS + rows) * RUNS + runs
    tl.store(found_ptr + at, found + rows * 0 + runs * 0)


@pytest.mark.parametrize("name", ["either", "opposite", "neighborhood"])
def test_a_coverage_says_only_what_is_sure(name, device):
    sure = pairs = 0
    for seed in range(16):
        rng = random.Random(f"{name} {seed}")
        p = build(device, rng, [name], q_len=19, kv_len=rng.choice((45, 36, 30)))
        request, run = make_request(*p.tensors(), mask=p.mask), rng.choice((1, 4, 16))
        for mask in request.masks:
            bound = mask.bind(request.shape)
            if bound.coverage is None:
                continue
            found = torch.zeros(2, 2, 32, 64, dtype=torch.int32, device=device)
            coverage_kernel[(2, 2)](
                found, 19, p.kv_len, bound.args, COVERAGE=bound.coverage, ROWS=32, RUNS=64, RUN=run
            )
            keep = kept_pairs(replace(request, masks=(mask,)))
            for i, of_run in enumerate(keep.split(run, -1)):
                said, some, every = found[:, :, :19, i], of_run.any(-1), of_run.all(-1)
                assert not (some & (said == 0)).any() and not (~every & (said == 2)).any(), (mask, i, run)
                sure += int((said == some.int() + every.int()).sum())
                pairs += said.numel()
    assert sure > 0.5 * pairs


@pytest.mark.parametrize(
    ("mask", "visited"),
    [
        (Window(15, 0) | Intervals(torch.tensor(0), torch.tensor(16)), "a band and the first tile"),
        (~Causal("top_left"), "behind the diagonal"),
        (Causal("top_left") | Padding(32), "a prefix and the past"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_tiles_are_skipped_by_the_hull(mask, visited):
    tiles, shape = 6, request_of(*(torch.zeros(1, 1, 96, 16) for _ in range(3))).shape
    bounds = mask.bounds(shape)
    lo, hi = (x.flatten().expand(96).unflatten(0, (tiles, 16)) for x in bounds[:2])
    found = {(i, int(j)) for i in range(tiles) for j in range(lo[i].min() // 16, -(-hi[i].max() // 16))}
    every = set(itertools.product(range(tiles), range(tiles)))
    wanted = {
        "a band and the first tile": {(i, j) for i, j in every if j <= i},
        "behind the diagonal": {(i, j) for i, j in every if j >= i},
        "a prefix and the past": {(i, j) for i, j in every if j <= max(i, 1)},
    }
    assert found == wanted[visited]
    assert bool(bounds.whole.all()) == (visited != "a band and the first tile")


# ---- Other ways into a call


@pytest.mark.parametrize("rows", ["packed_rows", "packed_apart", "cached_rows", "paged_rows"])
def test_packed_and_cached(rows, device):
    masks = (
        lambda p: Causal() & Window(5, None) | Intervals(p.integers(0, 3, 21), p.integers(4, 9, 21)),
        lambda p: ~(Causal() & Window(6, 0)) & Padding(p.integers(0, p.kv_len, p.batch)),
    )
    for seed, make in enumerate(masks):
        p = build(device, random.Random(seed), [rows], q_len=21, kv_len=21 if rows == "packed_rows" else 37)
        p.mask = make(p)
        judge(p, backward=seed == 0)


def test_nothing_counts_beyond_tensors_that_are_too_short(device):
    """A packed sequence that is longer than a tensor of a mask: `~` finds nothing there either."""
    q = torch.randn(40, 2, 16, device=device)
    offsets = torch.tensor([0, 40], device=device)
    short = torch.zeros(20, dtype=torch.int32, device=device)
    mask = ~Intervals(short, short + 4)
    given = dict(q_offsets=offsets, impl="portable", return_lse=True)
    out, lse = tilewise.packed_attention(q, q, q, mask=mask, **given)
    assert lse[:, :20].isfinite().all() and lse[:, 20:].isneginf().all() and not out[20:].any()
    assert torch.equal(lse, tilewise.packed_attention(q, q, q, mask=mask | mask, **given)[1])


@pytest.mark.parametrize("impl", ["portable", "torch"])
def test_a_part_of_a_larger_call(impl, device):
    p = build(device, random.Random(3), [], q_len=24, kv_len=40, q_heads=2, kv_heads=1)
    p.mask = (Causal(p.integers(-3, 20, 2)) & (p.randn(2, 24, 40) > 0)) | ~Window(9, 5, "top_left")
    request = request_of(*p.tensors(), mask=p.mask, impl=impl)
    whole = answer(request, True)
    rows, keys = slice(8, 24), (slice(0, 12), slice(12, 40))
    parts = []
    for each in keys:
        place = Place(*request.shape[:5], first_row=8, first_key=each.start)
        k, v = request.k[:, :, each], request.v[:, :, each]
        parts.append(answer(replace(request, q=request.q[:, :, rows], k=k, v=v, place=place), True))
    out, lse = tilewise.merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole[0][:, :, rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole[1][:, :, rows], rtol=1e-5, atol=1e-5)


def nested(device: torch.device, twin: object = dilated_keep_twin) -> tilewise.Mask:
    kept = UserMask(dilated_keep, (3,), twin=twin)
    lengths = torch.tensor([4, 9], device=device)
    return ~(Causal(1) & (kept | Padding(lengths))) | Window(2, 0, lengths) & Not(kept)


def test_encoded_and_decoded(device):
    """Masks in masks come back whole, with the twins of functions in them, and tensors in their order."""
    q = torch.randn(2, 2, 9, 16, device=device)
    request = make_request(q, q, q, mask=nested(device) & Causal("top_left"), impl="torch")
    encoded = encode(request)
    again = decode(q, q, q, encoded)
    assert list(map(repr, again.masks)) == list(map(repr, request.masks))
    names = [name for name, _ in request.other_tensors]
    assert names == ["Padding.kv_lens", "Window.align"] == [name for name, _ in again.other_tensors]
    assert all(x is y for (_, x), y in zip(request.other_tensors, encoded.tensors, strict=True))
    assert torch.equal(answer(again, False)[0], answer(request, False)[0])
    check(q, q, q, mask=nested(device))


def test_made_inside_of_a_compiled_function(device):
    q = torch.randn(1, 2, 17, 16, device=device)

    def call(q: torch.Tensor) -> torch.Tensor:
        return tilewise.attention(q, q, q, mask=Not(Causal()) & Window(4, 4) | Padding(3), impl="portable")

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q), call(q))


def test_calls_look_alike_where_their_masks_do(device):
    q = torch.randn(2, 2, 9, 16, device=device)

    def seen(mask: tilewise.Mask) -> object:
        return look(make_request(q, q, q, mask=mask, impl="portable"), False)[0]

    lengths = torch.tensor([4, 9], device=device)
    masks = [Window(2, 0) | Padding(4), Window(2, 1) | Padding(4), Window(2, 0) | Padding(lengths),
             Window(2, 0) & Padding(4), ~(Window(2, 0) & Padding(4)), ~Padding(4), Padding(4)]  # fmt: skip
    looks = [seen(mask) for mask in masks]
    assert len(set(looks)) == len(masks)
    assert seen(Window(2, 0) | Padding(lengths + 1)) == looks[2]


# ---- How it is written, and what is refused


def test_it_is_written_as_it_reads():
    a, b, c = Causal(), Window(3, 0), BlockCausal(4)
    tensor = torch.ones(5, 7).bool()
    for mask, text in (
        (a | b & c, "Causal() | Window(3, 0) & BlockCausal(4)"),
        ((a | b) & c, "(Causal() | Window(3, 0)) & BlockCausal(4)"),
        (~(a & b) | ~c, "~(Causal() & Window(3, 0)) | ~BlockCausal(4)"),
        (~(a | b), "~Causal() & ~Window(3, 0)"),
        (Not(a | b), "~(Causal() | Window(3, 0))"),
        (~~a, "Causal()"),
        (tensor | a, "Dense(tensor[5, 7]) | Causal()"),
        (a | tensor, "Causal() | Dense(tensor[5, 7])"),
        (dilated_keep | a, "UserMask(dilated_keep) | Causal()"),
        (AnyOf(a | b, All(c)), "Causal() | Window(3, 0) | BlockCausal(4)"),
    ):
        assert repr(mask) == text


def test_what_is_no_mask_algebra_says_so(device):
    with pytest.raises(
        TypeError, match=r"^Causal\(\) is a mask and neither true nor false.*write &, \| and ~"
    ):
        Causal() and Window(3, 0)
    with pytest.raises(ValueError, match="mask=3 must be a tilewise mask"):
        Causal() | 3
    with pytest.raises(ValueError, match="must have masks"):
        AnyOf()
    q, k = torch.zeros(2, 1, 3, 16, device=device), torch.zeros(2, 1, 5, 16, device=device)
    wrong = ~Padding(torch.tensor([1, 2, 3], device=device)) | Causal("top_left")
    (said,) = tilewise.why_not(q, k, k, mask=wrong)
    assert "~Padding(tensor[3]): Padding: kv_lens.shape=(3,) must broadcast to (2,)" in said
    (said,) = tilewise.why_not(q, k, k, mask=~Causal() | Padding(4))
    assert said.startswith("Causal beside Padding, with q_len=3 and kv_len=5")
    unseen = UserMask(dilated_keep, (2,))
    (said,) = tilewise.why_not(q, k, k, mask=~unseen & Causal(0), impl="torch")
    assert "UserMask(dilated_keep) has no twin" in said
    dense = torch.ones(3, 5, dtype=torch.bool, device=device)
    (said,) = tilewise.why_not(q, k, k, mask=~(Causal(0) & dense), strict=True)
    assert "mask.shape=(3, 5) holds a number for every pair" in said
