"""`return_stats`: what the softmax knows beside its result, against float64, with its gradients.

What is exact is plain PyTorch's answer to the same call in float64, which the first test holds against the
reference; the yardstick is its answer in fp32 (or in the call's own dtype), as everywhere else.
"""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import tilewise
from harness.features import build
from harness.gradients import trained, with_leaves
from harness.oracle import _assert_close
from harness.problem import keeps_pairs
from harness.sanitizer import sanitize
from tilewise import Statistics, Stats
from tilewise.api import answer_with
from tilewise.plan.passes import run_forward
from tilewise.plan.request import request_of
from tilewise.pytorch import plain, plain_statistics
from tilewise.pytorch.plain import oracle_arguments
from tilewise_reference import statistics as definition
from tilewise_reference.yardstick import largest_difference

NAMES = ("max_logit", "entropy", "key_mass")  # those that have a gradient
ALL = Stats(max_logit=True, entropy=True, key_mass=True)
FEATURES = {
    "masks, softcap, sink": ("grouped_heads", "causal", "window", "softcap", "sink"),
    "stored mask, slopes, bias": ("bool_mask", "intervals", "alibi", "bias", "oblong_tile"),
    "cosine, padding, dropout": ("cosine_with_temperature", "right_padding", "dropout", "one_kv_head"),
    "packed": ("packed_apart", "causal", "relative_position", "grouped_heads", "sink"),
    "functions, documents": ("user_mask", "user_score", "tensor_scale", "scattered_documents",
"sliced_layout"), }  # fmt: skip
CACHES = {
    "cache": ("cached_rows", "grouped_heads", "causal", "sink", "float16"),
    "pages": ("paged_rows", "alibi", "one_kv_head", "sliced_layout"),
}


def problem_of(device, features, **sizes):
    """The first of these features in which pairs count, and scores differ: Softcap(0.1) makes all alike."""
    for seed in range(100):
        problem = build(device, random.Random(seed), features, **sizes)
        if keeps_pairs(problem) and all(getattr(score, "cap", 1) >= 1 for score in problem.scores):
            return problem
    raise AssertionError(f"no pair counts under {features}")


def forced(problem):
    return nullcontext() if problem.tile is None else tilewise.tiles.use(problem.tile)


def counts_for(request):
    """How much each query counts: some not at all."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.rand(request.q.shape[:3], generator=generator).to(request.q.device)
    return counts * (counts > 0.3)


def differentiated(request, stats, given):
    """out, lse, statistics and the gradients, by name, of a request whose leaves are trained; given: the
    gradients of what has one."""
    out, lse, found = answer_with(request, stats)
    results = [out, lse, *[getattr(found, name) for name in NAMES]]
    leaves = {**request.qkv(), **trained(request)}
    pairs = [
        (x, dx.to(x.dtype)) for x, dx in zip(results, given, strict=True) if x is not None and x.requires_grad
    ]
    outs, arrived = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, list(leaves.values()), arrived, allow_unused=True)
    named = zip(leaves, leaves.values(), grads, strict=True)
    return out, lse, found, {n: torch.zeros_like(x) if g is None else g for n, x, g in named}


def gradients_for(request):
    """Random gradients of out, lse, max_logit, entropy and key_mass."""
    generator = torch.Generator().manual_seed(3)
    shape = request.shape
    rows = tuple(request.q.shape[:3])
    mass = (shape.blocks, shape.kv_heads, shape.kv_len)
    sizes = ((*rows, shape.value_dim), rows, rows, rows, mass)
    return [torch.randn(size, generator=generator).to(request.q.device) for size in sizes]


def in_dtype(request, dtype):
    """The same call in plain PyTorch in this dtype, its scores too, on leaves of its own."""
    return replace(with_leaves(request, dtype), impl="torch")


def assert_statistics(found, exact, yardstick):
    for name in (*NAMES, "weights", "top_weights"):
        got, want, other = (getattr(each, name) for each in (found, exact, yardstick))
        assert (got is None) == (want is None), name
        if got is not None:
            assert got.shape == want.shape and got.dtype == torch.float32, name
            _assert_close(name, got, want, largest_difference(other, want))
    if found.top_keys is not None:
        assert torch.equal(found.top_keys < 0, exact.top_keys < 0)
        assert (found.top_keys == exact.top_keys).float().mean() > 0.98  # but for some that weigh alike


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_gradients_through_all_of_them(device, features):
    """Together with those of out and lse; of q, k, v, every parameter and the sink."""
    batch = 2 if "packed_apart" in features else 1
    problem = problem_of(
        device, features, batch=batch, q_len=18, kv_len=33
    )  # two tiles of rows, three of keys
    request = request_of(*problem.tensors(), **problem.keywords(), impl="portable")
    counts = counts_for(request) if problem.rows() is None else counts_for(request)[0]
    rows = torch.tensor([4, 0, request.q.shape[2] - 3, 70], device=device)
    stats = replace(ALL, key_mass=counts, rows=rows, top_k=3)
    given = gradients_for(request)
    with forced(problem), sanitize():
        _, _, found, grads = differentiated(with_leaves(request, None), stats, given)
    _, _, exact, exactly = differentiated(in_dtype(request, torch.float64), stats, given)
    _, _, yardstick, theirs = differentiated(in_dtype(request, torch.float32), stats, given)
    assert_statistics(found, exact, yardstick)
    for name, gradient in grads.items():
        _assert_close(f"d{name}", gradient, exactly[name], largest_difference(theirs[name], exactly[name]))


@pytest.mark.parametrize(
    ("name", "walks"), [("entropy", 1), ("entropy", 2), ("max_logit", 1), ("key_mass", 2)]
)
def test_each_alone_in_half_precision(device, name, walks):
    """Nothing else has a gradient; in one walk over the keys and in two."""
    features = ("bfloat16" if walks == 1 else "float16", "causal", "grouped_heads", "softcap", "sink")
    problem = problem_of(device, features, q_len=33, kv_len=20)
    request = request_of(*problem.tensors(), **problem.keywords(), impl="portable")
    given = [
        dx * (each == name) for each, dx in zip(("out", "lse", *NAMES), gradients_for(request), strict=True)
    ]
    only, place = Stats(**{name: True}), NAMES.index(name)
    with forced(problem), tilewise.tiles.use_walks(walks):
        own = with_leaves(request, None)
        result = getattr(answer_with(own, only)[2], name)
        leaves = [*own.qkv().values(), *trained(own).values()]
        grads = torch.autograd.grad(result, leaves, given[2 + place])

    def by_definition(dtype):
        other = with_leaves(request, torch.float64 if dtype == torch.float64 else None)
        found = definition.statistics(other.q, other.k, other.v, **oracle_arguments(other), dtype=dtype)
        leaves = [*other.qkv().values(), *trained(other).values()]
        result = found[place].nan_to_num(neginf=0.0)
        arrived = given[2 + place].to(dtype)
        return torch.autograd.grad(result, leaves, arrived, materialize_grads=True, allow_unused=True)

    exact, theirs = by_definition(torch.float64), by_definition(request.q.dtype)
    assert not grads[2].any()  # of v
    for got, want, other in zip(grads, exact, theirs, strict=True):
        assert got.dtype in (request.q.dtype, *[x.dtype for x in trained(request).values()])
        _assert_close(f"gradient through {name}", got, want, largest_difference(other, want))


@pytest.mark.parametrize("split_size", [None, 16])
@pytest.mark.parametrize("features", CACHES.values(), ids=CACHES)
def test_caches(device, features, split_size):
    problem = problem_of(device, features, q_len=3)
    request = request_of(*problem.tensors(), **problem.keywords(), split_size=split_size, impl="portable")
    counts, rows = counts_for(request), torch.tensor([2, 0, 9], device=device)
    stats = Stats(True, True, counts, rows, 5)
    with forced(problem), sanitize(), torch.no_grad():
        _, _, found = answer_with(request, stats)
        exact, yardstick = (
            answer_with(in_dtype(request, dtype), stats)[2] for dtype in (torch.float64, torch.float32)
        )
    assert_statistics(found, exact, yardstick)
    lens = problem.filled().kv_lens
    assert not any(found.key_mass[b, :, int(n) :].any() for b, n in enumerate(lens))


def test_a_cache_of_packed_queries(device):
    """Keys are those of a sequence's own cache, rows those of all queries."""
    k, v = torch.randn(2, 2, 2, 24, 16, device=device)
    q = torch.randn(7, 4, 16, device=device)
    offsets, lens = torch.tensor([1, 4, 6], device=device), torch.tensor([20, 9], device=device)
    stats = Stats(True, True, True, torch.tensor([5, 1, 0], device=device), 2)
    results = {}
    for impl, dtype in (("portable", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        given = (x.to(dtype) for x in (q, k, v))
        results[impl, dtype] = tilewise.cached_attention(
            *given, kv_lens=lens, q_offsets=offsets, mask=tilewise.Causal(), return_stats=stats, impl=impl
        )[1]
    found, yardstick, exact = results.values()
    assert found.max_logit.shape == (4, 7) and found.key_mass.shape == (2, 2, 24)
    assert found.weights.shape == (4, 3, 24) and found.top_keys.shape == (4, 7, 2)
    assert_statistics(found, exact, yardstick)


def test_plain_pytorch_answers_as_the_definition(device, monkeypatch):
    """In float64, a few rows at a time; where a block is computed again in the backward, too."""
    monkeypatch.setattr(plain, "BLOCK", 300)
    features = ("causal", "softcap", "bias", "sink", "grouped_heads", "dropout")
    problem = problem_of(device, features)
    problem.add_mask(tilewise.Window(4, 0))  # so that blocks of rows begin at keys of their own
    request = in_dtype(request_of(*problem.tensors(), **problem.keywords()), torch.float64)
    counts, rows = counts_for(request), torch.tensor([18, 2], device=device)
    stats = Stats(True, True, counts, rows, 4)
    assert len(list(plain_statistics.blocks(request))) > 3
    found = answer_with(request, stats)[2]
    arguments = oracle_arguments(request)
    want = definition.statistics(request.q, request.k, request.v, counts, **arguments)
    keys, weights = definition.top_keys(want.scores, want.weights, 4)
    torch.testing.assert_close(found, Statistics(*want[:3], want.weights[:, :, rows], keys, weights))
    leaves = [x for x in (*request.qkv().values(), *trained(request).values()) if x.requires_grad]
    given = [dx.double() for dx in gradients_for(request)[2:]]
    first, again = (
        torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True)
        for results in (found[:3], want[:3])
    )
    torch.testing.assert_close(first, again)


def test_a_row_without_keys_and_nan_that_nobody_sees(device):
    q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (18, 33, 33))
    k[:, :, 20:], v[:, :, 20:], q[:, 1, 7] = torch.nan, torch.nan, torch.nan
    keep = torch.ones(1, 2, 18, 33, dtype=torch.bool, device=device)
    keep[..., 20:], keep[:, 1, 7] = False, False
    for x in (q, k):
        x.requires_grad_()
    stats = replace(ALL, rows=torch.tensor([7], device=device), top_k=3)
    out, found = tilewise.attention(q, k, v, mask=keep, return_stats=stats, impl="portable")
    assert found.max_logit[0, 1, 7] == -torch.inf and found.entropy[0, 1, 7] == 0
    assert not found.key_mass[..., 20:].any() and not found.weights[0, 1].any()
    assert (found.top_keys[0, 1, 7] == -1).all() and not found.top_weights[0, 1, 7].any()
    for x in (found.entropy, found.key_mass, found.weights, found.top_weights):
        assert not x.isnan().any()
    total = found.max_logit.sum() + found.entropy.square().sum() + found.key_mass.square().sum() + out.sum()
    dq, dk = torch.autograd.grad(total, (q, k))
    assert not dq.isnan().any() and not dk.isnan().any()
    assert not dq[:, 1, 7].any() and not dk[:, :, 20:].any() and dq.any() and dk.any()


def test_huge_scores(device):
    """Of ±10⁴, and beside a mask of finfo.min: lse - E[s] would leave nothing."""
    torch.manual_seed(0)
    q, k = 100 * torch.randn(1, 2, 20, 16, device=device), 100 * torch.randn(1, 2, 40, 16, device=device)
    k = k.round().bfloat16().float()
    q = q.round().bfloat16().float()
    k[:, :, 1::2] = k[:, :, ::2]  # two keys share each score
    bias = torch.zeros(20, 40, device=device)
    bias[:, 30:], bias[3] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        found = tilewise.attention(q, k, k, bias=bias, return_stats=ALL, impl="portable")[1]
    exact, yardstick = (
        tilewise.attention(
            *(x.to(dtype) for x in (q, k, k)), bias=bias.to(dtype), return_stats=ALL, impl="torch"
        )[1]
        for dtype in (torch.float64, torch.float32)
    )
    assert found.max_logit.abs().max() > 1e4
    assert_statistics(found, exact, yardstick)
    assert (found.entropy[0, :, :3] >= 0.69).all()  # ln 2


def test_the_result_is_the_same_bits_with_and_without(device):
    problem = problem_of(device, ("float16", "causal", "sink", "alibi", "grouped_heads"))
    q, k, v = problem.tensors()
    arguments = problem.keywords() | dict(impl="portable", return_lse=True)
    with forced(problem):
        plain_ = tilewise.attention(q, k, v, **arguments)
        found = tilewise.attention(q, k, v, **arguments, return_stats=replace(ALL, top_k=2))
    assert all(torch.equal(a, b) for a, b in zip(plain_, found, strict=False))


def test_largest_keys_of_equal_weights(device):
    """The smaller key first, whichever tile it is in; and max_logit's gradient goes to the first."""
    q = torch.ones(1, 1, 17, 16, device=device)
    k = torch.zeros(1, 1, 40, 16, device=device)
    k[:, :, [5, 21, 22, 39]] = 1.0
    k[:, :, 30] = 2.0
    k.requires_grad_()
    for mask, wanted in ((None, [30, 5, 21, 22, 39, 0, 1]), (tilewise.Window(None, 6), None)):
        with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
            stats = Stats(max_logit=True, top_k=7)
            found = tilewise.attention(q, k, k.detach(), mask=mask, return_stats=stats, impl="portable")[1]
        if wanted is not None:
            assert found.top_keys.squeeze().tolist() == [wanted] * 17
            (dk,) = torch.autograd.grad(found.max_logit.sum(), k)
            assert dk.abs().sum(-1).nonzero()[:, 2].tolist() == [30]
        else:
            exact = tilewise.attention(q, k, k.detach(), mask=mask, return_stats=stats, impl="torch")[1]
            assert torch.equal(found.top_keys, exact.top_keys)
    early = tilewise.Padding(25)
    found = tilewise.attention(q, k, k.detach(), mask=early, return_stats=ALL, impl="portable")[1]
    (dk,) = torch.autograd.grad(found.max_logit.sum(), k)
    assert dk.abs().sum(-1).nonzero()[:, 2].tolist() == [5]


def test_rows_that_are_not_there_have_no_weights(device):
    q, k = torch.randn(1, 2, 18, 16, device=device), torch.randn(1, 2, 20, 16, device=device)
    rows = torch.tensor([17, -1, 18, 2**40, -(2**40), 0], device=device)
    with sanitize():
        found = tilewise.attention(q, k, k, return_stats=Stats(rows=rows), impl="portable")[1].weights
    want = torch.softmax(q @ k.mT / 4, -1)
    assert not found[:, :, 1:5].any()
    torch.testing.assert_close(found[:, :, [0, 5]], want[:, :, [17, 0]])


def test_second_derivatives_raise(device):
    q = torch.randn(1, 1, 4, 16, device=device, requires_grad=True)
    found = tilewise.attention(q, q, q, return_stats=ALL, impl="portable")[1]
    (dq,) = torch.autograd.grad(found.entropy.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="return_stats has no second-order gradients"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match=r"return_stats under torch\.func"):
        torch.func.grad(
            lambda x: tilewise.attention(x, q, q, return_stats=ALL, impl="portable")[1].entropy.sum()
        )(q)


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        (True, "return_stats=True must be tilewise.Stats"),
        (Stats, "with its brackets"),
        (Stats(entropy=1), r"Stats\(entropy=1\) must be True or False"),
        (Stats(top_k=33), r"Stats\(top_k=33\) must be a number from 0 to 32"),
        (Stats(top_k=True), r"Stats\(top_k=True\)"),
        (Stats(rows=torch.ones(3)), r"Stats\(rows=torch.float32\) must be a tensor of dtype"),
        (Stats(rows=torch.ones(3, 1).long()), r"of shape \(3, 1\) must be \[rows\]"),
        (
            Stats(key_mass=torch.ones(7)),
            r"of shape \(7,\) must broadcast to \[batch, q_heads, q_len\] = \[1, 2, 5\]",
        ),
        (Stats(key_mass=torch.ones(5).int()), r"Stats\(key_mass=\) of torch.int32"),
        (Stats(key_mass=torch.ones(5, requires_grad=True)), "detach"),
        (Stats(key_mass="all"), r"Stats\(key_mass='all'\)"),
    ],
)
def test_mistakes(stats, said):
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=said):
        tilewise.attention(q, q, q, return_stats=stats)
    assert len(tilewise.why_not(q, q, q, return_stats=stats)) == 1
    with pytest.raises(ValueError, match="must"):
        tilewise.packed_attention(
            *[q[0].transpose(0, 1)] * 3, q_offsets=torch.tensor([0, 5]), return_stats=Stats(top_k=-1)
        )


def test_without_statistics_nothing_is_asked_of_the_kernels(device, monkeypatch):
    """Such a call launches what it did before they were there: no pointer, no walk more."""
    seen = []
    real = tilewise.kernels.forward.launch
    monkeypatch.setattr(
        "tilewise.kernels.forward.launch",
        lambda *args, **given: (seen.append(given["stats"]), real(*args, **given)),
    )
    q = torch.randn(1, 1, 4, 16, device=device)
    run_forward(request_of(q, q, q, impl="portable"), return_lse=True, for_backward=True)
    assert seen == [()]


def test_what_is_asked_for_is_what_comes_back(device):
    q = torch.randn(2, 1, 4, 16, device=device)
    out, lse, found = tilewise.attention(q, q, q, return_lse=True, return_stats=Stats(top_k=2))
    assert found.top_keys.shape == (2, 1, 4, 2) and found.top_keys.dtype == torch.int64
    assert found[:4] == (None,) * 4 and out.shape == q.shape and lse.shape == (2, 1, 4)
    empty = tilewise.attention(
        q[:, :, :0], q, q, return_stats=replace(ALL, rows=torch.tensor([0], device=device))
    )[1]
    assert empty.max_logit.shape == (2, 1, 0) and not empty.key_mass.any() and not empty.weights.any()
    keyless = tilewise.attention(q, q[:, :, :0], q[:, :, :0], return_stats=replace(ALL, top_k=3))[1]
    assert (keyless.max_logit == -torch.inf).all() and (keyless.top_keys == -1).all()
    assert not keyless.entropy.any() and keyless.key_mass.shape == (2, 1, 0)
