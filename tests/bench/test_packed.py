"""Packed sequences: is every rival asked for the same, and every sequence held against the oracle?"""

from __future__ import annotations

import importlib
import types
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from bench.answers import at, judge_all_gradients, judge_backward, judge_forward, places
from bench.implementations import IMPLEMENTATIONS, flashinfer, for_group, jagged, varlen
from bench.implementations.base import Implementation, Prepared
from bench.implementations.host import Compiled, Unlaunched
from bench.measure import blank, measure
from bench.sequences import by_sequence, join, split
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import shortened, smoke
from tilewise_reference.cases import PACKED_CASES, Case, Features

from .stand_ins import MODULES, nested_attention

CPU = torch.device("cpu")
TORCH = IMPLEMENTATIONS["tilewise torch"]


def a_case(*lengths: int, heads: tuple[int, int] = (4, 4), dtype: str = "float16", **features: Any) -> Case:
    asks = Features(**features, lengths=lengths or (7, 24, 2))
    longest = max(asks["lengths"])
    return Case(
        name="-".join(features) or "plain", batch=len(asks["lengths"]), q_heads=heads[0], kv_heads=heads[1],
        q_len=longest, kv_len=longest, head_dim=16, value_dim=16, dtype=dtype, phase="training",
        provenance="", features=asks,
    )  # fmt: skip


BY_NAME = {case.name.removeprefix("packed-"): case for case in PACKED_CASES}
CAUSAL = dict(causal="bottom_right")
MANY = [
    a_case(),
    a_case(**CAUSAL),
    a_case(**CAUSAL, heads=(4, 2)),
    a_case(causal="top_left"),
    a_case(**CAUSAL, window=(4, 0)),
    a_case(window=(3, 2)),
    a_case(**CAUSAL, softcap=5.0),
    a_case(**CAUSAL, sink=True, dtype="bfloat16"),
    a_case(**CAUSAL, alibi=True),
    a_case(**CAUSAL, similarity="cosine", temperature=True),
    a_case(**CAUSAL, scale=0.3),
    a_case(relative_position=(8, 6, True)),
    *(smoke(BY_NAME[name]) for name in ("llama3-8b-equal", "llama3-8b-mixed", "llama2-7b-mixed",
                                        "modernbert-base-mixed")),
]  # fmt: skip
# How many of MANY each takes, forward.
TAKEN = {
    "tilewise torch": 16, "flex": 16, "flash_attn 2": 13, "flash_attn cute": 13, "flashinfer": 11,
    "xformers": 9, "varlen_attn": 11, "sdpa flash": 9, "sdpa math": 2,
}  # fmt: skip


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what is not installed here or runs on a GPU alone."""
    monkeypatch.setattr(flashinfer, "WORKSPACE", 1)
    found = {name: make() for name, make in MODULES.items()}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: found.get(name) or real(name, *rest))
    monkeypatch.setattr(jagged.F, "scaled_dot_product_attention", nested_attention(jagged.F))


def judged(implementation: Implementation, case: Case, work: Any = "forward", device: Any = CPU) -> Any:
    """Hold the implementation to float64, or say why it cannot be."""
    reason = implementation.unsupported(case, work)
    if reason is not None:
        assert len(reason.split()) >= 4
        return reason
    inputs = case_inputs(case, device, gradients=work == "backward")
    judge = judge_backward if work == "backward" else judge_forward
    with torch.set_grad_enabled(work == "backward"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = implementation.prepare(case, inputs, work)
        judgement = judge(implementation, case, inputs, prepared, work)
    assert not judgement.wrong, f"{implementation}, {case.name}, {work}: {judgement.wrong}"
    return judgement


# ---- Answers


@pytest.mark.parametrize("name", TAKEN)
def test_every_rival_is_asked_for_the_same_or_refuses_in_words(libraries, name):
    taken = [judged(IMPLEMENTATIONS[name], case) for case in MANY]
    assert sum(not isinstance(answer, str) for answer in taken) == TAKEN[name], taken


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in ("flashinfer", "flex")])
def test_every_rival_differentiates_the_same_or_refuses_in_words(libraries, name):
    taken = [judged(IMPLEMENTATIONS[name], case, "backward") for case in (MANY[0], MANY[2], MANY[7])]
    assert sum(not isinstance(answer, str) for answer in taken) >= 1, taken
    assert IMPLEMENTATIONS["flashinfer"].unsupported(MANY[0], "backward") == "flashinfer has no backward"


def test_the_kernels_are_judged_too(device):
    ours = IMPLEMENTATIONS["tilewise portable"]
    assert not isinstance(judged(ours, MANY[2], "forward", device), str)
    assert not isinstance(judged(ours, a_case(3, 20, **CAUSAL), "backward", device), str)
    assert "q_offsets pack sequences" in judged(IMPLEMENTATIONS["tilewise hopper"], MANY[1])


def test_jax_says_why_not():
    assert "not packed sequences" in IMPLEMENTATIONS["jax cudnn"].unsupported(MANY[0], "forward")


def test_nested_tensors_are_given_what_they_would_else_wait_for(monkeypatch):
    """The lengths of the shortest and longest, and one tensor of offsets for all three."""
    seen: list[torch.Tensor] = []

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(tensors)
        assert options == dict(is_causal=True, scale=0.25)
        return tensors[0]

    monkeypatch.setattr(jagged.F, "scaled_dot_product_attention", attend)
    case = a_case(**CAUSAL, heads=(4, 2))
    inputs = case_inputs(case, CPU)
    assert torch.equal(jagged.jagged_call(case, inputs)(), inputs.q)
    for x in seen:
        assert (x._maybe_min_seqlen, x._maybe_max_seqlen) == (2, 24)
        assert x.offsets() is inputs.arguments["q_offsets"] and x.shape[1] == 4


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ("q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size", "no grouped heads"),
        ("q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal", "takes no scale and no window_size"),
    ],
)
def test_an_older_varlen_attn_says_what_it_lacks(monkeypatch, parameters, reason):
    made: dict[str, Any] = {}
    exec(f"def varlen_attn({parameters}): ...", made)
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(**made))
    rival = varlen.Varlen()
    assert reason in rival.unsupported(a_case(**CAUSAL, heads=(4, 2)), "forward")


def test_pytorchs_own_varlen_attn_has_the_arguments_that_are_used():
    """Of the PyTorch that runs here, if it has it at all."""
    rival = IMPLEMENTATIONS["varlen_attn"]
    taken = rival.parameters()
    assert not taken or {"max_q", "max_k", "cu_seq_q", "cu_seq_k"} <= taken
    assert (rival.unsupported(MANY[1], "forward") is None) == (taken >= varlen.NEEDED)
    assert "is for packed sequences" in rival.unsupported(smoke(PACKED_CASES[1]), "forward")


def test_varlen_attn_is_asked_about_packed_sequences_alone():
    names = {group: [each.name for each in for_group(group)] for group in ("packed backward", "forward grid")}
    assert "varlen_attn" in names["packed backward"] and "varlen_attn" not in names["forward grid"]


# ---- What is wrong is seen, wherever it is


class Spoiled(Implementation):
    """tilewise's own, with something wrong on the way."""

    name, needs_gpu, seeded = "spoiled", False, True

    def __init__(self, spoil: Any, gradient: str = "") -> None:
        self.spoil, self.gradient = spoil, gradient

    def unsupported(self, case: Case, work: Any) -> None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        prepared, spoil, wrong = TORCH.prepare(case, inputs, work), self.spoil, self.gradient
        if not wrong:
            return replace(prepared, call=lambda: spoil(prepared.call(), inputs))

        class Off(Prepared):
            def gradients(self, got: Any) -> dict[str, torch.Tensor]:
                found = prepared.gradients(got)
                return {name: spoil(x, inputs) if name == wrong else x for name, x in found.items()}

        return Off(prepared.call, prepared.leaves)


def end_of(sequence: int) -> Any:
    """The last row of a sequence of MANY's is off by a little."""
    row = (7, 31, 33)[sequence] - 1

    def spoil(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x = x.clone()
        x[row] *= 1.01
        return x

    return spoil


WRONG = {
    "one sequence": lambda out, i: tilewise.attention(
        *(x.transpose(0, 1)[None] for x in i[:3]), mask=tilewise.Causal(), impl="torch"
    )[0].transpose(0, 1),
    "a row late": lambda out, i: out.roll(1, 0),
    "heads first": lambda out, i: out.transpose(0, 1),
    **{f"end of {n}": end_of(n) for n in range(3)},
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_wrong_in_every_sequence(spoil):
    case = a_case(**CAUSAL, dtype="float32")
    with pytest.raises(AssertionError, match="spoiled, causal, forward: out is"):
        judged(Spoiled(spoil), case)


@pytest.mark.parametrize("sequence", range(3))
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_wrong_gradient_is_wrong_in_every_sequence(name, sequence):
    case = a_case(**CAUSAL, dtype="float32")
    with pytest.raises(AssertionError, match=f"spoiled, causal, backward: d{name} is"):
        judged(Spoiled(end_of(sequence), name), case, "backward")


def test_what_all_sequences_learn_is_the_sum_of_what_each_does():
    case = a_case(**CAUSAL, sink=True, alibi=True, trained=True, dtype="float32")
    judgements = judge_all_gradients(TORCH, case, CPU, "backward")
    assert len(judgements) == 5 and not any(judgement.wrong for judgement in judgements)
    off = Spoiled(lambda x, inputs: x * 1.001, "sink")
    assert any(
        judgement.wrong.startswith("dsink") for judgement in judge_all_gradients(off, case, CPU, "backward")
    )


def test_places_go_from_the_shortest_to_the_longest_sequence():
    case = BY_NAME["llama3-8b-mixed"]
    found = places(case, CPU)
    looked_at = sorted(case.lengths[place.batch] for place in found)
    assert len({place.batch for place in found}) == 8 and len({place.head for place in found}) == 8
    assert (looked_at[0], looked_at[-1]) == (min(case.lengths), max(case.lengths))
    for place in found:
        length = case.lengths[place.batch]
        assert place.rows[0] == 0 and place.rows[-1] == length - 1 and len(place.rows) == min(length, 48)


def test_pieces_are_the_sequences():
    case = a_case(**CAUSAL)
    inputs = case_inputs(case, CPU)
    pieces = by_sequence(case, inputs)
    assert [piece.q.shape[2] for piece in pieces] == [7, 24, 2]
    assert torch.equal(join(case, [piece.k for piece in pieces]), inputs.k)
    assert all("q_offsets" not in piece.arguments and "mask" in piece.arguments for piece in pieces)
    place = places(case, CPU)[-1]
    assert torch.equal(at(case, inputs.v, place), inputs.v[7:31, place.head][place.rows])
    dense = smoke(PACKED_CASES[1])
    x = case_inputs(dense, CPU).q
    assert split(dense, x)[0] is x and join(dense, [x]) is x


# ---- Sizes


@pytest.mark.parametrize("make", [smoke, shortened])
def test_shrunk_packed_cases_keep_the_shortest_and_the_longest_sequence(make):
    for case in PACKED_CASES:
        small = make(case)
        assert small.features.keys() == case.features.keys() and small.name != case.name
        assert (small.q_heads > small.kv_heads) == (case.q_heads > case.kv_heads)
        if case.lengths is None:
            continue
        share = small.q_len / case.q_len
        assert small.batch == 3 and small.q_len == (64 if make is smoke else 1024)
        ends = [max(1, round(end(case.lengths) * share)) for end in (min, max)]
        assert [min(small.lengths), max(small.lengths)] == ends
        assert IMPLEMENTATIONS["tilewise portable"].unsupported(small, "backward") is None
    one = a_case(5)
    assert make(one) is one or make(one).lengths == (5,)


def test_rows_say_how_many_tokens_there_are():
    equal, dense = PACKED_CASES[:2]
    sizes = [blank(case, "backward", "packed backward", TORCH) for case in (equal, dense)]
    assert sizes[0].sizes["tokens"] == 16384 and "tokens" not in sizes[1].sizes
    assert sizes[0].flops == sizes[1].flops > 0 and (sizes[0].sizes["batch"], sizes[0].sizes["kv_len"]) == (
        8,
        2048,
    )


def test_what_a_packed_call_costs_the_host_is_timed(device):
    ours = IMPLEMENTATIONS["tilewise portable"]
    wrapped = [ours, Unlaunched(ours), Compiled(ours)]
    case = a_case(3, 1, **CAUSAL)
    rows = measure(
        case, "host forward and backward", wrapped, group="host", seconds=0, device=device, rounds=1, least=1
    )
    assert [row.status for row in rows] == ["ok"] * 3, [row.reason for row in rows]
