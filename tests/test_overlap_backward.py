"""The model of Hopper's backward: closed forms, the rules that its machine keeps, and docs/hopper.md."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.tools.overlap.backward import BackwardLoop, port_clocks
from tilewise.tools.overlap.machine import Counts, Machine
from tilewise.tools.overlap.simulation import (
    H200,
    HOPPER_BACKWARD,
    backward_busy,
    backward_busy_in_call,
    backward_products,
    backward_step,
    backward_table,
    rates,
)

PAGE = Path(__file__).parents[1] / "docs" / "hopper.md"
# TFLOP/s of full calls at 16k at head_dim 128, bf16: FlashAttention-3 (its paper, H100), cuDNN 9.19 (H200).
PUBLISHED = (561, 612)
LOOPS = pytest.mark.parametrize("loop", HOPPER_BACKWARD.values(), ids=lambda loop: str(loop.dim))


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def changed(loop: BackwardLoop, **counts: int) -> BackwardLoop:
    """The loop with other counts; what it issues grows by as much as they do, unless that is given."""
    more = sum(n - getattr(loop.counts, kind) for kind, n in counts.items())
    return replace(loop, counts=loop.counts._replace(**{"issued": loop.counts.issued + more} | counts))


@LOOPS
def test_five_products_of_as_many_clocks(loop):
    """Each multiplies 64 keys a warpgroup with the step's rows and all columns."""
    costs = loop.costs(H200)
    one = 2 * 64 * loop.tile_q * loop.dim / H200.matmul_flops
    assert {name: n * costs[name].clocks for name, n in loop.matmuls.items()} == dict.fromkeys(
        ("S", "dP", "dV", "dK", "dQ"), one
    )
    assert backward_products(loop) == 5 * loop.warpgroups * one
    assert sum(loop.matmuls.values()) == 32, "as the machine code has"


def test_what_passes_the_port_of_shared_memory():
    """head_dim 128, 64 rows, by hand: operands of S, dP and dQ 32 KiB each a warpgroup, of dV and dK
    16; dS 8 in; dQ 32 in and 32 out; Q and dO 16 each."""
    loop = HOPPER_BACKWARD[128]
    assert port_clocks(loop, H200) * 128 == (2 * (3 * 32 + 2 * 16 + 8) + 64 + 32) * 1024


@LOOPS
def test_products_alone_keep_the_tensor_cores_busy(loop):
    alone = replace(loop, counts=Counts(32, 0, 0, 0, 0, 0, 0, 0), stores=0, latency=0)
    assert backward_step(alone) == max(backward_products(alone), port_clocks(alone, H200))


@LOOPS
def test_a_unit_with_much_to_do_is_the_limit(loop):
    assert backward_step(changed(loop, EX2=1000)) == pytest.approx(2 * 8 * 1000, rel=0.15)
    assert backward_step(changed(loop, issued=5000)) == pytest.approx(2 * 5000, rel=0.15)


@LOOPS
def test_more_work_and_less_help_never_make_it_faster(loop):
    slower = [
        [loop, changed(loop, EX2=2 * loop.counts.EX2), changed(loop, EX2=8 * loop.counts.EX2)],
        [loop, replace(loop, stores=200), replace(loop, stores=800)],
        [replace(loop, latency=latency) for latency in (0, 30, 60, 120)],
        [replace(loop, stages=stages) for stages in (3, 2, 1)],
    ]
    for loops in slower:
        for faster, after in itertools.pairwise(map(backward_step, loops)):
            assert faster <= after * 1.001


@LOOPS
@pytest.mark.parametrize("stages", [1, 2])
def test_nobody_runs_ahead(loop, stages):
    """A product follows its copies and what it multiplies; dQ follows dS of both; its place is free."""
    steps = 4
    spans: dict[tuple[str, str, int], tuple[float, float]] = {}
    for work in Machine(replace(loop, stages=stages), steps, 1, H200).run().timeline:
        assert not any(work.left.values())
        begin, end = spans.get((work.role, work.name, work.step), (work.begin, work.end))
        spans[work.role, work.name, work.step] = min(begin, work.begin), max(end, work.end)
    groups = ("warpgroup 1", "warpgroup 2")
    for step in range(steps):
        for group in groups:
            before = {name: spans[group, name, step][0] for name in ("S", "P", "dP", "dV", "dS", "dK", "dQ")}
            assert spans["copies", "Q", step][1] <= before["S"]
            assert spans["copies", "dO", step][1] <= before["dP"]
            for first, then in (("S", "P"), ("P", "dV"), ("dP", "dS"), ("dS", "dQ"), ("dS", "dK")):
                assert spans[group, first, step][1] <= before[then], (first, then)
            assert max(spans[each, "dS", step][1] for each in groups) <= before["dQ"]
            assert spans[group, "dQ", step][1] <= spans["copies", "dQ", step][0]
            if step >= stages:
                assert spans[group, "dK", step - stages][1] <= spans["copies", "Q", step][0]


def test_the_page_has_the_table():
    assert [line for line in backward_table() if not line.startswith("| ---") and line not in page()] == []


def test_the_page_compares_with_what_is_published():
    full = float(rates(backward_busy_in_call(HOPPER_BACKWARD[128], 16384, False), H200).split()[0])
    low, high = (f"{rate / full * 100:.0f}" for rate in PUBLISHED)
    assert re.search(rf"FlashAttention-3 561 .*cuDNN 612 .*{low} and {high} % of the bound", page())


def test_the_page_says_how_much_the_assumed_latency_matters():
    shares = [f"{backward_busy(replace(HOPPER_BACKWARD[64], latency=n)) * 100:.0f} %" for n in (0, 30, 60)]
    assert "{}, {} and {} at head_dim 64, and the same at 128".format(*shares) in page()
    at_128 = [backward_busy(replace(HOPPER_BACKWARD[128], latency=n)) for n in (0, 30, 60)]
    assert len(set(at_128)) == 1
