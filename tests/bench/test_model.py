"""The model's words on a timed row: arithmetic on `bench/model.json`, which has sm_90's shipped tiles."""

import itertools
import re

import pytest

from bench.report import model
from bench.results import Row
from tilewise.plan import tiles
from tilewise.tools.rank import rank
from tilewise.tools.rank.call_model import call_seconds
from tilewise_reference import paper_grid

REFRESH = "python -m tilewise.tools.rank --shipped bench/model.json, with the oldest supported Triton"
EVERY = [*itertools.product(rank.WORKS, rank.SHIPPED_DIMS, rank.MASKS)]
CASES = {case.name: case for case in paper_grid(dtype="bfloat16")}


def row(case="paper-d128-causal-8192", work="forward", implementation="tilewise portable", **change):
    flops = CASES[case].flops(work) if case in CASES and work in ("forward", "backward") else 10**12
    given = dict(status="ok", seconds=[0.003, 0.002, 0.0025], flops=flops, dtype="bfloat16")
    return Row("forward grid", case, work, implementation, **given | change)


# ---- model.json


def test_every_shipped_tile_is_there_and_is_the_one_that_ships():
    found = model.kernels()
    assert {*found} == {*EVERY} and len(rank.read_rows(model.MODEL)) == len(EVERY)
    for (work, dim, _), kernel in found.items():
        shipped = tiles.table_tile("sm_90", 2, dim, work)
        assert kernel.model.tile == shipped, f"the table has changed: {REFRESH}"
        assert 0 < kernel.registers <= 255 and kernel.spill_bytes >= 0 and kernel.model.programs >= 1
        assert kernel.model.limit in ("matmul", "exponentials", "issue", "shared memory")
        for step in (kernel.model.full, kernel.model.cut):
            assert 0 < step.full <= step.none and step.full <= step.expected * 1.0001


@pytest.mark.parametrize("work, dim, mask", [("forward", 128, "full"), ("hopper", 128, "causal")])
def test_the_figures_are_those_of_the_kernel_as_it_is(work, dim, mask):
    """Compiled anew, here perhaps by another Triton: a loop a tenth longer passes as the same, as in the
    baseline of `tilewise inspect`."""
    kernel, now = model.kernels()[work, dim, mask], model.kernel_of(rank.shipped_row(work, dim, mask))
    assert (now.model.limit, now.model.programs) == (kernel.model.limit, kernel.model.programs), REFRESH
    assert now.registers == pytest.approx(kernel.registers, abs=8), REFRESH
    for how in ("none", "expected", "full"):
        old, new = getattr(kernel.model.full, how), getattr(now.model.full, how)
        assert new == pytest.approx(old, rel=0.1), REFRESH


# ---- The words


def figures(words: str) -> list[int]:
    pattern = r"measured (\d+) TFLOP/s; the model allows (\d+) if .* overlap, (\d+) if .*, and expects (\d+);"
    return [*map(int, re.match(pattern, words).groups())]


@pytest.mark.parametrize("implementation", ["tilewise portable", "tilewise hopper"])
@pytest.mark.parametrize("work", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_every_case_of_the_grid_has_words(case, work, implementation):
    words = model.words(row(case, work, implementation))
    measured, apart, together, expected = figures(words)
    assert measured == round(CASES[case].flops(work) / 0.0025 / 1e12)
    assert 0 < apart < together <= 989 and 0 < expected <= together + 1  # the datasheet's rate; rounding
    assert "; limit: " in words and " registers, " in words


def test_words_on_a_forward_are_the_model_s_of_its_kernel():
    words = model.words(row())
    kernel, case = model.kernels()["forward", 128, "causal"], CASES["paper-d128-causal-8192"]
    flops = case.flops("forward")
    rates = [flops / call_seconds(kernel.model, case, rank.CHIP, how) for how in ("none", "full", "expected")]
    assert figures(words)[1:] == [round(rate / 1e12) for rate in rates]
    limit, registers = kernel.model.limit, kernel.registers
    assert words.endswith(f"; limit: {limit}; {registers} registers, no spill")


def test_a_backward_is_its_two_kernels_one_after_another_whatever_the_forward():
    portable = model.words(row(work="backward"))
    assert portable == model.words(row(work="backward", implementation="tilewise hopper"))
    pair = [model.kernels()[work, 128, "causal"] for work in ("dkv", "dq")]
    case = CASES["paper-d128-causal-8192"]
    seconds = sum(call_seconds(kernel.model, case, rank.CHIP) for kernel in pair)
    assert figures(portable)[3] == round(case.flops("backward") / seconds / 1e12)
    assert f"limit: dkv {pair[0].model.limit}, dq {pair[1].model.limit};" in portable
    assert f"dkv {pair[0].registers} registers, " in portable


def test_hopper_s_forward_is_another_kernel_and_its_spills_are_told():
    assert figures(model.words(row()))[3] < figures(model.words(row(implementation="tilewise hopper")))[3]
    hopper = model.kernels()["hopper", 128, "causal"]
    assert model.takes(hopper) == "240 registers, no spill"
    assert model.takes(hopper._replace(spill_bytes=48)) == "240 registers, 48 bytes spilled"


@pytest.mark.parametrize(
    "other",
    [
        row("llama3-8b-prefill"),
        row(implementation="sdpa cudnn"),
        row(implementation="tilewise torch"),
        row(work="host forward"),
        row(seconds=[]),
        row(status="wrong"),
    ],
)
def test_other_rows_have_none(other):
    assert model.words(other) == ""
