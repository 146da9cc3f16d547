"""The Hopper backward against float64: its own source, run in the emulator where there is no GPU.

A call that asks for impl="hopper" has this backward where its rules let it; where they do not, the portable
one follows, and must be right too.
"""

from __future__ import annotations

import random

import pytest
import torch

import tilewise
from harness.features import FEATURES, judge
from harness.gradients import check_gradients
from harness.hopper import HOPPER, REFUSED, problem, taken
from tilewise import Causal, Intervals, Padding, Softcap, Window
from tilewise.kernels.hopper.backward import launch
from tilewise.kernels.tile import HopperBackwardTile, hopper_backward_tile
from tilewise.plan import passes, tiles
from tilewise.plan.implementation import backward_implementation
from tilewise.plan.request import make_request
from tilewise.plan.rules import hopper as rules

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU (sm_90), or none: then it runs in the emulator", allow_module_level=True)

KINDS = ("heads", "scale", "score", "bias", "sink", "mask")
ALONE = ("score", "bias", "mask")


@pytest.fixture
def launches(monkeypatch) -> list[HopperBackwardTile]:
    """The tiles of the launches of Hopper's backward."""
    found = []

    def counted(backward, dq, dk, dv, tile, deterministic):
        found.append(tile)
        launch.launch_backward(backward, dq, dk, dv, tile, deterministic)

    monkeypatch.setattr(passes, "launch_hopper_backward", counted)
    return found


@pytest.mark.parametrize("name", [n for n in FEATURES if FEATURES[n].kind in ALONE and n not in REFUSED])
def test_every_feature_that_is_taken(device, name, launches):
    p = problem(device, name, seed=len(name), batch=1)
    assert taken(p)
    judge(p, backward=True)
    assert len(launches) == 1


@pytest.mark.oldest
@pytest.mark.parametrize("seed", range(4))
def test_features_of_every_kind_at_once(device, seed, launches):
    rng = random.Random(seed)
    names = [rng.choice([n for n in FEATURES if FEATURES[n].kind == k and n not in REFUSED]) for k in KINDS]
    judge(problem(device, *names, seed=seed, batch=1), backward=True)
    assert len(launches) == 1


def random_qkv(device, q_heads, kv_heads, q_len, kv_len, dim, value_dim=None, dtype=torch.float16):
    q = torch.randn(1, q_heads, q_len, dim, device=device).to(dtype)
    k = torch.randn(1, kv_heads, kv_len, dim, device=device).to(dtype)
    return q, k, torch.randn(1, kv_heads, kv_len, value_dim or dim, device=device).to(dtype)


@pytest.mark.parametrize(
    "dim, value_dim, columns", [(64, 64, 64), (128, 128, 128), (24, 16, 64), (72, 72, 128), (48, 128, 128)]
)
def test_dimensions(device, dim, value_dim, columns, launches):
    """Several tiles of rows and of keys; the last of each is not whole."""
    rows = 8192 // columns
    dtype = torch.float16 if dim < 100 else torch.bfloat16
    q, k, v = random_qkv(device, 2, 1, rows + 5, 150, dim, value_dim, dtype)
    check_gradients(q, k, v, mask=Causal(), **HOPPER)
    assert launches == [HopperBackwardTile(rows, 128, 8, 2)]


def test_a_step_of_fewer_rows(device, launches):
    """dQ is then two pieces of 32 columns."""
    tile = HopperBackwardTile(64, 128, 8, 3)
    q, k, v = random_qkv(device, 2, 1, 133, 150, 48)
    with tiles.use(tile, ["hopper_backward"]):
        check_gradients(q, k, v, mask=Causal(), **HOPPER)
    assert launches == [tile]


LENGTHS = [(1, 1), (1, 300), (200, 3), (128, 128), (129, 127)]


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
def test_lengths_around_its_tiles(device, q_len, kv_len, launches):
    q, k, v = random_qkv(device, 1, 1, q_len, kv_len, 16)
    for mask in (None, Causal("top_left")):
        check_gradients(q, k, v, mask=mask, **HOPPER)
    assert len(launches) == 2


def test_rows_beyond_the_last_have_no_part(device):
    """Nothing is known of them to subtract before an exponential: with this bias they would overflow."""
    q, k, v = random_qkv(device, 1, 1, 20, 30, 16)
    check_gradients(q, k, v, bias=torch.full((20, 30), 200.0, device=device), **HOPPER)


def test_a_window_wider_than_a_tile_has_full_tiles_between_cut_ones(device, launches):
    q, k, v = random_qkv(device, 1, 1, 600, 256, 16)
    check_gradients(q, k, v, mask=Window(290, 130, "top_left"), **HOPPER)
    assert len(launches) == 1


def test_tiles_of_rows_that_do_not_visit_between_such_that_do(device, launches):
    """Rows 0..128 and 256..384 see the first tile of keys, those between them the second."""
    position = torch.arange(384, device=device)
    start = torch.where((position >= 128) & (position < 256), 128, 0).int()

    q, k, v = random_qkv(device, 1, 1, 384, 256, 16)
    intervals = Intervals(start, start + 100)
    assert rules.masks_leave_no_gaps(make_request(q, k, v, mask=intervals)) is not None
    # No mask that is taken is of this kind; by its interval alone, the kernel would be right.
    request = make_request(q, k, v, mask=intervals)
    expected = gradients_of(q, k, v, intervals, "portable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "RULES", ())
        found = run_backward_as(request, "hopper")
    assert len(launches) == 1
    for ours, portable in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, portable, atol=4e-3, rtol=4e-3)


def gradients_of(q, k, v, mask, impl):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = tilewise.attention(q, k, v, mask=mask, impl=impl)
    return torch.autograd.grad(out, (q, k, v), gradient_like(out))


def gradient_like(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device, out.dtype)


def run_backward_as(request, impl):
    """The gradients of q, k and v after the portable forward."""
    out, _, statistics = passes.run_forward(request, return_lse=False, for_backward=True)
    asked = make_request(request.q, request.k, request.v, mask=request.masks[0], impl=impl)
    needs = [True] * 3 + [False] * len(asked.other_tensors)
    return passes.run_backward(asked, out, statistics, gradient_like(out), None, needs)


# ---- 0 · NaN


MASKS = {
    "causal": Causal("top_left"),
    "window": Window(60, 0, "top_left"),
    "padding": Padding(150),
    "left padding": Padding(100, side="left"),
    "causal and padding": Causal("bottom_right") & Padding(260),
}


@pytest.mark.parametrize("name", MASKS)
def test_nan_in_keys_that_no_row_sees_reaches_no_gradient(device, name, launches):
    q, k, v = random_qkv(device, 2, 1, 150, 300, 16)
    unseen = keys_that_no_row_sees(q, k, v, MASKS[name])
    assert unseen.any()
    clean = gradients_of(q, k, v, MASKS[name], "hopper")
    k, v = (x.masked_fill(unseen[:, None], torch.nan) for x in (k, v))
    found = gradients_of(q, k, v, MASKS[name], "hopper")
    for ours, wanted in zip(found, clean, strict=True):
        assert torch.equal(ours, wanted)
    assert len(launches) == 2


def keys_that_no_row_sees(q, k, v, mask):
    exact = v.double().requires_grad_()
    out = tilewise.attention(q.double(), k.double(), exact, mask=mask, impl="torch")
    (gradient,) = torch.autograd.grad(out.square().sum(), exact)
    return (gradient[0] == 0).all(-1).all(0)


def test_nan_in_keys_that_some_rows_see_stays_with_their_tiles(device):
    """Causal: keys from 128 on are NaN, which the first tile of rows, 0 to 127, does not see."""
    q, k, v = random_qkv(device, 1, 1, 256, 256, 16)
    clean, _, _ = gradients_of(q, k, v, Causal(), "hopper")
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    dq, _, _ = gradients_of(q, k, v, Causal(), "hopper")
    assert torch.equal(dq[:, :, :128], clean[:, :, :128])


def test_nan_in_rows_that_see_no_key(device):
    """Of q, and of the gradient of out, where the first 60 rows come before the first key."""
    q, k, v = random_qkv(device, 2, 1, 150, 90, 16)
    mask = Causal(-60)

    def gradients(q, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = tilewise.attention(*leaves, mask=mask, **HOPPER)
        return torch.autograd.grad(out, leaves, do)

    do = gradient_like(q)
    clean = gradients(q, do)
    q, do = q.clone(), do.clone()
    q[:, :, :60], do[:, :, :60] = torch.nan, torch.nan
    found = gradients(q, do)
    for ours, wanted in zip(found, clean, strict=True):
        assert torch.equal(ours, wanted)
    assert not found[0][:, :, :60].any()


# ---- Who answers


def test_a_gradient_that_is_broadcast_is_copied(device, launches):
    q, k, v = (x.requires_grad_() for x in random_qkv(device, 2, 1, 40, 50, 16))
    found = torch.autograd.grad(tilewise.attention(q, k, v, **HOPPER).sum(), (q, k, v))
    wanted = torch.autograd.grad(tilewise.attention(q, k, v, impl="portable").sum(), (q, k, v))
    for ours, portable in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, portable, atol=4e-3, rtol=4e-3)
    assert len(launches) == 1


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(similarity="cosine"), "the gradients of cosine similarity multiply unit rows"),
        (dict(similarity=tilewise.Cosine(2.0)), "the gradients of cosine similarity multiply unit rows"),
        (dict(dims=(192, 128)), "head_dim=192, value_dim=128: a warpgroup's registers hold dK and dV"),
        (dict(dims=(64, 256)), "head_dim=64, value_dim=256: a warpgroup's registers hold dK and dV"),
        (dict(dims=(20, 16)), "head_dim=20 must be a multiple of 8"),
        (dict(impl="portable"), None),
        (dict(impl=None), None),
    ],
)
def test_what_it_does_not_take_the_portable_backward_does(device, given, reason, launches):
    head_dim, value_dim = given.pop("dims", (16, 16))
    q = torch.randn(1, 2, 30, 24 if head_dim == 20 else head_dim, device=device).half()[..., :head_dim]
    k = torch.randn(1, 1, 40, 24 if head_dim == 20 else head_dim, device=device).half()[..., :head_dim]
    v = torch.randn(1, 1, 40, value_dim, device=device).half()
    given = HOPPER | given
    request = make_request(q, k, v, **given)
    assert backward_implementation(request) == "portable"
    if reason is not None:
        (found,) = rules.backward_reasons(request)
        assert reason in found
    check_gradients(q, k, v, mask=Causal(), **given)
    assert launches == []


@pytest.mark.parametrize("needs, expected", [("q", 0), ("kv", 0), ("qk", 1), ("qv", 1)])
def test_one_walk_is_for_all_gradients(device, needs, expected, launches):
    """Where dQ, or dK and dV, is not asked for, the portable kernels make the others alone."""
    tensors = dict(zip("qkv", random_qkv(device, 1, 1, 20, 30, 16), strict=True))
    leaves = [tensors[name].requires_grad_() for name in needs]
    out = tilewise.attention(*tensors.values(), **HOPPER)
    found = torch.autograd.grad(out, leaves, gradient_like(out))
    assert len(launches) == expected
    wanted = torch.autograd.grad(
        tilewise.attention(*tensors.values(), impl="portable"), leaves, gradient_like(out)
    )
    for ours, portable in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, portable, atol=4e-3, rtol=4e-3)


def test_another_tile_is_refused(device):
    q, k, v = (x.requires_grad_() for x in random_qkv(device, 1, 1, 20, 30, 16))
    out = tilewise.attention(q, k, v, **HOPPER)
    with (
        tiles.use(tiles.Tile(64, 64), ["hopper_backward"]),
        pytest.raises(ValueError, match="HopperBackwardTile"),
    ):
        torch.autograd.grad(out.sum(), q, retain_graph=True)
        torch.autograd.grad(out.sum(), (q, k))
    for wrong in (dict(tile_q=32), dict(tile_kv=64), dict(num_warps=4), dict(num_stages=1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HopperBackwardTile(**(dict(tile_q=64, tile_kv=128, num_warps=8, num_stages=2) | wrong))
    assert [hopper_backward_tile(dim).tile_q for dim in (16, 64, 128)] == [128, 128, 64]


def test_gradients_of_parameters_are_the_portable_kernels(device, launches):
    """Whose tiles are square, so that they look up ranges of their own."""
    q, k, v = random_qkv(device, 2, 1, 70, 140, 128)
    slopes = torch.randn(2, device=device)
    score = [Softcap(3.0), tilewise.ALiBi(slopes)]
    check_gradients(q, k, v, mask=Window(20, 0, "top_left"), score=score, **HOPPER)
    assert len(launches) == 1


def test_it_writes_nothing_but_its_results(device):
    """dK and dV may be views with gaps: what lies between their rows stays as it is."""
    q, k, v = random_qkv(device, 2, 2, 70, 150, 16)
    request = make_request(q, k, v, mask=Causal(), **HOPPER)
    out, _, statistics = passes.run_forward(request, return_lse=False, for_backward=True)
    tile = hopper_backward_tile(16)
    backward = passes.prepare(passes.bind(request), out, statistics, gradient_like(out), None, tile.tile_q)
    wholes = [torch.full((1, 2, n, 24), 7.0, device=device).half() for n in (80, 160, 160)]
    views = [x[:, :, :n, :16] for x, n in zip(wholes, (70, 150, 150), strict=True)]
    launch.launch_backward(backward, *views, tile, deterministic=True)
    for view, wanted in zip(views, gradients_of(q, k, v, Causal(), "hopper"), strict=True):
        assert torch.equal(view, wanted)
        view.fill_(7.0)
    for whole in wholes:
        assert (whole == 7.0).all()
