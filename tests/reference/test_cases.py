"""The named cases: their counts against brute force and against figures worked by hand."""

from dataclasses import replace

import pytest
import torch

from tilewise_reference import CASES, masks, paper_grid
from tilewise_reference.cases import (
    CACHED_CASES,
    FEATURE_CASES,
    LONG_CASES,
    PACKED_CASES,
    SHORT_CASES,
    Case,
    Features,
    long_tailed,
    named_cases,
)

ALL = (*CASES, *paper_grid(), *FEATURE_CASES, *SHORT_CASES, *LONG_CASES, *PACKED_CASES, *CACHED_CASES)
BY_NAME = {case.name: case for case in CASES}
SMALL = Case("small", 2, 6, 3, 5, 7, 4, 3, "float16", "prefill", "made up")


def test_names_are_unique_across_models_and_the_grid():
    names = [case.name for case in ALL]
    assert len(names) == len(set(names)) and set(named_cases()) == set(names)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_case_is_well_formed(case):
    assert case.q_heads % case.kv_heads == 0
    assert min(case.batch, case.kv_heads, case.q_len, case.kv_len, case.head_dim, case.value_dim) >= 1
    assert case.torch_dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert case.phase in ("prefill", "decode", "training", "encoder")
    assert case.phase != "decode" or case.q_len == 1
    assert len(case.provenance) > 20
    assert set(case.features) <= set(Features.__annotations__)
    if "bias" in case.features:
        torch.empty(case.features["bias"], device="meta").expand(
            case.batch, case.q_heads, case.q_len, case.kv_len
        )
    assert case.flops() > 0 and case.bytes() > 0
    assert hash(case) == hash(replace(case))


def test_grid_is_the_papers():
    grid = list(paper_grid())
    assert len(grid) == 3 * 2 * 6
    assert {case.head_dim for case in grid} == {64, 128, 256}
    assert {case.q_len for case in grid} == {512, 1024, 2048, 4096, 8192, 16384}
    for case in grid:
        assert case.batch * case.q_len == 16384 and case.q_heads * case.head_dim == 2048
        assert (case.q_heads, case.q_len, case.head_dim) == (case.kv_heads, case.kv_len, case.value_dim)


@pytest.mark.parametrize("window", [None, (0, 0), (2, 0), (1, 1), (None, 2), (3, None), (None, None)])
@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (3, 8), (8, 3), (1, 6)])
def test_counts_by_brute_force(q_len, kv_len, causal, window):
    features: Features = {}
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    q_idx, kv_idx = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    zero = torch.tensor(0)
    if causal is not None:
        features["causal"] = causal
        keep &= masks.causal(q_len, kv_len, causal)(zero, zero, q_idx, kv_idx)
    if window is not None:
        features["window"] = window
        keep &= masks.window(*window, q_len, kv_len, causal or "bottom_right")(zero, zero, q_idx, kv_idx)
    case = replace(SMALL, q_len=q_len, kv_len=kv_len, features=features)

    pairs = int(keep.sum())
    assert case.pairs() == pairs
    # For each of 2 · 6 heads and each pair: 4 multiply-adds for the score, 3 for the value.
    assert case.flops() == 12 * pairs * 2 * (4 + 3)
    # Backward: S, dQ and dK over head_dim 4; dP and dV over value_dim 3.
    assert case.flops("backward") == 12 * pairs * 2 * (3 * 4 + 2 * 3)
    # Forward mode: S and two products more, O and two more. Double backward: 7 and 5.
    assert case.flops("forward mode") == 12 * pairs * 2 * (3 * 4 + 3 * 3)
    assert case.flops("double backward") == 12 * pairs * 2 * (7 * 4 + 5 * 3)
    # fp16: q and out of 2 · 6 heads; of 2 · 3 heads, the keys and values that some query sees.
    assert case.bytes() == 2 * (12 * q_len * (4 + 3) + 6 * int(keep.any(0).sum()) * (4 + 3))


@pytest.mark.parametrize(
    ("features", "numbers"),
    [
        ({"sink": True}, 6),  # one per query head
        ({"similarity": "cosine", "temperature": True}, 6),
        ({"alibi": True}, 6),
        ({"sink": False}, 0),
        ({"bias": (1, 6, 5, 7)}, 6 * 5 * 7),  # the bias as stored, not as broadcast
        ({"relative_position": (32, 128, True)}, 6 * 32),
    ],
)
def test_bytes_of_what_features_read(features, numbers):
    assert replace(SMALL, features=features).bytes() == SMALL.bytes() + 2 * numbers


def test_backward_is_two_and_a_half_forwards_where_the_head_dims_agree():
    for case in CASES:
        if case.head_dim == case.value_dim:
            assert 2 * case.flops("backward") == 5 * case.flops()


def test_llama_by_hand():
    # Prefill of 8192 tokens, causal: 8192 · 8193 / 2 = 33 558 528 pairs, 32 heads, 4 · 128 operations each.
    case = BY_NAME["llama3-8b-prefill"]
    assert case.pairs() == 33_558_528
    assert case.flops() == 33_558_528 * 32 * 512 == 549_822_922_752
    # bf16: q and out 32 heads, k and v 8 heads of 8192 · 128 numbers: (64 + 16) · 2²⁰ · 2 bytes = 160 MiB.
    assert case.bytes() == 160 * 2**20
    # 70B has twice the query heads and as many key/value heads: (128 + 16) · 2 MiB.
    case = BY_NAME["llama3-70b-prefill"]
    assert case.flops() == 2 * 549_822_922_752
    assert case.bytes() == 288 * 2**20
    # Decoding one token sees all 8192 keys: 16 sequences · 64 heads · 8192 pairs · 512 operations = 2³².
    case = BY_NAME["llama3-70b-decode"]
    assert case.flops() == 2**32
    # The cache, 16 · 8 heads · 8192 · 256 numbers, is nearly all of its traffic; q and out are 16 · 64 · 256.
    assert case.bytes() == 2 * (16 * 8 * 8192 * 256 + 16 * 64 * 256)


def test_window_by_hand():
    # gpt-oss: 128 keys a row once the window is full; the first 128 rows see 1, 2, ..., 128.
    assert BY_NAME["gpt-oss-20b-local"].pairs() == 128 * 129 // 2 + (8192 - 128) * 128
    decode = BY_NAME["gpt-oss-20b-local-decode"]
    assert decode.pairs() == 128
    # Of the cache only the window is read: 16 · 8 heads · 128 keys; then q and out, and 64 sinks.
    assert decode.bytes() == 2 * (16 * 8 * 128 * 128 + 16 * 64 * 128 + 64)
    # Gemma 2: 4096 keys a row.
    assert BY_NAME["gemma2-2b-local"].pairs() == 4096 * 4097 // 2 + (8192 - 4096) * 4096


def test_documents_by_hand():
    # 5 positions of 2 documents: 3 in the first, 2 in the second.
    case = replace(SMALL, q_len=5, kv_len=5, features={"documents": 2})
    assert case.document_ids().tolist() == [0, 0, 0, 1, 1]
    assert case.pairs() == 9 + 4
    assert replace(case, features={"documents": 2, "causal": "bottom_right"}).pairs() == 6 + 3


def test_a_dense_mask_counts_in_full_and_is_read_in_bytes():
    case = replace(SMALL, features={"bool_mask": True})
    assert (case.pairs(), case.bytes()) == (5 * 7, SMALL.bytes() + 5 * 7)


# ---- Packed sequences


def packed(*lengths: int, **features) -> Case:
    longest = max(lengths)
    asks = {**features, "lengths": lengths}
    return replace(SMALL, batch=len(lengths), q_len=longest, kv_len=longest, features=asks)


@pytest.mark.parametrize(
    "features", [{}, {"causal": "bottom_right"}, {"causal": "bottom_right", "window": (2, 0)}]
)
def test_packed_sequences_count_as_each_does_by_itself(features):
    case = packed(5, 1, 9, 5, **features)
    alone = [replace(SMALL, batch=1, q_len=n, kv_len=n, features=features) for n in (5, 1, 9, 5)]
    assert [case.sequence(n) for n in case.lengths] == alone
    assert case.tokens == 20 and case.all_pairs() == sum(one.pairs() for one in alone)
    for work in ("forward", "backward"):
        assert case.flops(work) == sum(one.flops(work) for one in alone)
    assert case.bytes() == sum(one.bytes() for one in alone)


def test_packed_sequences_by_hand():
    # Full: 9 + 49 pairs, 6 heads, 2 · (4 + 3) operations. Causal: 3 · 4 / 2 + 7 · 8 / 2 pairs.
    assert packed(3, 7).flops() == (9 + 49) * 6 * 14
    assert packed(3, 7, causal="bottom_right").all_pairs() == 6 + 28
    # fp16: q and out of 6 heads, k and v of 3, 10 tokens of 4 + 3 numbers; the sinks are there once.
    assert packed(3, 7).bytes() == 2 * (6 + 3) * 10 * 7
    assert packed(3, 7, sink=True).bytes() == packed(3, 7).bytes() + 2 * 6


def test_equal_packed_sequences_count_as_the_dense_batch_beside_them():
    named = named_cases()
    pairs = [(case, named[case.name[:-5] + "dense"]) for case in PACKED_CASES if case.name.endswith("-equal")]
    assert len(pairs) == 3
    for case, dense in pairs:
        assert dense.lengths is None and (case.tokens, case.batch) == (dense.tokens, dense.batch) == (
            16384,
            8,
        )
        assert dense == replace(case, name=dense.name, provenance=dense.provenance, features=dense.features)
        assert (case.flops(), case.flops("backward"), case.bytes()) == (
            dense.flops(), dense.flops("backward"), dense.bytes()
        )  # fmt: skip


def test_mixed_lengths_have_a_long_tail():
    lengths = long_tailed(32768, 64)
    assert sum(lengths) == 32768 and len(lengths) == 64 and min(lengths) >= 1
    ordered = sorted(lengths)
    assert ordered[32] < 512 / 1.5 and ordered[-1] > 8 * 512 and list(lengths) != ordered
    assert sum(n * n for n in lengths) < 0.05 * 64 * max(lengths) ** 2
    assert long_tailed(7, 7) and sum(long_tailed(1000, 7)) == 1000


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_counts_what_each_sequence_fills(causal, page_size):
    asks: Features = {"cache": (9, 4, 9), **({"causal": "bottom_right"} if causal else {})}
    if page_size:
        asks["page_size"] = page_size
    case = replace(SMALL, batch=3, q_len=2, kv_len=9, features=asks)
    pairs = (8 + 9) + (3 + 4) + (8 + 9) if causal else 2 * (9 + 4 + 9)
    assert case.all_pairs() == pairs and case.tokens == 6
    assert case.flops() == 6 * pairs * 2 * (4 + 3)
    # q and out of 6 heads, the filled keys and values of 3, once for both queries and for a group of heads.
    assert case.bytes() == 2 * (6 * 6 + 3 * 22) * (4 + 3)
    one = case.sequence(4)
    assert (one.batch, one.q_len, one.kv_len) == (1, 2, 4) and one.features.keys() <= {"causal"}


def test_a_decoding_case_by_hand():
    named = named_cases()
    case = named["cached-llama3-8b-decode-8x32k"]
    # 8 sequences of 32768 rows in 8 heads of 128, keys and values in two bytes: 2^30; q and out beside them.
    assert case.bytes() == 2**30 + 2 * 8 * 32 * 128 * 2
    for one in CACHED_CASES:
        if one.page_size is not None:
            beside = named[one.name.removesuffix(f"-pages{one.page_size}")]
            assert (beside.bytes(), beside.flops()) == (one.bytes(), one.flops()) and beside.page_size is None
    assert sum(case.page_size is None for case in CACHED_CASES) == len(CACHED_CASES) / 3 == 9
    assert sum(case.bytes() >= 256e6 and case.q_len == 1 for case in CACHED_CASES) == 12


def test_caches_that_do_not_fit_the_sizes_are_refused():
    case = replace(SMALL, q_len=2, kv_len=7, features={"cache": (7, 3)})
    for wrong in (
        dict(batch=3),
        dict(q_len=4),
        dict(kv_len=8),
        dict(features={"cache": (7, 3), "lengths": (7, 3)}),
    ):
        with pytest.raises(ValueError, match=r"small: (cache|lengths)="):
            replace(case, **wrong)
    for features in ({"page_size": 4}, {"cache": (7, 3), "page_size": 0}):
        with pytest.raises(ValueError, match=r"page_size=\d must be 1 or more, of a cache"):
            replace(case, features=features)


def test_lengths_that_do_not_fit_the_sizes_are_refused():
    case = packed(3, 7)
    for wrong in (dict(batch=3), dict(q_len=8), dict(kv_len=3), dict(features={"lengths": (0, 7)})):
        with pytest.raises(
            ValueError, match=r"small: lengths=\(.* must be 1 or more each, as many as batch="
        ):
            replace(case, **wrong)
    with pytest.raises(ValueError, match="small has sequences, each with intervals of its own"):
        case.pairs()


def test_beginner_article():
    case = BY_NAME["beginner-article"]
    assert (case.batch, case.q_heads, case.q_len, case.kv_len, case.head_dim) == (1, 1, 10, 10, 256)
    assert case.flops() == 4 * 10 * 10 * 256
