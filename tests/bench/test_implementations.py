"""Is every rival asked for the same as tilewise? And does it say why, where it cannot be asked?"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from bench.answers import judge_backward, judge_forward
from bench.groups import GROUPS, comparisons
from bench.implementations import IMPLEMENTATIONS, UnsupportedError, flashinfer, flex, for_group, select
from bench.implementations.base import Prepared, cannot_import
from bench.implementations.host import no_launch
from tilewise.tools.inputs import case_inputs
from tilewise.tools.shrink import shortened, smoke
from tilewise_reference.cases import CASES, FEATURE_CASES, PACKED_CASES, SHORT_CASES, Case, Features

from .stand_ins import MODULES

CPU = torch.device("cpu")
ALL = [*CASES, *FEATURE_CASES, *SHORT_CASES]
TINY = [smoke(case) for case in ALL]
# What smaller cases leave open: corners, both sides of a window, a bias that broadcasts.
MORE = [
    Case(
        name=name, batch=2, q_heads=4, kv_heads=kv_heads, q_len=q_len, kv_len=24, head_dim=16, value_dim=16,
        dtype="float16", phase="training", provenance="", features=Features(**features),
    )
    for name, kv_heads, q_len, features in (
        ("top-left", 4, 10, dict(causal="top_left")),
        ("bottom-right", 2, 10, dict(causal="bottom_right")),
        ("window-both", 4, 10, dict(window=(3, 2))),
        ("window-top-left", 4, 24, dict(causal="top_left", window=(4, 0))),
        ("window-offset", 4, 10, dict(causal="bottom_right", window=(4, 0))),
        ("documents-full", 4, 24, dict(documents=3)),
        ("documents-window", 4, 24, dict(documents=3, causal="bottom_right", window=(2, 0))),
        ("bias-heads", 4, 10, dict(bias=(1, 4, 1, 24), causal="bottom_right")),
        ("bias-batch", 4, 10, dict(bias=(2, 1, 10, 24))),
        ("alibi-offset", 2, 10, dict(alibi=True, causal="bottom_right")),
        ("everything-added", 4, 10, dict(alibi=True, relative_position=(8, 6, True), bias=(1, 4, 10, 24))),
        ("sink-dropout", 4, 10, dict(sink=True, dropout=0.2)),
    )
]  # fmt: skip
WITH_LIBRARY = ("flash_attn 2", "flash_attn cute", "flashinfer", "xformers", "jax cudnn")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what is not installed here."""
    monkeypatch.setattr(flashinfer, "WORKSPACE", 1)
    found = {name: make() for name, make in MODULES.items()}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: found.get(name) or real(name, *rest))


def judged(name: str, case: Case, work: Any = "forward", device: torch.device = CPU) -> Any:
    """Hold the implementation to float64, or say why it cannot be."""
    implementation = IMPLEMENTATIONS[name]
    reason = implementation.unsupported(case, work)
    if reason is not None:
        return reason
    inputs = case_inputs(case, device, gradients=work == "backward")
    judge = judge_backward if work == "backward" else judge_forward
    with torch.set_grad_enabled(work == "backward"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judgement = judge(implementation, case, inputs, implementation.prepare(case, inputs, work), work)
    assert not judgement.wrong, f"{name}, {case.name}, {work}: {judgement.wrong}"
    return judgement


# ---- Cases


@pytest.mark.parametrize("make", [smoke, shortened])
def test_shrunk_cases_ask_for_the_same(make):
    for case in [*ALL, *(pair[0] for pair in comparisons("forward grid", tiny=False))]:
        small = make(case)
        assert small.features.keys() == case.features.keys()
        assert (small.head_dim, small.value_dim, small.dtype) == (case.head_dim, case.value_dim, case.dtype)
        assert small.q_heads % small.kv_heads == 0 and small.pairs() > 0
        assert (small.q_heads > small.kv_heads) == (case.q_heads > case.kv_heads)
        assert (small.q_len < small.kv_len) == (case.q_len < case.kv_len)
        # A window, documents and a corner still leave pairs out.
        full = case.pairs() == case.q_len * case.kv_len
        assert (small.pairs() == small.q_len * small.kv_len) == full, small.name
        assert IMPLEMENTATIONS["tilewise portable"].unsupported(small, "backward") is None
    assert max(max(case.q_len, case.kv_len) for case in TINY) == 64
    fits = replace(MORE[0], q_heads=2, kv_heads=2)
    assert make(fits) is fits


@pytest.mark.parametrize("group", GROUPS)
def test_groups_name_each_comparison_once(group):
    for quick in (False, True):
        for tiny in (False, True):
            found = comparisons(group, quick=quick, tiny=tiny)
            assert found and len({(case.name, work) for case, work in found}) == len(found)
    assert len(comparisons(group, quick=True, tiny=False)) <= len(comparisons(group, tiny=False))
    assert any(each.name.startswith("tilewise portable") for each in for_group(group))
    with pytest.raises(ValueError, match="group='nothing' must be one of"):
        comparisons("nothing")


def test_implementations_are_found_by_name():
    assert [each.name for each in select(["sdpa math", "flex"])] == ["flex", "sdpa math"]
    with pytest.raises(ValueError, match="implementation='fast' must be one of tilewise portable, "):
        select(["fast"])


# ---- What nobody can do here


def test_whoever_cannot_run_says_why():
    for name in WITH_LIBRARY:
        assert IMPLEMENTATIONS[name].unavailable(CPU) == "needs a GPU"
    assert IMPLEMENTATIONS["sdpa cudnn"].unavailable(CPU) == "needs a GPU"
    assert cannot_import("a_library_that_is_not_there.ops") == "a_library_that_is_not_there is not installed"


def test_a_library_that_does_not_load_says_why(monkeypatch):
    def fails(name: str) -> None:
        raise OSError("libcudart.so.9: cannot open\nshared object file")

    monkeypatch.setattr(importlib, "import_module", fails)
    assert (
        cannot_import("torch.anything") == "import torch.anything fails: OSError: libcudart.so.9: cannot open"
    )


@pytest.mark.parametrize("work", ["forward", "backward"])
def test_every_case_is_taken_or_refused_in_words(work):
    for case in [*ALL, *MORE, *PACKED_CASES]:
        for implementation in IMPLEMENTATIONS.values():
            reason = implementation.unsupported(case, work)
            assert reason is None or len(reason.split()) >= 4, (implementation.name, case.name)
        assert IMPLEMENTATIONS["tilewise portable"].unsupported(case, work) is None


def test_a_backend_that_refuses_is_unsupported_in_its_own_words(monkeypatch):
    """SDPA raises where its one backend cannot; what it warned is the reason."""

    def refuses(*arguments: Any, **options: Any) -> None:
        warnings.warn(
            "Flash attention kernel not used because: (Triggered internally at x.cpp:1.)", stacklevel=1
        )
        warnings.warn("Flash attention has been runtime disabled. (Triggered internally)", stacklevel=1)
        warnings.warn("cuDNN needs head_dim <= 128, got 256. (Triggered internally at y.h:2.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuses)
    case = TINY[0]
    with pytest.raises(UnsupportedError, match=r"^cuDNN needs head_dim <= 128, got 256.$"):
        IMPLEMENTATIONS["sdpa cudnn"].prepare(case, case_inputs(case, CPU), "forward")


# ---- Answers


@pytest.mark.parametrize("name", ["sdpa math", "sdpa", "flex", "tilewise torch"])
def test_rivals_that_run_here_agree_with_the_oracle(name):
    taken = [judged(name, case) for case in [*TINY, *MORE]]
    assert sum(not isinstance(answer, str) for answer in taken) >= 24


@pytest.mark.parametrize("name", ["sdpa math", "tilewise torch"])
def test_their_gradients_agree_with_the_oracle(name):
    taken = [judged(name, case, "backward") for case in [*map(smoke, FEATURE_CASES), *MORE]]
    assert sum(not isinstance(answer, str) for answer in taken) >= 14


@pytest.mark.parametrize("name", WITH_LIBRARY)
def test_libraries_are_asked_for_the_right_thing(libraries, name):
    taken = {case.name: judged(name, case) for case in [*TINY, *MORE]}
    assert sum(not isinstance(answer, str) for answer in taken.values()) >= 15, taken


@pytest.mark.parametrize("name", [name for name in WITH_LIBRARY if name != "flashinfer"])
def test_libraries_differentiate_the_right_thing(libraries, name):
    cases = [case for case in [*map(smoke, FEATURE_CASES), *MORE] if "dropout" not in case.features]
    taken = {case.name: judged(name, case, "backward") for case in cases}
    assert sum(not isinstance(answer, str) for answer in taken.values()) >= 4, taken


def test_the_kernels_are_judged_too(device):
    assert not isinstance(judged("tilewise portable", MORE[1], "forward", device), str)


@pytest.mark.parametrize("name", ["gpt-oss-20b-local", "swinv2-b-window16", "everything-added"])
def test_flex_is_one_graph_to_the_compiler(name):
    """What is compiled on a GPU goes through the same tracing here."""
    case = next(case for case in [*TINY, *MORE] if case.name.removesuffix("-tiny") == name)
    inputs = case_inputs(case, CPU)
    torch._dynamo.reset()
    run = torch.compile(flex.attend(case, inputs), dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        prepared = Prepared(lambda: run(*inputs[:3]))
        assert not judge_forward(IMPLEMENTATIONS["flex"], case, inputs, prepared).wrong


def test_flex_has_no_backward_here():
    case = TINY[0]
    with pytest.raises(UnsupportedError, match="no backward on a CPU"):
        IMPLEMENTATIONS["flex"].prepare(case, case_inputs(case, CPU, gradients=True), "backward")


# ---- The host's work


def test_no_kernel_is_launched_while_none_shall_be(device):
    q = torch.randn(1, 1, 4, 16, device=device)
    want = tilewise.attention(q, q, q, impl="portable")
    steps = {}
    for number in range(4):
        with no_launch(steps):
            got = tilewise.attention(q, q, q, impl="portable")
        # The second is written down, and runs; all that follow repeat it, but for the kernel.
        assert got.shape == want.shape and torch.equal(got, want) == (number == 1)
    assert [step.replay is not None for step in steps.values()] == [True]
    assert torch.equal(tilewise.attention(q, q, q, impl="portable"), want)
