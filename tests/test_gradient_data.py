"""Gradients on data that show what random normal numbers hide: constants, extremes, sums that are known, and
junk where no query looks."""

import random
from typing import Any

import pytest
import torch
from test_data import masks_with_unseen_keys

import tilewise
from harness.features import build
from harness.gradients import check_gradients
from harness.oracle import kept_pairs
from harness.sanitizer import sanitize
from tilewise import Causal, Cosine, Padding, Softcap, Window
from tilewise.kernels.tile import Tile
from tilewise.plan.request import make_request

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
U = torch.finfo(torch.float32).eps / 2


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(Tile(16, 16)):
        yield


@pytest.fixture
def qkv(device):
    """qkv(dtype, q_len, kv_len, **sizes): random normal q, k, v and dO."""

    def make(dtype: torch.dtype = torch.float32, q_len: int = 19, kv_len: int = 37, **sizes: int):
        sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1} | sizes
        problem = build(device, random.Random(0), [], q_len=q_len, kv_len=kv_len, dtype=dtype, **sizes)
        return *problem.tensors(), problem.gradient_of_out()

    return make


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: Any, dlse: Any, **arguments: Any):
    """out, lse and the gradients of q, k, v and a bias; do, dlse: None for a result that plays no part."""
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    if "bias" in arguments:
        tensors.append(arguments["bias"].detach().requires_grad_())
        arguments["bias"] = tensors[3]
    with sanitize():
        out, lse = tilewise.attention(*tensors[:3], **arguments, return_lse=True, impl="portable")
        given = [(x, dx) for x, dx in ((out, do), (lse, dlse)) if dx is not None]
        return out, lse, torch.autograd.grad([x for x, _ in given], tensors, [dx for _, dx in given])


# ---- Constants


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", [(17, 333), (333, 17)], ids=str)
def test_constant_gradient_of_out(qkv, dtype, pair):
    """dV adds up one constant, weighted. Accumulating in bf16 drifts by 2 % here, unseen on random values."""
    q, k, v, _ = qkv(dtype, *pair, q_heads=1)
    do = torch.linspace(-3, 3, 16, device=v.device).to(dtype).expand(1, 1, pair[0], 16)
    with tilewise.tiles.use(Tile(32, 32)):
        check_gradients(q, k, v, do)
        # With q = 0 all weights are equal: P is rounded, 1 / kv_len each; then the result.
        got = check_gradients(torch.zeros_like(q), k, v, do)
    want = do.double()[:, :, :1] * pair[0] / pair[1]
    relative = (got["v"].double() / want - 1).abs().max().item()
    # P carries lse's rounding and the exponential's, log2 of kv_len doublings of either.
    assert relative <= torch.finfo(dtype).eps + (pair[0] + 32) * 2 * U


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("also", ["", "constant dO"])
def test_constant_values(qkv, dtype, also):
    """dP is one number a row, so dS is 0 but for rounding; with dO constant too, dV is all that is left."""
    q, k, v, do = qkv(dtype, 17, 133)
    v = torch.linspace(-3, 3, 16, device=v.device).to(dtype).expand_as(v)
    do = do[:, :, :1].expand_as(do) if also else do
    with tilewise.tiles.use(Tile(32, 32)):
        got = check_gradients(q, k, v, do, torch.zeros(1, 2, 17, device=q.device), mask=Causal())
    # dS = P (dP - delta): delta has the rounding of out's P and of out itself, Σ |dO| |V| times two units.
    noise = 4 * torch.finfo(dtype).eps * (do.double().abs() * 3).sum(-1).max()
    assert got["q"].double().abs().max() <= noise * k.double().abs().max() / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_values_show_the_gradient_of_probabilities(qkv, dtype):
    """V = identity and dO = one column: dP is 1 at one key and 0 at the others."""
    q, k, _, _ = qkv(dtype, 19, 45)
    v = torch.eye(45, dtype=dtype, device=q.device).expand(1, 1, 45, 45)
    do = torch.zeros(1, 2, 19, 45, dtype=dtype, device=q.device)
    do[..., 20] = 1
    check_gradients(q, k, v, do, mask=Window(30, 0))


@pytest.mark.any_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_get_equal_gradients(qkv, dtype):
    q, k, v, do = qkv(dtype)
    dlse = torch.ones(1, 2, 19, device=q.device)
    _, _, (dq, _, _) = gradients(q[:, :, :1].expand_as(q), k, v, do[:, :, :1].expand_as(do), dlse)
    assert torch.equal(dq, dq[:, :, :1].expand_as(dq)) and dq.any()
    k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    _, _, (_, dk, dv) = gradients(q, k, v, do, dlse)
    assert torch.equal(dk, dk[:, :, :1].expand_as(dk)) and torch.equal(dv, dv[:, :, :1].expand_as(dv))
    assert dk.any() and dv.any()


# ---- Extremes


@pytest.mark.in_turns
@pytest.mark.any_cpu
@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits(qkv, dtype, sign):
    """Scores of about ±10⁴: far beyond what an exponential takes without the maximum subtracted."""
    q, k, v, do = qkv(dtype)
    check_gradients(50 * q, 50 * k, v, do, scale=sign)
    sink = torch.tensor([9e3, -9e3], device=q.device)
    check_gradients(50 * q, 50 * k, v, do, scale=sign, mask=Causal(), sink=sink)
    check_gradients(sign * q.abs() * 30, k.abs() * 30, v, do, scale=1.0)  # all of one sign


@pytest.mark.in_turns
@pytest.mark.any_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [0, 20, 36])
def test_one_huge_key(qkv, dtype, key):
    """One key takes all the weight, or none: in the first tile, the middle one and the last."""
    q, k, v, do = qkv(dtype)
    k[:, :, key] *= 300
    check_gradients(q, k, v, do)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_numbers(qkv, dtype):
    q, k, v, do = qkv(dtype)
    tiny = torch.finfo(dtype).tiny
    check_gradients(q, k, (v * 0.3).to(dtype) * tiny, do)
    check_gradients(q, k, v, (do * 0.3).to(dtype) * tiny)
    check_gradients(q * tiny, k, v, do)
    check_gradients(q, k * tiny, v, do, scale=0.5 / tiny if dtype == torch.float16 else 1.0)


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [1e-2, 0.5, 50.0, pytest.param(1e6, marks=pytest.mark.any_cpu)])
def test_softcap_far_beyond_its_cap_and_far_below(qkv, dtype, cap):
    """|s / cap| from 10⁻⁶ to 10⁶: exponentials of such numbers overflow, differences of them cancel."""
    q, k, v, do = qkv(dtype)
    check_gradients(q, k, v, do, score=Softcap(cap))
    if cap > 1e-2:
        check_gradients(50 * q, 50 * k, v, do, scale=1.0, score=Softcap(cap))
        return
    # Beyond |s / cap| = 18 the oracle's 1 - tanh² is 0 in float64, so it cannot judge numbers of that size.
    leaves = [x.requires_grad_() for x in (50 * q, 50 * k, v)]
    out = tilewise.attention(*leaves, scale=1.0, score=Softcap(cap), impl="portable")
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out, leaves, do))


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
def test_cosine_of_short_and_long_rows(qkv, dtype, size):
    """dS passes through 1 / (|q| |k|), which must not take it out of the dtype's range."""
    q, k, v, do = qkv(dtype)
    check_gradients(q * size, k * size, v, do, similarity=Cosine(8.0))
    check_gradients(q * size, k / size if size < 300 else k, v, do, similarity="cosine")


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16 holds no 1 / ε
@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-13, 1e-11], ids=str)
def test_cosine_of_rows_near_zero(qkv, dtype, size):
    """Around 10⁻¹², below which a row is divided by that number instead of its length; all rows alike, or the
    largest gradient would set what the others may be off by."""
    q, k, v, do = qkv(dtype)
    check_gradients(q * size, k, v, do, similarity="cosine", mask=Causal())
    check_gradients(q, k * size, v, do, similarity=Cosine(torch.tensor([3.0, -2.0], device=q.device)))
    q[:, :, 3], k[:, :, 30] = 0, 0
    got = check_gradients(q, k, v, do, similarity="cosine")
    assert all(gradient.isfinite().all() for gradient in got.values())


# ---- Sum rules


def allowed(q, k, v, do, dtype) -> float:
    """How far a row of dS may be from summing to what it should: each pair's P carries the rounding of its
    score, of lse and of an exponential; delta that of out, and of the P that made it."""
    s = (q.double().abs() @ k.double().abs().mT).max().item() / 4 + 5
    size = (do.double().abs().sum(-1).max() * v.double().abs().max()).item()
    return 2 * (2 * torch.finfo(dtype).eps * (dtype != torch.float32) + (k.shape[2] + 32 + 8 * s) * U) * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_a_row_may_shift(qkv, dtype):
    """Softmax ignores a number added to a row: dS of each row sums to 0 from out alone, to dlse from lse."""
    q, k, v, do = qkv(dtype)
    dlse = torch.randn(1, 2, 19, device=q.device)
    bias = torch.randn(1, 2, 19, 37, device=q.device)
    bound = allowed(q, k, v, do, dtype)
    _, _, (*_, ds) = gradients(q, k, v, do, None, bias=bias)
    assert ds.double().sum(-1).abs().max() <= bound and ds.abs().max() > 100 * bound * (
        dtype == torch.float32
    )
    _, _, (*_, ds) = gradients(q, k, v, None, dlse, bias=bias)
    assert (ds.double().sum(-1) - dlse).abs().max() <= bound
    _, _, (*_, ds) = gradients(q, k, v, do, dlse, bias=bias)
    assert (ds.double().sum(-1) - dlse).abs().max() <= 2 * bound
    # The same rule by the kernel's own sum: a bias of one number a row.
    by_row = bias[..., :1]
    _, _, (*_, db) = gradients(q, k, v, do, None, bias=by_row)
    assert db.shape == by_row.shape and db.abs().max() <= bound
    _, _, (*_, db) = gradients(q, k, v, None, dlse, bias=by_row)
    assert (db[..., 0] - dlse).abs().max() <= bound


def test_a_sink_takes_its_part_of_the_sum(qkv):
    """With one more logit a row, it is the sink's gradient and dS together that sum to 0."""
    q, k, v, do = qkv()
    sink = torch.randn(2, device=q.device)
    got = check_gradients(q, k, v, do, torch.zeros(1, 2, 19, device=q.device), sink=sink,
                          bias=torch.zeros(1, 2, 1, 1, device=q.device))  # fmt: skip
    *_, dsink, dbias = got.values()
    assert dsink.abs().min() > 0
    assert (dsink + dbias.flatten()).abs().max() <= 19 * allowed(q, k, v, do, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_sum_to_the_gradients_of_rows(qkv, dtype):
    """Weights of a row sum to 1, so the rows of dV sum to those of dO."""
    q, k, v, do = qkv(dtype)
    _, _, (_, _, dv) = gradients(q, k, v, do, None, mask=Causal())
    want = do.double().sum((1, 2))
    size = do.double().abs().sum((1, 2)).max()
    # P is rounded, and so is each row of dV; P carries the rounding of scores, lse and exponentials too.
    s = (q.double().abs() @ k.double().abs().mT).max() / 4
    error = (dv.double().sum((1, 2)) - want).abs().max()
    assert error <= (torch.finfo(dtype).eps + (37 + 32 + 8 * s) * 2 * U) * size


# ---- Additive masks


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", ["-inf", "finfo.min"])
def test_additive_mask(qkv, dtype, bias_dtype, low):
    """A bias of -inf, or of the dtype's lowest number, takes keys out: nothing flows back through them."""
    q, k, v, do = qkv(dtype)
    number = -torch.inf if low == "-inf" else torch.finfo(bias_dtype).min
    bias = torch.zeros(1, 1, 19, 37, dtype=bias_dtype, device=q.device)
    bias.masked_fill_(torch.rand(bias.shape, device=q.device) < 0.5, number)
    bias[:, :, 3, :20] = number  # a whole tile
    bias[..., 36] = 0
    got = check_gradients(q, k, v, do, bias=bias)
    assert not got["Bias.bias (0)"][bias == number].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", [None, Softcap(2.0)], ids=["", "softcap"])
def test_rows_of_minus_infinity(qkv, dtype, score):
    """A bias that takes out every key of a row leaves a row without a key: gradient 0, no NaN beside it."""
    q, k, v, do = qkv(dtype)
    bias = torch.zeros(19, 37, device=q.device)
    bias[5], bias[17:] = -torch.inf, -torch.inf
    dlse = torch.ones(1, 2, 19, device=q.device)
    _, lse, (dq, dk, dv, db) = gradients(q, k, v, do, dlse, bias=bias, score=score)
    dead = bias[:, 0] == -torch.inf
    assert (lse[:, :, dead] == -torch.inf).all() and not dq[:, :, dead].any() and not db[dead].any()
    # As if the rows were not there.
    live = [x[:, :, ~dead] for x in (q, do, dlse)]
    _, _, want = gradients(live[0], k, v, live[1], live[2], bias=bias[~dead], score=score)
    for got, exactly in zip((dq[:, :, ~dead], dk, dv, db[~dead]), want, strict=True):
        torch.testing.assert_close(
            got, exactly, rtol=0, atol=8 * torch.finfo(dtype).eps * exactly.abs().max().item()
        )


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_row_of_lowest_biases(qkv, dtype, bias_dtype):
    """finfo.min on every key of a row is no mask: as in PyTorch, what is left of the scores decides, and that
    is nothing once they are lost in a number of this size; the weights are equal then, and so are dS."""
    q, k, v, do = qkv(dtype)
    bias = torch.full((19, 1), torch.finfo(bias_dtype).min, dtype=bias_dtype, device=q.device)
    bias[:3] = 0
    check_gradients(q, k, v, do, bias=bias)


# ---- Junk out of sight


@pytest.mark.parametrize("name", masks_with_unseen_keys(torch.device("cpu")))
def test_what_no_query_sees_has_no_influence(qkv, device, name):
    """NaN and infinities in keys and values that no query sees, in queries that see no key and in the
    gradients of their results leave every bit of every gradient as it is with zeros there."""
    mask, q_len = masks_with_unseen_keys(device)[name]
    dtype = DTYPES[len(name) % 3]
    q, k, v, do = qkv(dtype, q_len, 45, batch=2)
    keep = kept_pairs(make_request(q, k, v, mask=mask))
    unseen = ~keep.any(dim=2).any(dim=1)[:, None, :, None]
    blind = ~keep.any(dim=3, keepdim=True)
    dlse = torch.randn(2, 2, q_len, 1, device=device)
    hidden = ((q, blind), (k, unseen), (v, unseen), (do, blind), (dlse, blind))
    assert unseen.any()

    results = []
    for junk in (0.0, torch.nan, -torch.inf):
        *dirty, dlse = (x.masked_fill(where, junk) for x, where in hidden)
        results.append(gradients(*dirty, dlse[..., 0], mask=mask)[2])
    assert all(gradient.isfinite().all() for gradient in results[0])
    for junk_gradients in results[1:]:
        for got, want in zip(junk_gradients, results[0], strict=True):
            assert torch.equal(got, want)
    assert not results[0][0][blind.expand_as(q)].any() and not results[0][1][unseen.expand_as(k)].any()


THROUGH = {
    "softcap": dict(score=Softcap(3.0)),
    "cosine": dict(similarity="cosine"),
    "temperature": dict(similarity=Cosine(4.0)),
    "sink": dict(sink=torch.tensor([0.5, -0.5])),
    "slopes": dict(score=tilewise.ALiBi(torch.tensor([0.1, 0.2]))),
    "dropout": dict(dropout_p=0.4, dropout_seed=torch.tensor([5])),
    "bias": dict(),
}


@pytest.mark.in_turns
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", ["left padding", "columns", "between documents", "more queries than keys"])
def test_what_no_query_sees_has_no_influence_through_scores(qkv, device, name, through):
    mask, q_len = masks_with_unseen_keys(device)[name]
    q, k, v, do = qkv(torch.float16, q_len, 45, batch=2, q_heads=2, kv_heads=2)
    keep = kept_pairs(make_request(q, k, v, mask=mask))
    unseen, blind = ~keep.any(dim=2)[..., None], ~keep.any(dim=3, keepdim=True)
    dlse = torch.randn(2, 2, q_len, device=device)
    arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in THROUGH[through].items()}
    if through == "slopes":
        arguments["score"] = tilewise.ALiBi(torch.tensor([0.1, 0.2], device=device), "bottom_right")
    bias = torch.randn(2, 2, q_len, 45, device=device)
    results = []
    for junk in (0.0, torch.nan):
        q, k, v, do = (x.masked_fill(w, junk) for x, w in ((q, blind), (k, unseen), (v, unseen), (do, blind)))
        given = arguments | {
            "bias": bias.masked_fill(~keep, junk)
        }  # of pairs that do not count: junk as well
        if through == "sink":
            given["sink"] = arguments["sink"].clone().requires_grad_()
            do = do.nan_to_num()  # a row that sees only the sink has an output, and its gradient counts
        results.append(gradients(q, k, v, do, dlse, mask=mask, **given)[2])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want) and want.isfinite().all()


def test_junk_beside_rows_that_see_only_the_sink(qkv, device):
    """Their output is 0 whatever the sink's logit is, so the gradient of it is no matter of anybody's."""
    q, k, v, do = qkv(q_len=40, kv_len=17)
    results = []
    for junk in (0.0, torch.nan):
        sink = torch.tensor([0.5, -3.0], device=device, requires_grad=True)
        do[:, :, :23] = junk
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        out = tilewise.attention(*tensors, mask=Causal(), sink=sink, impl="portable")
        results.append(torch.autograd.grad(out, (*tensors, sink), do))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("place", ["query", "key", "value", "dO"])
def test_nan_in_sight_shows(qkv, place):
    """Hiding what is out of sight must not hide what a query does see."""
    tensors = dict(zip(("query", "key", "value", "dO"), qkv(kv_heads=2), strict=True))
    tensors[place][0, 1, 7, 3] = torch.nan
    _, _, found = gradients(*tensors.values(), None, mask=Padding(30))
    for gradient in found:
        assert gradient[0, 1].isnan().any() or (place == "value" and gradient is found[2])
        assert gradient[0, 0].isfinite().all()


def test_every_mask_with_unseen_keys_is_tried():
    """The names above are those of the list, and none is tried with all keys seen."""
    names = list(masks_with_unseen_keys(torch.device("cpu")))
    assert len(names) >= 13 and len(set(names)) == len(names)
    assert {len(name) % 3 for name in names} == set(range(len(DTYPES))), "every dtype should have its turn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_junk_in_rows_that_a_gap_leaves_without_a_key(device, dtype):
    """Rows whose interval holds keys, none of which a mask with gaps lets them see."""
    p = build(device, random.Random(20), [], batch=1, q_heads=2, kv_heads=1, q_len=19, kv_len=45, dtype=dtype)
    (q, k, v), do = p.tensors(), p.gradient_of_out()
    blind = torch.arange(19, device=device) % 4 == 1
    keep = ~blind[:, None] & (torch.arange(45, device=device) % 3 > 0)
    results = []
    for junk in (0.0, torch.nan, -torch.inf):
        dirty = [x.masked_fill(blind[:, None], junk) for x in (q, do)]
        dlse = torch.ones(1, 2, 19, device=device).masked_fill(blind, junk)
        results.append(gradients(dirty[0], k, v, dirty[1], dlse, mask=keep)[2])
    for found in results[1:]:
        for got, want in zip(found, results[0], strict=True):
            assert torch.equal(got, want) and want.isfinite().all()


def test_junk_beside_rows_that_a_bias_leaves_without_a_key(device):
    """A bias of -inf along a row is no mask, so its tiles are full; what the row is handed does not count."""
    p = build(device, random.Random(21), [], batch=1, q_heads=2, kv_heads=1, q_len=19, kv_len=45)
    (q, k, v), do = p.tensors(), p.gradient_of_out()
    dead = torch.arange(19, device=device) % 4 == 1
    bias = torch.zeros(19, 45, device=device).masked_fill(dead[:, None], -torch.inf)
    results = []
    for junk in (0.0, torch.nan, torch.inf):
        dlse = torch.ones(1, 2, 19, device=device).masked_fill(dead, junk)
        results.append(gradients(q, k, v, do, dlse, bias=bias)[2])
    for found in results[1:]:
        for got, want in zip(found, results[0], strict=True):
            assert torch.equal(got, want) and want.isfinite().all()
