"""Is everything compiled, and every case tried, within a few days? harness/turns.py says what a run takes."""

import itertools
import json
from types import SimpleNamespace

import pytest
import triton
from packaging.version import Version

import harness.variants
from harness import turns
from harness.baseline import load
from harness.variants import (
    EVERYWHERE,
    ON_HOPPER,
    SHIPPED,
    hopper_backward_variants,
    hopper_variants,
    shipped_variants,
)
from tests import conftest
from tilewise.tools.compiled.compiler import TARGETS


def compiled_in(turn: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By target, what a run compiles."""
    monkeypatch.setenv("TILEWISE_TURN", turn)
    return {target: {each.name for each in shipped_variants(target)} for target in TARGETS}


@pytest.mark.parametrize("first", [739950, 739953])
def test_every_variant_has_its_turn(first, monkeypatch):
    """In every run on one target; in four days, whichever the first is, on all that it is for."""
    wanted = {
        target: {
            f"{name}: {each.name}"
            for name, targets in SHIPPED.items()
            if target in targets
            for each in getattr(harness.variants, name)()
        }
        for target in TARGETS
    }
    assert compiled_in("all", monkeypatch) == wanted
    everything = set.union(*wanted.values())
    assert {*EVERYWHERE, *ON_HOPPER} <= everything
    days = [compiled_in(str(first + day), monkeypatch) for day in range(4)]
    for day in days:
        assert set.union(*day.values()) == everything
        assert all({*EVERYWHERE} <= names for names in day.values()) and {*ON_HOPPER} <= day["sm_90"]
    assert {target: set.union(*(day[target] for day in days)) for target in TARGETS} == wanted


@pytest.mark.parametrize("variants", [hopper_variants, hopper_backward_variants])
def test_every_variant_of_hoppers_is_compiled_by_one_triton_or_the_other(variants, monkeypatch):
    """The next day by the other one."""
    everything = {each.name for each in variants()}
    for first, second in itertools.pairwise(("739950", "739951", "739952")):
        by_both = []
        for version, day in itertools.product(("3.6.0", "3.9.0"), (first, second)):
            monkeypatch.setenv("TILEWISE_TURN", day)
            monkeypatch.setattr(triton, "__version__", version)
            by_both.append({each.name for each in variants(in_turns=True)})
        oldest, oldest_next, newest, newest_next = by_both
        assert oldest | newest == oldest_next | newest_next == everything
        assert oldest | oldest_next == newest | newest_next == everything
        assert oldest != everything != newest


def test_a_turn_that_is_none_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"TILEWISE_TURN='monday' must be the number of a day, as \d+, or 'all'"
    ):
        compiled_in("monday", monkeypatch)


def test_the_baseline_has_every_row_for_every_target():
    """Also those whose turn it is not."""
    version = max(load(), key=Version)
    known = {(name.split()[0], name.split(" ", 2)[2]) for name in load()[version]}
    for name in ("main_variants", "backward_variants"):
        rows = {(target, each.name) for target in TARGETS for each in getattr(harness.variants, name)()}
        assert rows <= known


def test_whatever_a_kernel_is_made_of_counts(tmp_path, monkeypatch):
    """Once all is compiled and noted a run takes the day's turn; after a change, or by a new Triton, all."""
    files = ("kernels/tilewise/kernels/forward.py", "kernels/tilewise/parts/masks/causal.py",
             "kernels/tilewise/plan/tile_table.json", "tests/harness/variants.py")  # fmt: skip
    for name in (*files, "docs/start.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(turns, "NOTED", tmp_path / "compiled.json")
    assert turns.due(tmp_path) == "all"
    (tmp_path / "compiled.json").write_text(json.dumps({triton.__version__: turns.sources(tmp_path)}))
    assert turns.due(tmp_path) == turns.today()
    (tmp_path / "docs/start.md").write_text("other prose")
    assert turns.due(tmp_path) == turns.today()
    for name in files:
        (tmp_path / name).write_text("# changed")
        assert turns.due(tmp_path) == "all", name
        (tmp_path / name).write_text("")
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    assert turns.due(tmp_path) == "all"


@pytest.mark.parametrize("sizes", [[3, 5, 7], [0, 1, 9]])
def test_every_case_of_a_sweep_has_its_turn(sizes, monkeypatch):
    """A quarter a day, in four days all, whichever the first is; and as many each day, one more or less."""
    cases = [f"test_sweep[{i}-{size}]" for i in range(10) for size in sizes]
    for first in (739950, 739953):
        days = []
        for day in range(first, first + turns.DAYS):
            monkeypatch.setenv("TILEWISE_TURN", str(day))
            days.append(turns.whose_turn(cases))
        assert sorted(itertools.chain(*days)) == sorted(cases)
        assert {len(day) for day in days} == {7, 8}
        assert all(
            {case.rpartition("-")[2] for case in day} >= {f"{size}]" for size in sizes} for day in days
        )
    monkeypatch.setenv("TILEWISE_TURN", "all")
    assert turns.whose_turn(cases) == set(cases)


def test_a_run_that_names_tests_takes_all_cases(monkeypatch):
    """One of the whole suite takes what has its turn, and all that is no sweep."""
    sweep = [SimpleNamespace(nodeid=f"a.py::test_sweep[{i}]", get_closest_marker=bool) for i in range(8)]
    other = SimpleNamespace(nodeid="a.py::test_other", get_closest_marker=lambda _: None)
    monkeypatch.setenv("TILEWISE_TURN", "739950")
    source, left = pytest.Config.ArgsSource, []

    def run(args_source, keyword="", markexpr=""):
        option = SimpleNamespace(keyword=keyword, markexpr=markexpr)
        hook = SimpleNamespace(pytest_deselected=lambda items: left.append(len(items)))
        config = SimpleNamespace(args_source=args_source, option=option, hook=hook)
        monkeypatch.setenv("TILEWISE_SWEEPS", "whole" if conftest.names_tests(config) else "in turns")
        items = [*sweep, other]
        conftest.pytest_collection_modifyitems(config, items)
        return [item.nodeid for item in items]

    whole = run(source.TESTPATHS)
    assert len(whole) == 3 and whole[-1] == other.nodeid and left == [6]
    for given in ((source.ARGS,), (source.TESTPATHS, "sweep"), (source.TESTPATHS, "", "oldest")):
        assert len(run(*given)) == 9 and left == [6]
    monkeypatch.setenv("TILEWISE_TURN", "all")
    assert len(run(source.TESTPATHS)) == 9
