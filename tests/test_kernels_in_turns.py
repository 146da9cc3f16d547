"""Is everything compiled within a few days? harness/turns.py says what a run compiles."""

import itertools

import pytest
import triton
from packaging.version import Version

import harness.variants
from harness.baseline import load
from harness.variants import (
    EVERYWHERE,
    ON_HOPPER,
    SHIPPED,
    hopper_backward_variants,
    hopper_variants,
    shipped_variants,
)
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
