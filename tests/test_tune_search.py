"""Tuning: which tile wins, given its times, and what survives an interruption."""

from dataclasses import replace

import pytest

from harness.fake_bench import (
    FASTEST,
    HOPPER_FASTEST,
    HOPPER_KEY,
    HOPPER_SHIPPED,
    KEY,
    POOL,
    SHIPPED,
    WHERE,
    FakeBench,
    by_distance,
    searched,
    searched_hopper,
)
from tilewise.kernels.tile import Tile
from tilewise.plan import tiles
from tilewise.plan.tile_table import load
from tilewise.tools.tune import store as tune_store
from tilewise.tools.tune.bench import DeviceLost, Rejected
from tilewise.tools.tune.candidates import distance, nearest_first
from tilewise.tools.tune.journal import Journal, Subject, read_entries
from tilewise.tools.tune.search import NOISE, ROUNDS


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "x.journal.jsonl", "stamp")


def test_the_fastest_wins(journal):
    bench = FakeBench(by_distance)
    outcome = searched(bench, journal)
    assert outcome.winner == FASTEST and outcome.shipped == SHIPPED
    assert outcome.gain == pytest.approx(by_distance(SHIPPED))
    assert outcome.milliseconds == {"full": 2.0, "causal": 1.0}
    assert outcome.before == pytest.approx({"full": 2 * by_distance(SHIPPED), "causal": by_distance(SHIPPED)})
    assert (outcome.tried, outcome.left, outcome.rejected, outcome.problem) == (len(POOL), 0, 0, "")
    assert outcome.verdict.registers == 100
    # Longer timing for fewer: the last round takes turns, the shipped tile in each of them.
    last = [tile for call, tile in bench.calls if call == "time"][-ROUNDS[2].turns * 4 * 2 :]
    assert last.count(SHIPPED) == last.count(FASTEST) == ROUNDS[2].turns * 2
    assert outcome.samples == 3 * ROUNDS[2].turns


def test_near_candidates_come_first_and_the_search_moves_with_the_best(journal):
    bench = FakeBench(by_distance)
    outcome = searched(bench, journal, seconds=70)  # a time takes one of them
    assert bench.checked()[0] == SHIPPED and distance(bench.checked()[1], SHIPPED) <= 0.5
    assert outcome.winner == FASTEST and 0 < outcome.left < len(POOL) - 15
    assert outcome.tried == len(bench.checked())


def test_with_no_time_at_all_the_shipped_tile_and_the_one_in_use_are_timed(journal):
    bench = FakeBench(by_distance)
    outcome = searched(bench, journal, starts=(SHIPPED, FASTEST), seconds=0)
    assert bench.checked() == [SHIPPED, FASTEST] and outcome.winner == FASTEST


@pytest.mark.parametrize("gain, wins", [(1 + NOISE / 2, False), (1 + 2 * NOISE, True)])
def test_a_gain_within_the_noise_changes_nothing(journal, gain, wins):
    bench = FakeBench(lambda tile: 1.0 if tile == FASTEST else gain)
    outcome = searched(bench, journal)
    assert outcome.winner == (FASTEST if wins else None)
    assert outcome.tile == (FASTEST if wins else SHIPPED)
    assert outcome.milliseconds == pytest.approx(
        {c: t if wins else t * gain for c, t in (("full", 2), ("causal", 1))}
    )


def test_wrong_raising_and_spilling_candidates_do_not_win(journal):
    second, third, fourth = Tile(128, 64, 8, 4), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1)
    order = {FASTEST: 1.0, second: 1.1, third: 1.2, fourth: 1.3}
    bench = FakeBench(
        lambda tile: order.get(tile, 2.0),
        faults={FASTEST: Rejected("OutOfResources: shared memory")},
        spills={second},
        wrong_with_features={third},
    )
    outcome = searched(bench, journal)
    assert outcome.winner == fourth and outcome.gain == pytest.approx(2.0 / 1.3) and outcome.rejected == 3
    reasons = {Tile(*e["tile"]): e["reason"] for e in read_entries(journal.path) if e["kind"] == "rejected"}
    assert reasons == {
        FASTEST: "OutOfResources: shared memory",
        second: "spills 4 registers",
        third: "with every feature: wrong: dbias",
    }


def test_a_shipped_tile_that_spills_is_still_what_others_must_beat(journal):
    outcome = searched(FakeBench(lambda tile: 1.0, spills={SHIPPED}), journal)
    assert outcome.winner is None and outcome.problem == "" and outcome.verdict.spills == 4


def test_a_shipped_tile_that_does_not_run_is_replaced_by_the_best_that_does(journal):
    bench = FakeBench(by_distance, faults={SHIPPED: Rejected("OutOfResources: x")})
    outcome = searched(bench, journal)
    assert outcome.winner == FASTEST and outcome.gain is None and outcome.before == {}
    assert outcome.problem == "OutOfResources: x"


def test_where_nothing_runs_the_outcome_says_so(journal):
    faults = dict.fromkeys(POOL, Rejected("CompilationError: x"))
    outcome = searched(FakeBench(by_distance, faults), journal)
    assert outcome.winner is None and outcome.problem == "CompilationError: x"
    assert outcome.verdict is None and outcome.milliseconds == {} and outcome.rejected == len(POOL)


# ---- Interruption and resumption


def test_what_was_tried_is_not_tried_again(journal):
    first = FakeBench(by_distance, faults={Tile(128, 32, 8, 2): Rejected("wrong")}, stop_after=20)
    with pytest.raises(KeyboardInterrupt):
        searched(first, journal)
    again = FakeBench(by_distance)
    outcome = searched(again, Journal(journal.path, "stamp"))
    assert len(first.checked()) == 20 and outcome.winner == FASTEST
    assert {*first.checked()} & {*again.checked()} == {SHIPPED}  # whose time tells today's clocks
    assert len(first.checked()) + len(again.checked()) == len(POOL) + 1
    # And once nothing is left to try, nothing is timed.
    settled = FakeBench(by_distance)
    found = searched(settled, Journal(journal.path, "stamp"))
    assert found == replace(outcome, settled=True) and settled.calls == []


@pytest.mark.parametrize("stamp, fresh", [("another GPU", False), ("stamp", True)])
def test_another_stamp_or_fresh_starts_over(journal, stamp, fresh):
    searched(FakeBench(by_distance), journal)
    bench = FakeBench(by_distance)
    searched(bench, Journal(journal.path, stamp, fresh))
    assert len(bench.checked()) == len(POOL)


def test_a_candidate_that_took_the_gpu_with_it_is_noted_and_left_out(journal):
    bad = nearest_first(POOL, SHIPPED, SHIPPED)[3]
    with pytest.raises(DeviceLost):
        searched(FakeBench(by_distance, faults={bad: DeviceLost("illegal access")}), journal)
    again = FakeBench(by_distance)
    outcome = searched(again, Journal(journal.path, "stamp"))
    assert bad not in again.checked() and outcome.rejected == 1 and outcome.winner == FASTEST


def test_a_candidate_that_twice_ended_the_process_is_left_out(journal):
    subject = Subject(KEY, FakeBench.cases, SHIPPED)
    hangs, stopped = Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)
    for _ in range(2):
        journal.add("trying", subject, hangs)
        journal.add("trying", subject, stopped)
        journal.add("interrupted", subject, stopped)
    tried = Journal(journal.path, "stamp").tried(subject)
    assert {*tried} == {hangs} and tried[hangs]["reason"] == "2 runs ended while it was tried"


def test_a_journal_that_was_cut_off_is_read_up_to_there(journal):
    journal.add("trying", Subject(KEY, ("a",), SHIPPED), SHIPPED)
    with journal.path.open("a") as file:
        file.write('{"stamp": "st')
    assert len(read_entries(journal.path)) == 1
    with journal.path.open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"jsonl:2 is not JSON: .* start over with --fresh"):
        read_entries(journal.path)


# ---- Hopper's forward


def test_hoppers_forward_is_timed_beside_the_portable_one(journal, tmp_path):
    bench = FakeBench(by_distance)
    bench.portable = 1.2
    outcome = searched_hopper(bench, journal)
    assert outcome.winner == HOPPER_FASTEST and outcome.milliseconds == {"full": 2.0, "causal": 1.0}
    assert outcome.portable == pytest.approx({"full": 2.4, "causal": 3.6})
    assert outcome.over_portable == pytest.approx(1.2)  # where it gains least
    # In turns: the portable forward before the tiles of each turn of the last round.
    last = bench.calls[-ROUNDS[2].turns * 2 * (1 + 4) - 1 : -1]
    assert [call for call, _ in last].count("portable") == ROUNDS[2].turns * 2

    table, subject = tmp_path / "t.json", Subject(HOPPER_KEY, FakeBench.cases, HOPPER_SHIPPED)
    tune_store.store(table, journal, subject, outcome, WHERE)
    (row,) = load(table).values()
    assert (row.key, row.tile) == (HOPPER_KEY, HOPPER_FASTEST)
    assert (row.evidence.over_portable, row.evidence.error) == (1.2, 0.5) and tiles.is_proven(row.evidence)
    # A new run takes it up from the journal, tiles with all their numbers.
    again = FakeBench(by_distance)
    assert searched_hopper(again, Journal(journal.path, "stamp")) == replace(outcome, settled=True)
    assert again.calls == []


def test_a_hopper_row_that_is_slower_than_the_portable_forward_proves_nothing(journal):
    bench = FakeBench(by_distance)
    bench.portable = 0.9
    row = tune_store.row_of(searched_hopper(bench, journal), WHERE)
    assert row.evidence.over_portable == 0.9 and not tiles.is_proven(row.evidence)


def test_other_passes_are_not_timed_beside_it(journal):
    bench = FakeBench(by_distance)
    outcome = searched(bench, journal)
    assert outcome.portable == {} and outcome.over_portable is None
    assert "portable" not in [call for call, _ in bench.calls]
