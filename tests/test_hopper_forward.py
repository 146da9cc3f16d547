"""The Hopper forward against float64: its own source, run in the emulator where there is no GPU.

Where a Hopper GPU is present, it answers every problem of the portable kernel's tests too: `harness.oracle`.
"""

from __future__ import annotations

import random

import pytest
import torch

import tilewise
from harness.features import FEATURES, judge
from harness.gradients import check_gradients
from harness.hopper import DRAWN, HOPPER, REFUSED, problem, taken
from harness.oracle import check
from tilewise import Causal, Padding, Prefix, Softcap, Window
from tilewise.kernels.hopper import launch
from tilewise.kernels.tile import HopperTile
from tilewise.plan import tiles
from tilewise.plan.bind import bind
from tilewise.plan.request import make_request

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU (sm_90), or none: then it runs in the emulator", allow_module_level=True)


@pytest.mark.parametrize("name", [name for name in FEATURES if FEATURES[name].kind != "tile"])
def test_every_feature_is_taken_and_right_or_refused(device, name):
    p = problem(device, name, seed=len(name))
    assert taken(p) == (name not in REFUSED) or name in DRAWN
    if taken(p):
        judge(p)


@pytest.mark.oldest
@pytest.mark.parametrize("seed", range(10))
def test_features_of_every_kind_at_once(device, seed):
    """Any combination of what is taken is taken."""
    rng = random.Random(seed)
    names = []
    for kind in ("heads", "lengths", "similarity", "scale", "score", "bias", "sink", "mask"):
        names.append(rng.choice([n for n, f in FEATURES.items() if f.kind == kind and n not in REFUSED]))
    p = problem(device, *names, seed=seed)
    assert taken(p), names
    judge(p)


# ---- Sizes

DIMS = [(8, 8), (64, 64), (72, 72), (128, 128), (192, 128), (64, 256), (256, 256), (80, 40), (96, 160)]


@pytest.mark.parametrize("head_dim, value_dim", DIMS)
def test_dimensions(device, head_dim, value_dim):
    q, k = (torch.randn(1, 1, n, head_dim, device=device).half() for n in (70, 45))
    check(q, k, torch.randn(1, 1, 45, value_dim, device=device).half(), mask=Causal(), **HOPPER)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 70), (64, 32), (65, 33), (129, 64), (200, 31)])
def test_lengths_around_its_tiles(device, q_len, kv_len):
    q = torch.randn(1, 2, q_len, 16, device=device).bfloat16()
    k, v = torch.randn(2, 1, 1, kv_len, 16, device=device).bfloat16()
    for mask in (None, Causal(), Causal("top_left"), Window(20, 3)):
        check(q, k, v, mask=mask, **HOPPER)


def test_positions_of_each_sequence(device):
    """Three rows over keys of which 20, 77 and 100 are there, and one that begins before the first key."""
    q = torch.randn(4, 2, 3, 16, device=device).bfloat16()
    k, v = torch.randn(2, 4, 1, 100, 16, device=device).bfloat16()
    lens = torch.tensor([20, 77, 100, 2], device=device)
    for mask in (Causal(lens - 3), Window(30, 0, lens - 3), Prefix(5, lens - 3)):
        slopes = torch.randn(2, device=device)
        check(q, k, v, mask=mask & Padding(lens), score=tilewise.ALiBi(slopes, lens - 3), **HOPPER)


TILES = {
    "three warpgroups": HopperTile(192, 32, 12, 2),
    "one stage": HopperTile(128, 16, 8, 1),
    "three stages": HopperTile(128, 16, 8, 3),
    "four stages": HopperTile(128, 16, 8, 4),
    "out of turn": HopperTile(128, 32, 8, 2, has_turns=False),
    "three out of turn": HopperTile(192, 16, 12, 1, has_turns=False),
    "Q in registers": HopperTile(128, 32, 8, 2, is_q_in_registers=True),
    "four producer warps": HopperTile(128, 16, 8, 2, producer_warps=4),
    "O through Q's place": HopperTile(128, 64, 8, 3),
    "O through a piece of Q's place": HopperTile(128, 128, 8, 2),
}
WIDE = {"O through Q's place": (256, 256), "O through a piece of Q's place": (192, 128)}


@pytest.mark.parametrize("name", TILES)
def test_tiles(device, name):
    head_dim, value_dim = WIDE.get(name, (32, 32))
    q = torch.randn(1, 2, 150 if name in WIDE else 250, head_dim, device=device).bfloat16()
    k, v = (torch.randn(1, 1, 100, dim, device=device).bfloat16() for dim in (head_dim, value_dim))
    assert launch.has_out_buffer(TILES[name], head_dim, value_dim) == (name not in WIDE)
    with tiles.use(TILES[name], passes=["hopper"]):
        check(q, k, v, mask=Causal(), **HOPPER)
        check(
            q,
            k,
            v,
            mask=Padding(torch.tensor([77], device=device)),
            sink=torch.randn(2, device=device),
            **HOPPER,
        )


@pytest.mark.parametrize("cached_bytes, programs", [(1, 5), (10_000, 1), (10_000, 5), (1 << 30, 2), (1, 132)])
def test_every_tile_has_its_turn_in_any_order(device, cached_bytes, programs, monkeypatch):
    """Heads together, the last ones fewer, and programs with more tiles than others or none to spare."""
    monkeypatch.setattr(launch, "CACHED_BYTES", cached_bytes)
    monkeypatch.setattr(launch, "resident_programs", lambda device: programs)
    q = torch.randn(1, 6, 130, 16, device=device).half()
    k, v = torch.randn(2, 1, 2, 40, 16, device=device).half()
    check(q, k, v, mask=Causal("top_left"), **HOPPER)


# ---- Values that nobody may see


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "side, value, value_dim", [("right", NAN, 16), ("left", INF, 16), ("right", INF, 72), ("left", NAN, 72)]
)
def test_what_no_query_sees_does_not_matter(device, side, value, value_dim):
    q, k = (torch.randn(2, 2, n, 16, device=device).bfloat16() for n in (70, 100))
    v = torch.randn(2, 2, 100, value_dim, device=device).bfloat16()
    lens = torch.tensor([41, 0], device=device)
    mask = Padding(lens, side)
    want = tilewise.attention(q, k, v, mask=mask, return_lse=True, **HOPPER)
    for b in range(2):
        unseen = slice(int(lens[b]), None) if side == "right" else slice(0, 100 - int(lens[b]))
        k[b, :, unseen] = v[b, :, unseen] = value
    got = tilewise.attention(q, k, v, mask=mask, return_lse=True, **HOPPER)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not got[0][1].any() and got[1][1].isneginf().all()


@pytest.mark.parametrize(
    "mask, seen",
    [
        (Causal("top_left"), (0, 30)), (Window(5, 2), (65, 100)), (Prefix(10) & Causal("top_left"), (0, 30)),
        (Padding(63) & Window(None, 0, 70), (0, 63)), (Padding(90) & Padding(60, "left"), (40, 90)),
        (Padding(31), (0, 31)), (Padding(1), (0, 1)),
    ],
)  # fmt: skip
def test_keys_outside_a_mask_do_not_matter(device, mask, seen):
    q = torch.randn(1, 2, 30, 16, device=device).half()
    k, v = torch.randn(2, 1, 2, 100, 16, device=device).half()
    want = tilewise.attention(q, k, v, mask=mask, **HOPPER)
    for unseen in (slice(0, seen[0]), slice(seen[1], None)):
        k[:, :, unseen] = v[:, :, unseen] = float("nan")
    assert torch.equal(tilewise.attention(q, k, v, mask=mask, **HOPPER), want)
    assert want.isfinite().all() and want.any()


def test_rows_that_see_no_key(device):
    q = torch.randn(1, 2, 150, 16, device=device).half()
    k, v = torch.randn(2, 1, 2, 20, 16, device=device).half()
    out, lse = check(q, k, v, mask=Causal(), **HOPPER)
    assert not out[:, :, :130].any() and lse[:, :, :130].isneginf().all() and lse[:, :, 130:].isfinite().all()
    sink = torch.randn(2, device=device)
    _, lse = check(q, k, v, mask=Causal(), sink=sink, **HOPPER)
    assert torch.allclose(lse[0, :, 0], sink)


# ---- With the rest of the library


def test_a_row_depends_on_itself_alone(device):
    """The same bits whatever stands beside it, and however long the padding is."""
    q = torch.randn(2, 2, 140, 16, device=device).bfloat16()
    k, v = torch.randn(2, 2, 1, 90, 16, device=device).bfloat16()
    lens = torch.tensor([90, 40], device=device)
    out = tilewise.attention(q, k, v, mask=Padding(lens), **HOPPER)
    for kv_len in (40, 90):
        one = [x[1:, :, :kv_len] for x in (k, v)]
        alone = tilewise.attention(q[1:, 1:], *one, mask=Padding(lens[1:]), **HOPPER)
        assert torch.equal(alone, out[1:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients(device, dtype):
    q = torch.randn(1, 4, 70, 16, device=device).to(dtype)
    k, v = torch.randn(2, 1, 2, 50, 16, device=device).to(dtype)
    sink = torch.randn(4, device=device)
    check_gradients(q, k, v, mask=Causal(), score=Softcap(3.0), sink=sink, **HOPPER)
    check_gradients(q, k, v, scale=0.3, **HOPPER)


def test_two_pieces_with_all_at_once(device):
    """Rows of K and of V in two pieces, 96 = 32 + 64 and 80 = 16 + 64, under all that acts on them."""
    q = torch.randn(1, 2, 70, 96, device=device).bfloat16()
    k = torch.randn(1, 1, 60, 96, device=device).bfloat16()
    v = torch.randn(1, 1, 60, 80, device=device).bfloat16()
    mask = Window(40, 0, "bottom_right") & Padding(torch.tensor([50], device=device))
    given = dict(mask=mask, score=Softcap(3.0), sink=torch.randn(2, device=device), **HOPPER)
    check_gradients(q, k, v, **given)
    tile = HopperTile(192, 16, 12, 2, has_turns=False, is_q_in_registers=True)
    with tiles.use(tile, passes=["hopper"]):
        check(q, k, v, bias=torch.randn(1, 2, 70, 60, device=device), **given)


def test_a_compiled_graph_asks_for_it_too(device):
    q = torch.randn(1, 2, 70, 16, device=device).half().requires_grad_()
    k, v = torch.randn(2, 1, 2, 50, 16, device=device).half()

    def attend(q, k, v):
        return tilewise.attention(q, k, v, mask=Causal(), return_lse=True, **HOPPER)

    out, lse = attend(q, k, v)
    (want,) = torch.autograd.grad(out.sum() + lse[:, :, 30:].sum(), q)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got_out, got_lse = compiled(q, k, v)
    (got,) = torch.autograd.grad(got_out.sum() + got_lse[:, :, 30:].sum(), q)
    assert torch.equal(out, got_out) and torch.equal(lse, got_lse) and torch.equal(want, got)
    # What a graph cannot know when it is made, it says when it runs.
    off = torch.randn(1 * 2 * 50 * 16 + 4, device=device).half()[4:].view(1, 2, 50, 16)
    with pytest.raises(ValueError, match="k starts at an address"):
        compiled(q, off, v)


def test_it_writes_nothing_but_its_results(device):
    """Out may be a view with gaps: what lies between its rows stays as it is."""
    q = torch.randn(1, 70, 2, 16, device=device).half().transpose(1, 2)
    k, v = torch.randn(2, 1, 2, 50, 16, device=device).half()
    request = make_request(q, k, v, **HOPPER)
    whole = torch.full((1, 2, 80, 24), 7.0, device=device).half()
    tile = tiles.choose_tile(q, request.shape, "hopper")
    launch.launch_forward(bind(request), whole[:, :, :70, :16], None, None, tile)
    assert torch.equal(whole[:, :, :70, :16], tilewise.attention(q, k, v, **HOPPER))
    whole[:, :, :70, :16] = 7.0
    assert (whole == 7.0).all()
