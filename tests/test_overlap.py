"""The model behind docs/hopper.md: against closed forms, the rules that its machine keeps, and whether the
page and its pictures say what it says."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tilewise.tools.overlap.__main__ import main
from tilewise.tools.overlap.machine import Counts, Machine
from tilewise.tools.overlap.picture import PICTURES
from tilewise.tools.overlap.simulation import (
    CLOCK_RATES,
    H200,
    HOPPER,
    PORTABLE,
    busy,
    busy_in_call,
    rates,
    table,
    tile_clocks,
)

ROOT = Path(__file__).parents[1]
DOCS, BASELINES = ROOT / "docs", ROOT / "tests" / "baselines"
PAGE = (DOCS / "hopper.md").read_text(encoding="utf-8")
# TFLOP/s of full calls at 16k, bf16, on an H100 or H200, by head_dim; docs/hopper.md names the sources.
PUBLISHED = {64: (497, 563), 128: (648, 702), 256: (742, 756)}


def changed(loop, **counts):
    """The loop with other counts; what it issues grows by as much as they do, unless that is given."""
    more = sum(n - getattr(loop.counts, kind) for kind, n in counts.items())
    return replace(loop, counts=loop.counts._replace(**{"issued": loop.counts.issued + more} | counts))


def without_softmax(loop):
    products = sum(loop.matmuls.values())
    return replace(loop, counts=Counts(products, 0, 0, 0, 0, 0, 0, 0), latency=0)


# ---- Closed forms


@pytest.mark.parametrize("dim", HOPPER)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
def test_tensor_cores_are_always_busy_without_a_softmax(dim, warpgroups):
    assert busy(replace(without_softmax(HOPPER[dim]), warpgroups=warpgroups)) == 1
    portable = replace(without_softmax(PORTABLE[64]), warpgroups=warpgroups)
    assert busy(portable) == pytest.approx(1, abs=0.005)  # it waits for S before it issues PV


@pytest.mark.parametrize("latency", [0, 30, 60])
def test_one_warpgroup_alone_waits_for_what_its_product_does_not_cover(latency):
    """head_dim 128: S takes 512 clocks and PV as many; PV is the shorter, and runs under the softmax."""
    loop = replace(HOPPER[128], warpgroups=1, latency=latency)
    counts, shuffles = (
        loop.counts,
        2 * 8 + 2 * 8,
    )  # two rounds for the maximum and for the sum, 2 of 4 clocks each
    softmax = 2 * counts.FMNMX + 8 * counts.EX2 + shuffles + 6 * latency
    rescale = counts.F2FP + counts.FMUL + latency  # one a clock, while F2FP takes every second
    assert busy(loop) == pytest.approx(1024 / (512 + latency + softmax + rescale), rel=0.005)
    portable = replace(PORTABLE[128], warpgroups=1, latency=latency)
    assert busy(portable) == pytest.approx(1024 / (1024 + latency + softmax + rescale), rel=0.005)


def test_exponentials_are_the_limit_where_there_are_many():
    loop = changed(HOPPER[128], EX2=1000)
    assert busy(loop) == pytest.approx(1024 / (8 * 1000), rel=0.01)


def test_issue_slots_are_the_limit_where_there_are_many_instructions():
    loop = changed(HOPPER[128], issued=5000)
    assert busy(loop) == pytest.approx(1024 / 5000, rel=0.01)


def test_two_warpgroups_share_a_unit_only_where_both_have_work_for_it():
    """At head_dim 64 a step of two warpgroups needs 1056 clocks of exponentials and 1024 of matmuls."""
    two = busy(replace(HOPPER[64], latency=0))
    assert 2 * busy(replace(HOPPER[64], latency=0, warpgroups=1)) * 0.9 < two < 1024 / 1056


def test_a_tile_of_rows_takes_a_beginning_and_equal_steps():
    for loop in (HOPPER[64], HOPPER[128], PORTABLE[64]):
        four, eight, twelve = (tile_clocks(loop, steps) for steps in (4, 8, 12))
        assert twelve - eight == pytest.approx(eight - four, rel=0.002)
        assert 0 < tile_clocks(loop, 1) < four


# ---- More of what costs time never takes less


@pytest.mark.parametrize("dim", HOPPER)
def test_more_work_and_less_help_never_make_it_faster(dim):
    loop = HOPPER[dim]
    slower = [
        [loop, changed(loop, EX2=2 * loop.counts.EX2), changed(loop, EX2=4 * loop.counts.EX2)],
        [loop, changed(loop, FMNMX=300), changed(loop, FMNMX=900)],
        [replace(loop, latency=latency) for latency in (0, 30, 60, 120)],
        [replace(loop, warpgroups=warpgroups) for warpgroups in (3, 2, 1)],
        [replace(loop, stages=stages) for stages in (3, 2, 1)],
        [loop, replace(loop, kernel="portable")],
    ]
    for loops in slower:
        for faster, after in itertools.pairwise(map(busy, loops)):
            assert after <= faster * 1.001
    assert busy(loop) > 1.5 * busy(replace(loop, kernel="portable")), "overlap must show"


def test_a_causal_mask_wastes_half_a_tile_a_row():
    loop = without_softmax(HOPPER[128])
    full, causal = (busy_in_call(loop, 2048, is_causal) for is_causal in (False, True))
    assert causal < full * 16 / 17 * 1.01  # 16 tiles of rows: 136 tiles are computed and 128 count
    assert busy_in_call(loop, 16384, True) > causal


# ---- The rules of the machine


def test_rates_are_the_datasheet_s():
    assert rates(1.0, H200) == "989 / 865" and CLOCK_RATES[0] == H200.clock


@pytest.mark.parametrize(
    "loop", [*HOPPER.values(), *PORTABLE.values()], ids=lambda loop: f"{loop.kernel}-{loop.dim}"
)
@pytest.mark.parametrize("change", [{}, {"warpgroups": 3}, {"stages": 1}, {"has_turns": False}], ids=str)
def test_nobody_runs_ahead(loop, change):
    """A buffer is filled after all have read it, a product follows its copies, a softmax its scores; what one
    warpgroup sums up comes in order; and all of the work is done."""
    loop = replace(loop, **change)
    steps, tiles = 3, 2
    timeline = Machine(loop, steps, tiles, H200).run().timeline
    spans = {}
    for work in timeline:
        assert not any(work.left.values())
        begin, end = spans.get((work.role, work.name, work.step), (work.begin, work.end))
        spans[work.role, work.name, work.step] = min(begin, work.begin), max(end, work.end)
    groups = [f"warpgroup {me + 1}" for me in range(loop.warpgroups)]
    for step in range(steps * tiles):
        for group in groups:
            assert spans["copies", "K", step][1] <= spans[group, "S", step][0]
            assert spans["copies", "V", step][1] <= spans[group, "PV", step][0]
            assert spans[group, "S", step][1] <= spans[group, "softmax", step][0]
            assert spans[group, "softmax", step][1] <= spans[group, "PV", step][0]
            if step:
                assert spans[group, "PV", step - 1][1] <= spans[group, "PV", step][0]
        if step >= loop.stages:
            for group in groups:
                assert spans[group, "S", step - loop.stages][1] <= spans["copies", "K", step][0]
                assert spans[group, "PV", step - loop.stages][1] <= spans["copies", "V", step][0]


@pytest.mark.parametrize("has_turns", [True, False])
def test_turns_keep_a_warpgroup_s_products_together(has_turns):
    """Where nothing else keeps them apart: with one buffer, all warpgroups wait for the same copies."""
    loop = replace(HOPPER[128], has_turns=has_turns, stages=1)
    timeline = Machine(loop, 6, 1, H200).run().timeline
    products = [work for work in timeline if work.name in ("S", "PV") and 0 < work.step < 5]
    products.sort(key=lambda work: work.begin)
    apart = [before.end <= after.begin for before, after in itertools.pairwise(products)]
    assert all(apart) == has_turns


# ---- The page and its pictures


def test_the_page_has_the_table():
    assert [line for line in table() if not line.startswith("| ---") and line not in PAGE] == []


def test_the_portable_kernel_s_counts_are_those_of_its_baseline():
    """Which has full calls at one head_dim and causal ones at all; their full loops are nearly alike."""
    baseline = json.loads((BASELINES / "inspect.json").read_text(encoding="utf-8"))["3.9.0"]
    for dim, loop in PORTABLE.items():
        row = baseline[f"sm_90 forward bf16 {dim} causal"]
        assert row["instructions"][0] == pytest.approx(loop.counts.issued, rel=0.1)
        assert row["matmuls"][0] == sum(loop.matmuls.values())
        assert row["exponentials"][0] == loop.counts.EX2


def test_the_lines_that_the_page_explains_are_in_the_kernel_in_this_order():
    source = (ROOT / "kernels/tilewise/kernels/hopper/consumer.py").read_text(encoding="utf-8")
    source = source[source.index("for step in range(begin, end):") :]
    section = PAGE[PAGE.index("## A step, line by line") : PAGE.index("## Five things")]
    lines = re.findall(r"^\| `(.+?)(?:\.\.\.\)?)?` \|", section, re.M)
    assert len(lines) == 16
    for line in lines:
        assert line in source, "not there, or not after the line before"
        source = source[source.index(line) + len(line) :]


def test_the_page_says_how_much_the_assumed_latency_matters():
    shares = [f"{busy(replace(HOPPER[64], latency=latency)) * 100:.0f} %" for latency in (0, 30, 60)]
    assert "{}, {} and {} at head_dim 64; at 128 and 256 it makes no".format(*shares) in PAGE
    assert all(busy(replace(HOPPER[dim], latency=60)) > 0.995 for dim in (128, 256))


def test_the_page_compares_with_what_is_published():
    full = {dim: float(rates(busy_in_call(HOPPER[dim], 16384, False), H200).split()[0]) for dim in HOPPER}
    reached = [rate / full[dim] for dim, published in PUBLISHED.items() for rate in published]
    assert f"{min(reached) * 100:.0f} to {max(reached) * 100:.0f} %" in PAGE
    for dim, published in PUBLISHED.items():
        row = re.search(rf"^\| {dim} \| (\d+) \| (\d+) \|", PAGE, re.M)
        assert row is not None and sorted(map(int, row.groups())) == sorted(published)


def test_the_page_says_what_would_refute_it():
    loop = HOPPER[128]
    assert f"(the model says {busy(loop) / busy(PORTABLE[128]):.1f})" in PAGE
    for other in (replace(loop, has_turns=False), replace(loop, stages=3)):
        assert busy(other) == pytest.approx(busy(loop), rel=0.001)  # "no difference in either"
    step = (tile_clocks(loop, 8) - tile_clocks(loop, 4)) / 4
    assert f"about {(tile_clocks(loop, 4) - 4 * step) / 100:.0f}00 clocks, a fifth of a step" in PAGE


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_are_those_of_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["overlap", "--svg", str(tmp_path)])
    main()
    drawn = (tmp_path / name).read_text(encoding="utf-8")
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert drawn == committed, "python -m tilewise.tools.overlap --svg docs"
    assert f"({name})" in PAGE and len(committed.encode()) <= 40_000
    texts = {node.text for node in ElementTree.fromstring(committed).iter("{http://www.w3.org/2000/svg}text")}
    assert {"tensor cores", "warpgroup 1", "warpgroup 2", "copies", "S₀", "PV₀", "softmax₁", "K₁"} <= texts
