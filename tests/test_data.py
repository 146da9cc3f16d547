"""Data that show what random normal numbers hide: constants, extremes, and junk where no query looks."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import build
from harness.oracle import check, kept_pairs
from harness.sanitizer import sanitize
from tilewise import (
    BlockCausal,
    Blocks,
    Causal,
    Dense,
    Documents,
    Intervals,
    Neighborhood,
    Padding,
    Prefix,
    Softcap,
    UserMask,
    Window,
)
from tilewise.kernels.tile import Tile
from tilewise.plan.request import make_request

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(Tile(16, 16)):
        yield


@pytest.fixture
def qkv(device):
    """qkv(dtype, q_len, kv_len, **sizes): random normal q, k and v."""

    def make(dtype: torch.dtype = torch.float32, q_len: int = 19, kv_len: int = 45, **sizes: int):
        problem = build(device, random.Random(0), [], q_len=q_len, kv_len=kv_len, dtype=dtype, **sizes)
        return problem.tensors()

    return make


# ---- Constants


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, Causal()], ids=["full", "causal"])
def test_constant_values(qkv, dtype, mask):
    """Every output is the constant. Accumulating in bf16 drifts by 2 % here and passes on random values."""
    q, k, v = qkv(dtype, q_len=17, kv_len=333, batch=1, q_heads=1, kv_heads=1)
    v = torch.linspace(-3, 3, 16, device=v.device).to(dtype).expand(1, 1, 333, 16)
    out, _ = check(q, k, v, mask=mask)
    # P is rounded for the matmul, its sum is not; then the result is rounded.
    relative = (out.double() / v[:, :, :17].double() - 1).abs().max().item()
    assert relative <= torch.finfo(dtype).eps + 333 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_values_show_the_probabilities(qkv, dtype):
    q, k, _ = qkv(dtype, q_len=19, kv_len=75)
    v = torch.eye(75, dtype=dtype, device=q.device).expand(2, 2, 75, 75)
    out, _ = check(q, k, v, mask=Window(50, 0))
    assert ((out >= 0) & (out <= 1)).all() and (out[:, :, 0, :6] == 0).all()
    # Each probability is rounded twice, before the matmul and after it; 75 of them are summed in fp32.
    error = (out.double().sum(-1) - 1).abs().max().item()
    assert error <= torch.finfo(dtype).eps + 75 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_weigh_the_same(qkv, dtype):
    q, k, v = qkv(dtype)
    k = k[:, :, :1].expand_as(k)
    _, lse = check(q, k, v)
    score = (q.double() @ k.double().mT)[..., 0] / 4
    torch.testing.assert_close(lse.double(), score + math.log(45), rtol=1e-6, atol=1e-6)


@pytest.mark.any_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_queries_get_equal_results(qkv, dtype):
    q, k, v = qkv(dtype)
    out, lse = check(q[:, :, :1].expand_as(q), k, v)
    assert torch.equal(out, out[:, :, :1].expand_as(out)) and torch.equal(lse, lse[:, :, :1].expand_as(lse))


# ---- Extremes


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits(qkv, dtype, sign):
    """Scores of about ±10⁴: far beyond what an exponential takes without the maximum subtracted."""
    q, k, v = qkv(dtype)
    check(50 * q, 50 * k, v, scale=sign)
    check(50 * q, 50 * k, v, scale=sign, mask=Causal(), sink=torch.tensor([9e3, -9e3], device=q.device))
    _, lse = check(sign * q.abs() * 30, k.abs() * 30, v, scale=1.0)  # all of one sign
    assert (lse.sign() == sign).all() and lse.abs().mean() > 2e3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [0, 20, 44])
def test_one_huge_key(qkv, dtype, key):
    """One key takes all the weight, or none: in the first tile, the middle one and the last."""
    q, k, v = qkv(dtype)
    k[:, :, key] *= 300
    out, _ = check(q, k, v)
    scores = q.double() @ k.double().mT / 4
    others = scores.index_fill(-1, torch.tensor(key, device=q.device), -math.inf).amax(-1)
    wins = scores[..., key] > others + 40  # exp(-40) vanishes in fp32
    assert wins.any() and torch.equal(out[wins], v[:, :, key, None].expand_as(out)[wins])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_numbers(qkv, dtype):
    q, k, v = qkv(dtype)
    tiny = torch.finfo(dtype).tiny
    check(q, k, (v * 0.3).to(dtype) * tiny)
    check(q * tiny, k, v)
    check(q * tiny, k, v, similarity="cosine")
    check(q, k * tiny, v, scale=0.5 / tiny if dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [100.0, -100.0, 3000.0])
def test_shifted_scores_change_lse_alone(qkv, dtype, shift):
    q, k, v = qkv(dtype)
    out, lse = check(q, k, v)
    by_row = torch.linspace(0.5, 1, 19, device=q.device)[:, None] * shift
    shifted, shifted_lse = check(q, k, v, bias=by_row)
    # Scores of this size are rounded to fp32: an absolute error in the exponent, relative in the result.
    u = torch.finfo(torch.float32).eps
    difference = (shifted_lse.double() - lse.double() - by_row[:, 0].double()).abs()
    assert difference.max() <= 4 * u * abs(shift)
    allowed = 8 * u * abs(shift) + 4 * torch.finfo(dtype).eps
    assert ((shifted.double() - out.double()).abs() <= allowed * v.double().abs().amax()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [1e-2, 0.5, 50.0, 1e6])
def test_softcap_far_beyond_its_cap_and_far_below(qkv, dtype, cap):
    """|s / cap| from 10⁻⁶ to 10⁶: exponentials of such numbers overflow, differences of them cancel."""
    q, k, v = qkv(dtype)
    _, lse = check(50 * q, 50 * k, v, scale=1.0, score=Softcap(cap))
    assert lse.isfinite().all() and (lse <= cap + math.log(45) + 1e-5 * cap).all()
    check(q, k, v, score=Softcap(cap))


# ---- Junk out of sight


@triton.jit
def listed_keep(q_idx, kv_idx, batch, head, args):
    """The two keys whose numbers stand in args[0]."""
    return (kv_idx == tl.load(args[0])) | (kv_idx == tl.load(args[0] + 1))


def listed_twin(batch, head, q_idx, kv_idx, listed):
    return (kv_idx == listed[0]) | (kv_idx == listed[1])


def masks_with_unseen_keys(device: torch.device) -> dict[str, tuple[tilewise.Mask, int]]:
    """Masks over 45 keys, each with a number of queries for which some keys are seen by none of them."""
    lengths = torch.tensor([30, 0], device=device)
    ids = torch.tensor([0] * 10 + [7] * 10 + [1] * 5 + [7] * 15 + [0] * 5, device=device)
    columns = torch.ones(45, dtype=torch.bool, device=device)
    columns[3] = columns[17:30] = False
    start = torch.tensor([2, 33], device=device).repeat(10)[:19]
    listed = torch.tensor([4, 40], device=device)
    return {
        "padding": (Padding(lengths), 19),
        "padding by a number": (Padding(33), 19),
        "left padding": (Padding(lengths, side="left"), 19),
        "causal, top left": (Causal("top_left"), 19),
        "window": (Window(7, 2), 5),
        "prefix": (Prefix(torch.tensor([40, 3], device=device), "top_left"), 19),
        "between documents": (Documents(ids[:19] % 7, ids), 19),
        "columns": (Dense(columns), 19),
        "between intervals": (Intervals(start, start + 5), 19),
        "empty intervals": (Intervals(start, start), 19),
        "blocks": (Blocks(torch.tensor([[True, False, True], [False, False, True]], device=device), 16), 19),
        "a function": (UserMask(listed_keep, (listed,), twin=listed_twin), 19),
        "several": (Padding(lengths) & columns & Intervals(start, start + 9) & Causal("bottom_right"), 19),
        "more queries than keys": (Causal() & Padding(41, side="left"), 60),
        "blocks before": (BlockCausal(5, 1, "top_left"), 8),
        "a neighborhood": (Neighborhood(2, 2, shape=(5, 9)), 7),
        "either": (Window(2, 0, "top_left") | ~Padding(40) & columns, 5),
        "the opposite": (~(Padding(lengths) | Intervals(start, start + 5)), 19),
    }


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", masks_with_unseen_keys(torch.device("cpu")))
def test_unseen_keys_and_values_have_no_influence(qkv, device, name, dtype):
    """NaN and infinities in their place leave every bit as it is with zeros there."""
    mask, q_len = masks_with_unseen_keys(device)[name]
    q, k, v = qkv(dtype, q_len=q_len, q_heads=4, kv_heads=2)
    keep = kept_pairs(make_request(q, k, v, mask=mask))
    unseen = ~keep.unflatten(1, (2, 2)).any(dim=3).any(dim=2)[..., None]  # [batch, kv_heads, kv_len, 1]
    blind = ~keep.any(dim=3, keepdim=True)  # queries that see nothing are junk too
    assert unseen.any()

    results = []
    for junk in (0.0, torch.nan, torch.inf, -torch.inf):
        dirty = [x.masked_fill(hidden, junk) for x, hidden in ((q, blind), (k, unseen), (v, unseen))]
        results.append(check(*dirty, mask=mask) if junk == 0 else attend(*dirty, mask))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: tilewise.Mask):
    with sanitize():
        return tilewise.attention(q, k, v, mask=mask, return_lse=True)


@pytest.mark.parametrize("score", [Softcap(3.0), "cosine", "bias"], ids=["softcap", "cosine", "bias"])
@pytest.mark.parametrize("name", ["padding", "left padding", "columns", "between documents"])
def test_unseen_keys_have_no_influence_through_scores(qkv, device, name, score):
    mask, q_len = masks_with_unseen_keys(device)[name]
    q, k, v = qkv(torch.float16, q_len=q_len)
    keep = kept_pairs(make_request(q, k, v, mask=mask))
    hidden = ~keep.any(dim=2)[..., None]
    arguments = {"cosine": {"similarity": "cosine"}, "bias": {"bias": torch.randn(19, 45, device=device)}}
    arguments = arguments.get(score, {"score": score}) | {"mask": mask}
    clean, _ = check(q, k, v, **arguments)
    if score == "bias":  # the bias of pairs that do not count is junk as well
        arguments["bias"] = arguments["bias"].masked_fill(~keep, torch.nan)
    dirty, _ = check(q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, -torch.inf), **arguments)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("place", ["key", "value", "query"])
def test_nan_in_sight_shows(qkv, place):
    """Hiding what is out of sight must not hide what a query does see."""
    tensors = dict(zip(("query", "key", "value"), qkv(), strict=True))
    tensors[place][0, 1, 7, 3] = torch.nan
    out = tilewise.attention(*tensors.values(), mask=Padding(40) & Causal("bottom_right"))
    rows = out[0, 1].isnan().any(-1)
    assert rows[7] and rows.all() == (place != "query")
    assert out[1].isfinite().all() and out[0, 0].isfinite().all()
