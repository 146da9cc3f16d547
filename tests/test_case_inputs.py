"""Named cases as tensors: what packed ones and caches give, and who takes them or says why not."""

from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise.plan.checks import violations
from tilewise.plan.request import request_of
from tilewise.tools.compiled.variants import case_variants, why_not_hopper
from tilewise.tools.explain.command import explain_case
from tilewise.tools.inputs import NOT_PACKED, case_inputs
from tilewise.tools.inspect.inspect import inspect_kernels
from tilewise.tools.tune.plan import choose_cases
from tilewise_reference.cases import CACHED_CASES, PACKED_CASES, Case, find_case

CPU = torch.device("cpu")
MIXED = "packed-llama3-8b-mixed"


def a_case(**features) -> Case:
    asks = {"causal": "bottom_right", "lengths": (5, 2, 9), **features}
    return Case("small", 3, 4, 2, 9, 9, 16, 8, "float32", "training", "made up", asks)


def test_packed_sequences_stand_one_behind_the_other():
    q, k, v, arguments, learned = case_inputs(a_case(sink=True), CPU, gradients=True)
    assert (q.shape, k.shape, v.shape) == ((16, 4, 16), (16, 2, 16), (16, 2, 8))
    assert all(x.is_contiguous() and x.requires_grad for x in (q, k, v))
    assert arguments["q_offsets"].dtype == torch.int32 and arguments["q_offsets"].tolist() == [0, 5, 7, 16]
    assert arguments.keys() == {"q_offsets", "mask", "sink"} and learned.keys() == {"sink"}
    out = tilewise.packed_attention(q, k, v, **arguments)
    for first, stop in ((0, 5), (5, 7), (7, 16)):
        dense = (x[first:stop].transpose(0, 1)[None] for x in (q, k, v))
        want = tilewise.attention(*dense, mask=tilewise.Causal(), sink=arguments["sink"])
        torch.testing.assert_close(out[first:stop], want[0].transpose(0, 1))
    again = case_inputs(a_case(sink=True), CPU)
    assert torch.equal(q, again.q) and torch.equal(v, again.v)


def test_a_dense_case_has_no_offsets():
    inputs = case_inputs(find_case("packed-llama3-8b-dense"), "meta")
    assert inputs.q.shape == (8, 32, 2048, 128) and inputs.arguments.keys() == {"mask"}


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda case: case.name)
def test_every_packed_case_is_a_call_that_the_kernels_take(case):
    q, k, v, given, _ = case_inputs(case, "meta", gradients=True)
    request = request_of(q, k, v, **given, impl="portable")
    assert [str(violation) for violation in violations(request)] == []
    assert (request.shape.batch, request.shape.q_len) == (case.batch, case.tokens if case.lengths else 2048)


@pytest.mark.parametrize("name", NOT_PACKED)
def test_what_no_packed_case_asks_for_is_refused(name):
    value = {"documents": 2, "bias": (1, 4, 9, 9), "dropout": 0.1}.get(name, True)
    with pytest.raises(ValueError, match=f"case small packs sequences, which no case does with {name}"):
        case_inputs(a_case(**{name: value}), CPU)


def test_explain_counts_each_sequence_of_a_packed_case():
    case = find_case(MIXED)
    found = explain_case(case, "H200", training=False)
    assert found.pairs == sum(n * n for n in case.lengths) * case.q_heads
    assert found.packed is not None and not found.packed.assumed


def test_tune_says_that_it_looks_at_dense_tensors():
    with pytest.raises(
        ValueError, match=f"case {MIXED} packs sequences .* a row is decided by dense tensors"
    ):
        choose_cases([MIXED], None)
    dense = find_case("packed-llama3-8b-dense")
    assert choose_cases([dense.name], None) == [replace(dense)]


def test_inspect_compiles_packed_calls_and_none_of_hoppers():
    assert [each.name for each in case_variants([MIXED], ["forward", "dkv"])] == [MIXED, MIXED]
    for kernel in ("hopper", "hopper_backward"):
        reason = why_not_hopper(kernel, ["sm_90"], [], [], [MIXED])
        assert reason is not None and reason.startswith(f"case='{MIXED}': q_offsets pack sequences")


# ---- Keys and values in a cache


def cached(**features) -> Case:
    asks = {"causal": "bottom_right", "cache": (5, 12, 9), **features}
    return Case("small", 3, 4, 2, 2, 12, 16, 8, "float32", "prefill", "made up", asks)


@pytest.mark.parametrize("page_size", [None, 4])
def test_a_cache_holds_what_each_sequence_fills(page_size):
    case = cached(**({} if page_size is None else {"page_size": page_size}))
    q, k, v, arguments, learned = case_inputs(case, CPU)
    assert q.shape == (3, 4, 2, 16) and not learned and not any(x.requires_grad for x in (q, k, v))
    assert arguments["kv_lens"].dtype == torch.int32 and arguments["kv_lens"].tolist() == [5, 12, 9]
    if page_size is None:
        assert (k.shape, v.shape) == ((3, 2, 12, 16), (3, 2, 12, 8)) and "pages" not in arguments
    else:
        pages = arguments["pages"]
        assert (k.shape, v.shape) == ((8, 4, 2, 16), (8, 4, 2, 8)) and pages.dtype == torch.int32
        used = [n for row, count in zip(pages.tolist(), (2, 3, 3), strict=True) for n in row[:count]]
        assert sorted(used) == [*range(8)] != used
    out = tilewise.cached_attention(q, k, v, **arguments)
    for i, rows in enumerate(case.cache):
        if page_size is None:
            own = [x[i : i + 1, :, :rows] for x in (k, v)]
        else:
            own = [x[arguments["pages"][i].long()].flatten(0, 1)[:rows].transpose(0, 1)[None] for x in (k, v)]
        want = tilewise.attention(q[i : i + 1], *own, mask=tilewise.Causal())
        torch.testing.assert_close(out[i : i + 1], want)
    again = case_inputs(case, CPU)
    assert torch.equal(k, again.k) and torch.equal(v, again.v)


@pytest.mark.parametrize("case", CACHED_CASES, ids=lambda case: case.name)
def test_every_cached_case_is_a_call_that_the_kernels_take(case):
    q, k, v, given, _ = case_inputs(case, "meta")
    assert tilewise.why_not(q, k, v, **given, impl="portable") == []


def test_what_a_cache_has_not_is_refused():
    with pytest.raises(ValueError, match="small has a cache, which no case does with alibi, sink"):
        case_inputs(cached(sink=True, alibi=True), CPU)
    with pytest.raises(ValueError, match="small has a cache, and cached_attention has no gradient"):
        case_inputs(cached(), CPU, gradients=True)


@pytest.mark.parametrize("name", ["cached-llama3-8b-decode-mixed", "cached-llama3-8b-decode-mixed-pages16"])
def test_explain_counts_what_each_sequence_of_a_cache_fills(name):
    case = find_case(name)
    found = explain_case(case, "H200", training=False)
    assert found.pairs == sum(case.cache) * case.q_heads and found.cached is not None
    with pytest.raises(ValueError, match="no gradient"):
        explain_case(case, "H200", training=True)


def test_tune_says_that_it_looks_at_no_cache():
    name = CACHED_CASES[0].name
    with pytest.raises(
        ValueError, match=f"case {name} reads keys and values of a cache, and a row is decided by"
    ):
        choose_cases([name], None)


def test_inspect_says_that_it_looks_at_no_cache():
    name = CACHED_CASES[0].name
    with pytest.raises(ValueError, match=f"case='{name}' reads a cache, which inspect does not look at"):
        inspect_kernels(cases=[name])
