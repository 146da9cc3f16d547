"""Caches: is every rival asked for the same, and is every sequence held against the oracle?"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from bench.answers import judge_forward, places
from bench.groups import comparisons
from bench.implementations import IMPLEMENTATIONS, flash, flashinfer
from bench.implementations.base import Implementation, Prepared
from bench.implementations.caches import filled, is_even
from bench.measure import blank
from bench.sequences import in_cache
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import smoke
from tilewise_reference.cases import CACHED_CASES, Case, Features

from .stand_ins import MODULES

CPU = torch.device("cpu")
TORCH = IMPLEMENTATIONS["tilewise torch"]


def a_case(*cache: int, q_len: int = 1, page_size: int | None = None, **features: Any) -> Case:
    cache = cache or (7, 40, 3)
    asks = Features(**features, cache=cache)
    if q_len > 1:
        asks["causal"] = "bottom_right"
    if page_size is not None:
        asks["page_size"] = page_size
    return Case(
        name="cached", batch=len(cache), q_heads=8, kv_heads=2, q_len=q_len, kv_len=max(cache), head_dim=16,
        value_dim=16, dtype="float16", phase="decode", provenance="", features=asks,
    )  # fmt: skip


EVEN = (24, 24)
MANY = [
    a_case(*EVEN),
    a_case(*EVEN, q_len=3),
    a_case(*EVEN, page_size=16),
    a_case(),
    a_case(q_len=3),
    a_case(q_len=3, window=(4, 0)),
    a_case(softcap=5.0, scale=0.3),
    a_case(page_size=16),
    a_case(q_len=3, page_size=4),
    a_case(300, 513, q_len=2, page_size=256),
    smoke(next(case for case in CACHED_CASES if case.name.endswith("mixed-pages16"))),
]
# How many of MANY each takes.
TAKEN = {
    "tilewise torch": 11, "sdpa": 5, "sdpa math": 5, "flex": 6, "flash_attn 2": 7, "flash_attn cute": 2,
    "flashinfer": 11, "xformers": 0, "jax cudnn": 0, "varlen_attn": 0, "tilewise hopper": 0,
}  # fmt: skip


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what is not installed here or runs on a GPU alone."""
    monkeypatch.setattr(flashinfer, "WORKSPACE", 1)
    found = {name: make() for name, make in MODULES.items()}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: found.get(name) or real(name, *rest))


def judged(implementation: Implementation, case: Case, device: Any = CPU) -> Any:
    """Hold the implementation to float64, or say why it cannot be."""
    reason = implementation.unsupported(case, "forward")
    if reason is not None:
        assert len(reason.split()) >= 4
        return reason
    inputs = case_inputs(case, device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = implementation.prepare(case, inputs, "forward")
        judgement = judge_forward(implementation, case, inputs, prepared)
    assert not judgement.wrong, f"{implementation}, {case.name}: {judgement.wrong}"
    return judgement


# ---- Answers


@pytest.mark.parametrize("name", TAKEN)
def test_every_rival_is_asked_for_the_same_or_refuses_in_words(libraries, name):
    taken = [judged(IMPLEMENTATIONS[name], case) for case in MANY]
    assert sum(not isinstance(answer, str) for answer in taken) == TAKEN[name], taken


def test_the_kernels_are_judged_too(device):
    ours = IMPLEMENTATIONS["tilewise portable"]
    assert not isinstance(judged(ours, a_case(7, 20, page_size=16), device), str)


def test_nobody_is_asked_for_the_gradient_of_a_cache():
    for name, implementation in IMPLEMENTATIONS.items():
        assert implementation.unsupported(MANY[0], "backward"), name


def test_reasons_say_what_the_cache_has_that_a_rival_lacks():
    reasons = {
        ("sdpa flash", 2): "scaled_dot_product_attention takes no pages",
        ("sdpa flash", 3): "takes no attn_mask",
        ("flex", 2): "own pages are an experiment",
        ("flash_attn 2", 7): f"pages of a multiple of {flash.PAGE} rows, not of 16",
        ("flash_attn cute", 3): "not asked for the lengths of a cache",
    }
    for (name, number), words in reasons.items():
        assert words in (IMPLEMENTATIONS[name].unsupported(MANY[number], "forward") or ""), name


def test_a_mask_of_lengths_ends_where_each_sequence_does():
    case = MANY[4]
    keep = filled(case, case_inputs(case, CPU))
    assert keep.shape == (3, 1, 3, 40)
    assert keep.sum(-1).flatten(1).tolist() == [[5, 6, 7], [38, 39, 40], [1, 2, 3]]
    assert is_even(MANY[0]) and not is_even(case)


def test_flashinfer_may_split_a_contiguous_cache():
    """Its decode splits keys between pages, so that a page as long as the cache would stay whole."""
    case = a_case(130, 100)
    inputs = case_inputs(case, CPU)
    k, v, size, pages = flashinfer.in_pages(case, inputs)
    assert size == 64 and k.shape == v.shape == (6, 64, 2, 16) and pages.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(k[3:].flatten(0, 1)[:130], inputs.k[1].transpose(0, 1))


# ---- What is wrong is seen, wherever it is


class Spoiled(Implementation):
    name, needs_gpu = "spoiled", False

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def unsupported(self, case: Case, work: Any) -> None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        return Prepared(lambda: self.spoil(case, inputs))


def ours(inputs: Inputs, **changes: Any) -> torch.Tensor:
    return tilewise.cached_attention(*inputs[:3], **inputs.arguments | changes, impl="torch")


def late(sequence: int) -> Any:
    """One sequence's length is off by one."""

    def spoil(case: Case, inputs: Inputs) -> torch.Tensor:
        lengths = inputs.arguments["kv_lens"].clone()
        lengths[sequence] -= 1
        return ours(inputs, kv_lens=lengths)

    return spoil


WRONG = {
    "all of the cache": lambda case, i: ours(i, kv_lens=torch.full_like(i.arguments["kv_lens"], 40)),
    "pages in order": lambda case, i: ours(i, pages=i.arguments["pages"].sort(dim=1).values),
    **{f"length of {n}": late(n) for n in range(3)},
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_wrong_in_every_sequence(spoil):
    case = replace(a_case(page_size=4), dtype="float32")
    with pytest.raises(AssertionError, match="spoiled, cached: out is"):
        judged(Spoiled(spoil), case)


def test_pieces_are_what_the_cache_holds_of_each_sequence():
    flat, paged = a_case(q_len=3), a_case(q_len=3, page_size=4)
    for case in (flat, paged):
        inputs = case_inputs(case, CPU)
        pieces = [in_cache(case, inputs, i) for i in range(3)]
        assert [piece.k.shape[2] for piece in pieces] == [7, 40, 3]
        assert all(piece.arguments.keys() == {"mask"} for piece in pieces)
    page = inputs.arguments["pages"][0, 1]
    assert torch.equal(pieces[0].v[0, :, 4:7], inputs.v[page, :3].transpose(0, 1))


def test_places_go_from_the_fewest_rows_to_the_most():
    case = next(case for case in CACHED_CASES if case.name.endswith("mixed"))
    looked_at = [case.cache[place.batch] for place in places(case, CPU)]
    assert looked_at[0] == min(case.cache) and looked_at[-1] == max(case.cache)
    assert len(set(looked_at)) >= 8 and looked_at == sorted(looked_at)


# ---- Sizes


def test_shrunk_caches_ask_for_the_same():
    for case in CACHED_CASES:
        small = smoke(case)
        assert small.features.keys() == case.features.keys() and small.page_size == case.page_size
        assert small.kv_len <= 64 and len(small.cache) == min(case.batch, 3)
        assert is_even(small) == is_even(case) and small.q_len == min(case.q_len, 4)
        assert small.q_heads > small.kv_heads
        assert IMPLEMENTATIONS["tilewise portable"].unsupported(small, "forward") is None
    assert 1 < len(comparisons("decode", tiny=True)) < len(CACHED_CASES)


def test_rows_count_bytes():
    case = CACHED_CASES[0]
    row = blank(case, "forward", "decode", TORCH)
    assert row.bytes == case.bytes() > 2**29 and row.sizes["kv_len"] == 4096
