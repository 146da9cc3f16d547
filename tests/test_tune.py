"""Tuning: which tiles are tried, which are refused, which wins, and what survives an interruption."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton

from tilewise.kernels.room import fits
from tilewise.kernels.tile import PASSES, HopperTile, Tile
from tilewise.plan import passes, tiles, user_tiles
from tilewise.plan.tile_table import load, save
from tilewise.tools.tune import case as tune_case
from tilewise.tools.tune import command as tune_command
from tilewise.tools.tune import kernels as tune_kernels
from tilewise.tools.tune import store as tune_store
from tilewise.tools.tune.bench import Bench, DeviceLost, Rejected, Verdict, label
from tilewise.tools.tune.candidates import candidates, distance, nearest_first
from tilewise.tools.tune.case import Workload, small, with_every_feature
from tilewise.tools.tune.journal import Journal, Subject, read_entries
from tilewise.tools.tune.plan import choose_cases, gpu_jobs, grouped, smoke_jobs
from tilewise.tools.tune.search import NOISE, ROUNDS, Search
from tilewise_reference import CASES, FEATURE_CASES, paper_grid

KEY = ("forward", "sm_90", 2, 128)
SHIPPED = Tile(128, 128, 8, 2)


def case_named(name):
    return next(case for case in (*CASES, *FEATURE_CASES, *paper_grid()) if case.name == name)


# ---- Candidates


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("work", PASSES)
def test_candidates_are_feasible_and_hold_the_shipped_tile(arch, work):
    for element_bytes, dim in itertools.product((2, 4), (64, 128, 256)):
        found = candidates(work, arch, element_bytes, dim)
        assert len({*found}) == len(found)
        assert all(fits(tile, arch, element_bytes, dim, work) for tile in found)
        shipped = tiles.table_tile(arch, element_bytes, dim, work)
        assert shipped in found
        by_distance = nearest_first(found, shipped, shipped)
        assert by_distance[0] == shipped
        assert [*map(lambda tile: distance(tile, shipped), by_distance)] == sorted(
            distance(tile, shipped) for tile in found
        )


def test_more_than_the_chip_has_is_no_candidate():
    # 256 x 128 elements of Q alone, 64 KiB in bf16, fill what one block may have on gfx942 and sm_75.
    assert not any(tile.tile_q == 256 for tile in candidates("dq", "sm_75", 2, 128))
    assert any(tile.tile_q == 256 for tile in candidates("dq", "sm_90", 2, 64))


def test_the_order_follows_the_best_so_far():
    near, far = Tile(64, 128, 8, 2), Tile(16, 16, 4, 1)
    assert nearest_first([far, near], SHIPPED, SHIPPED) == [near, far]
    assert nearest_first([near, far], Tile(16, 32, 4, 1), SHIPPED) == [far, near]


# ---- Cases


def test_default_cases_are_the_papers_grid_at_4096():
    cases = choose_cases([], None)
    assert {case.q_len for case in cases} == {4096} and {case.dtype for case in cases} == {"bfloat16"}
    rows = grouped(cases, [], "sm_90")
    assert [*rows] == [(work, "sm_90", 2, dim) for work in (*PASSES, "hopper") for dim in (128, 64, 256)]
    assert [*grouped(cases, [], "sm_80")] == [
        (work, "sm_80", 2, dim) for work in PASSES for dim in (128, 64, 256)
    ]
    assert all([case.name for case in group] == [f"paper-d{key[3]}-full-4096", f"paper-d{key[3]}-causal-4096"]
               for key, group in rows.items())  # fmt: skip


def test_named_cases_decide_their_own_rows():
    cases = choose_cases(["deepseek-v3-prefill", "minilm-l6-encoder", "bloom-7b1-training"], None)
    assert [*grouped(cases, [], "sm_80")] == [
        ("forward", "sm_80", 2, 256), ("forward", "sm_80", 4, 64), ("forward", "sm_80", 2, 128),
        ("dkv", "sm_80", 2, 128), ("dq", "sm_80", 2, 128),
    ]  # fmt: skip
    assert [*grouped(cases[:1], ["dq"], "sm_80")] == [("dq", "sm_80", 2, 256)]
    assert {case.dtype for case in choose_cases(["minilm-l6-encoder"], "float16")} == {"float16"}


@pytest.mark.parametrize(
    "names, dtype, message",
    [
        (["llama"], None, "case 'llama' is not a named case; near it are .*llama3-8b-prefill"),
        (["llama3-8b-decode"], None, "--case llama3-8b-decode: it has 1 queries"),
        ([], "float8", "--dtype float8 must be one of bfloat16, float16, float32"),
    ],
)
def test_a_wrong_request_says_what_is_expected(names, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_cases(names, dtype)


@pytest.mark.parametrize("case", [*CASES, *FEATURE_CASES], ids=lambda case: case.name)
def test_a_small_case_asks_for_the_same_features(case):
    shrunk = small(case)
    assert shrunk.batch == 1 and max(shrunk.q_len, shrunk.kv_len) <= 336
    assert shrunk.features.keys() == case.features.keys()
    # To the compiler the same: a length that 16 divides stays one, and so does one that it does not.
    for now, before in ((shrunk.q_len, case.q_len), (shrunk.kv_len, case.kv_len)):
        assert (now % 16 == 0) == (before % 16 == 0)
    same = dict(batch=1, q_len=shrunk.q_len, kv_len=shrunk.kv_len, features=shrunk.features)
    assert replace(case, **same) == shrunk


# ---- Checking


@pytest.fixture(scope="module")
def workloads(device):
    """Small problems by name."""
    plain = replace(case_named("paper-d64-causal-4096"), q_heads=1, kv_heads=1, dtype="bfloat16")
    plain = small(plain, 48)
    return {
        "plain": Workload(plain, device),
        "every feature": Workload(with_every_feature(plain, 48), device),
    }


@pytest.mark.parametrize("work", PASSES)
@pytest.mark.parametrize("problem", ["plain", "every feature"])
def test_right_answers_pass(workloads, problem, work):
    share, name = workloads[problem].worst(work, Tile(32, 16))
    assert 0 < share <= 1
    assert name in {"forward": ("out", "lse"), "dq": ("dq",)}.get(work, (name,))


def test_every_gradient_of_the_dkv_pass_is_checked(workloads):
    """Those of the parameters too: their kernel has the rows of dkv's tile."""
    names = sorted(workloads["every feature"].answer("dkv", Tile(16, 32)))
    assert [name.split()[0] for name in names] == ["dALiBi.slopes", "dBias.bias", "dk", "dsink", "dv"]


def wrong_bench(device, monkeypatch, spoil):
    """A bench whose kernel gives what `spoil` makes of the right out."""
    launch = tune_case.run_forward

    def spoilt(*args, **kwargs):
        out, lse, statistics = launch(*args, **kwargs)
        spoil(out)
        return out, lse, statistics

    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    assert bench.check(Tile(16, 16)).error <= 1
    monkeypatch.setattr(tune_case, "run_forward", spoilt)
    return bench


@pytest.mark.parametrize("what", ["one element", "not written", "a row shifted"])
def test_a_wrong_candidate_is_rejected(device, monkeypatch, what):
    def spoil(out):
        if what == "one element":
            out[0, 0, 40, 3] += 0.05
        elif what == "not written":
            out[0, 0, 47, 63] = torch.empty(1, dtype=out.dtype, device=out.device)[0]  # poisoned: NaN
        else:
            out.copy_(out.roll(1, 2))

    bench = wrong_bench(device, monkeypatch, spoil)
    with pytest.raises(Rejected, match=r"wrong: out is [\d.e+]+|inf times as far"):
        bench.check(Tile(16, 16))


def test_what_a_candidate_raises_is_its_reason(device, monkeypatch):
    def fail(*_, **__):
        raise triton.runtime.OutOfResources(300_000, 232_448, "shared memory")

    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    monkeypatch.setattr(tune_case, "run_forward", fail)
    monkeypatch.setattr(tune_case, "launch_forward", fail)
    for measure in (lambda: bench.check(Tile(16, 16)), lambda: bench.time(label(case), Tile(16, 16), 1)):
        with pytest.raises(
            Rejected, match="OutOfResources: out of resource: shared memory, Required: 300000"
        ):
            measure()


def test_a_gpu_that_answers_no_more_is_told_from_a_bad_candidate(device, monkeypatch):
    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    bench.device = torch.device("cuda", 0)

    def lost(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")

    monkeypatch.setattr(tune_case, "run_forward", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match=r"illegal memory access was encountered$"):
        bench.check(Tile(16, 16))


def test_launches_are_watched_and_compiled_ahead_through_the_same_door(monkeypatch):
    """The interpreter has no compiled kernels: a stand-in for JITFunction shows what each launch becomes."""
    launched = []

    class Kernel:
        def run(self, *args, grid, warmup):
            launched.append((args, grid, warmup))
            metadata = type("M", (), dict(name="dq_kernel", shared=4096))
            return type("C", (), dict(metadata=metadata, n_regs=99, n_spills=2))

    monkeypatch.setattr(tune_kernels, "JITFunction", Kernel)
    before = Kernel.run
    with tune_kernels.watched() as seen:
        Kernel().run(1, grid=(2,), warmup=False)
    with tune_kernels.compiling_ahead(1):
        Kernel().run(3, grid=(4,), warmup=False)
    assert seen == [tune_kernels.Usage("dq_kernel", 99, 2, 4096)]
    assert launched == [((1,), (2,), False), ((3,), (4,), True)] and Kernel.run is before


def test_every_pass_has_a_kernel_that_is_watched():
    from tilewise.kernels import backward, forward
    from tilewise.kernels.hopper.forward import hopper_forward_kernel

    kernels = dict(forward=forward.forward_kernel, dkv=backward.dkv_kernel, dq=backward.dq_kernel)
    named = {
        work: kernel.fn.__name__ for work, kernel in (kernels | dict(hopper=hopper_forward_kernel)).items()
    }
    assert named == tune_kernels.KERNELS
    # Gluon's launches go through the same door as Triton's.
    assert type(hopper_forward_kernel).run is tune_kernels.JITFunction.run


# ---- The search, with injected times


class FakeBench:
    """Times and faults by tile; `calls` is what was asked, in order."""

    cases = ("full", "causal")
    batch, portable = 4, 1.0

    def __init__(self, times, faults=None, spills=(), wrong_with_features=(), stop_after=None):
        self.times, self.faults, self.spills = times, faults or {}, spills
        self.wrong_with_features, self.stop_after = wrong_with_features, stop_after
        self.calls, self.ahead, self.now = [], [], 0.0

    def compile_ahead(self, tiles):
        self.ahead.append(list(tiles))

    def check(self, tile):
        if self.stop_after is not None and len(self.checked()) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(("check", tile))
        if tile in self.faults:
            raise self.faults[tile]
        return Verdict(0.5, registers=100, spills=4 if tile in self.spills else 0, shared_bytes=1024)

    def check_every_feature(self, tile):
        self.calls.append(("features", tile))
        if tile in self.wrong_with_features:
            raise Rejected("wrong: dbias")
        return Verdict(0.6)

    def time(self, case, tile, milliseconds):
        self.calls.append(("time", tile))
        self.now += 1.0
        return [self.times(tile) * (2.0 if case == "full" else 1.0)] * 3

    def time_portable(self, case, milliseconds):
        self.calls.append(("portable", case))
        return [self.portable * (2.0 if case == "full" else 3.0)] * 3

    def checked(self):
        return [tile for call, tile in self.calls if call == "check"]


POOL = candidates(*KEY)
FASTEST = Tile(128, 64, 8, 3)
HOPPER_FASTEST = HopperTile(128, 64, 8, 3, False, False)


def by_distance(tile):
    """The nearer to the fastest, the faster; 10 % a step."""
    return 1.1 ** distance(tile, HOPPER_FASTEST if isinstance(tile, HopperTile) else FASTEST)


def searched(bench, journal, pool=POOL, starts=(SHIPPED,), seconds=1e9):
    return Search(KEY, starts, pool, bench, journal, clock=lambda: bench.now).run(seconds)


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


HOPPER_KEY = ("hopper", "sm_90", 2, 128)
HOPPER_SHIPPED = tiles.table_tile("sm_90", 2, 128, "hopper")


@pytest.mark.parametrize("dim, keys", [(64, {64, 128}), (128, {64, 128}), (256, {32, 64})])
def test_candidates_of_hoppers_forward(dim, keys):
    found = candidates("hopper", "sm_90", 2, dim)
    shipped = tiles.table_tile("sm_90", 2, dim, "hopper")
    assert shipped in found and len({*found}) == len(found)
    assert all(fits(tile, "sm_90", 2, dim, "hopper") for tile in found)
    assert {tile.tile_kv for tile in found} == keys and {tile.num_stages for tile in found} >= {2}
    assert {tile.has_turns for tile in found} == {True, False}
    assert {tile.warpgroups for tile in found} == ({2, 3} if dim < 256 else {2})
    assert any(tile.is_q_in_registers for tile in found) == (dim < 256)
    near = nearest_first(found, shipped, shipped)
    assert near[0] == shipped and distance(shipped, replace(shipped, has_turns=False)) == 0.5
    # Two of the three switches of a tile apart.
    assert distance(shipped, replace(shipped, num_stages=3, is_q_in_registers=True)) == 1.0


def searched_hopper(bench, journal):
    pool = candidates(*HOPPER_KEY)
    return Search(HOPPER_KEY, (HOPPER_SHIPPED,), pool, bench, journal, clock=lambda: bench.now).run(1e9)


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


@pytest.mark.parametrize(
    "names, dtype, arch, said",
    [
        ([], None, "sm_80", "--pass hopper, case paper-d128-.*needs a Hopper GPU .sm_90., .* is sm_80"),
        ([], "float32", "sm_90", "q.dtype=torch.float32 must be torch.float16"),
        (["feature-dropout"], None, "sm_90", "case feature-dropout: dropout_p="),
    ],
)
def test_what_hoppers_forward_cannot_answer_is_not_tuned(names, dtype, arch, said):
    cases = choose_cases(names, dtype)
    with pytest.raises(ValueError, match=said):
        grouped(cases, ["hopper"], arch)
    assert "hopper" not in [key[0] for key in grouped(cases, [], arch)]


def test_hoppers_answers_are_checked_in_the_emulator(device, monkeypatch):
    if tiles.INTERPRETED is False and tiles.architecture(device) != "sm_90":
        pytest.skip("it needs a Hopper GPU")
    case = replace(case_named("paper-d64-causal-4096"), q_heads=4, kv_heads=2)
    bench = Bench("hopper", [small(case, 48)], device, 48)
    tile = HopperTile(128, 16, 8, 2)
    assert 0 < bench.check(tile).error <= 1 and 0 < bench.check_every_feature(tile).error <= 1
    (name,) = bench.cases
    assert bench.time(name, tile, 1)[0] > 0 and bench.time_portable(name, 1)[0] > 0
    right = passes.launch_hopper

    def wrong(request, call, out, *rest):
        right(request, call, out, *rest)
        out[0, 1, 40, 3] += 0.05

    monkeypatch.setattr(passes, "launch_hopper", wrong)
    with pytest.raises(Rejected, match="wrong: out is"):
        bench.check(tile)


# ---- From an outcome to a table


WHERE = tune_store.Where(
    "NVIDIA H200", "sm_90", "580.1", "2.11.0", triton.__version__, user_tiles.kernels_hash()
)


def test_a_winner_is_stored_with_its_evidence_and_goes_when_it_no_longer_wins(tmp_path, journal):
    table, subject = tmp_path / "t.json", Subject(KEY, FakeBench.cases, SHIPPED)
    outcome = searched(FakeBench(by_distance), journal)
    tune_store.store(table, journal, subject, outcome, WHERE)
    (row,) = load(table).values()
    assert row.key == KEY and row.tile == FASTEST
    e = row.evidence
    assert (e.gpu, e.driver, e.torch, e.triton) == ("NVIDIA H200", "580.1", "2.11.0", triton.__version__)
    assert e.milliseconds == {"full": 2.0, "causal": 1.0} and e.before_tile == "128 x 128, 8 warps, 2 stages"
    assert e.gain == pytest.approx(by_distance(SHIPPED), rel=1e-3) and (e.registers, e.error) == (100, 0.5)
    assert user_tiles.why_not_here(row, "NVIDIA H200", "sm_90", lambda row: True) is None

    # What an earlier run found keeps the evidence of then.
    later = WHERE._replace(driver="999.9")
    tune_store.store(table, journal, subject, replace(outcome, settled=True), later)
    assert load(table) == {KEY: row}

    stays = replace(outcome, winner=None, gain=None, milliseconds=outcome.before)
    tune_store.store(table, journal, subject, stays, WHERE)
    assert load(table) == {}
    rows, old = tune_store.measured_rows(journal.path)
    assert rows[KEY].tile == SHIPPED and rows[KEY].evidence.gpu == "NVIDIA H200" and old == 0


def test_measured_rows_take_their_place_in_a_table_to_share(tmp_path, journal):
    """As a maintainer puts them into the shipped one."""
    table, subject = tmp_path / "t.json", Subject(KEY, FakeBench.cases, SHIPPED)
    tune_store.store(table, journal, subject, searched(FakeBench(by_distance), journal), WHERE)
    other = (("dq", *KEY[1:]), FakeBench.cases, SHIPPED)
    old = replace(searched(FakeBench(by_distance), journal), key=other[0])
    tune_store.store(table, journal, Subject(*other), old, WHERE._replace(kernels="older"))
    shared = tmp_path / "shared.json"
    save(shared, load(tiles.SHIPPED).values())
    rows, left_out = tune_store.measured_rows(journal.path)
    tune_store.merge(shared, rows.values())
    assert left_out == 1
    before, after = tiles.SHIPPED.read_text().splitlines(), shared.read_text().splitlines()
    (changed,) = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert json.loads(after[changed].rstrip(","))["evidence"]["gpu"] == "NVIDIA H200"
    assert [*load(shared)] == [*load(tiles.SHIPPED)] and load(shared)[KEY].tile == FASTEST


# ---- The command


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """An H200 on which FakeBench answers for every row."""
    monkeypatch.setenv("TILEWISE_CACHE", str(tmp_path))
    for module in (tune_command, tiles):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    for module in (tiles, tune_store):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    tiles.reload_user_tables()
    benches = []

    def make(work, cases, device, length):
        bench = FakeBench(by_distance)
        bench.cases = tuple(map(label, cases))
        bench.time = lambda case, tile, milliseconds: [by_distance(tile)] * 3
        benches.append(bench)
        if len(benches) == make.stop_at:
            bench.stop_after = 5
        return bench

    make.stop_at = None
    monkeypatch.setattr(tune_command, "Bench", make)
    yield make
    tiles.reload_user_tables()


def tune_with(*arguments):
    from typer.testing import CliRunner

    from tilewise.cli import build_app

    return CliRunner().invoke(build_app(), ["tune", *arguments], env={"COLUMNS": "120"})


CAUSAL_128 = ("--case", "paper-d128-causal-4096")


def test_the_command_stores_what_calls_then_use_and_forgets_it(fake_gpu, tmp_path):
    done = tune_with(*CAUSAL_128)
    assert done.exit_code == 0, done.output
    path = tmp_path / "tiles" / "nvidia-h200.json"
    table = tiles.user_table(torch.device("cuda", 0))
    assert table.path == path and {key[0] for key in table.applied} == {*PASSES, "hopper"}
    assert table.refused == []
    assert tiles.device_row(torch.device("cuda", 0), 2, 128, "forward") == (FASTEST, f"your table ({path})")
    assert f"Winners are in {path}" in done.output and "128x64 w8 s3" in done.output
    row = table.applied["hopper", "sm_90", 2, 128]
    assert row.evidence.over_portable > 1 and f"{row.evidence.over_portable:.3f} times" in done.output

    exported = tmp_path / "shared.json"
    assert tune_with("--export", str(exported)).exit_code == 0
    assert load(exported) == load(path)

    assert tune_with("--forget").exit_code == 0
    assert [*path.parent.iterdir()] == []
    assert "nothing is stored" in tune_with("--forget").output


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(fake_gpu, tmp_path):
    fake_gpu.stop_at = 2
    stopped = tune_with(*CAUSAL_128)
    assert stopped.exit_code == 130 and "1 of 4 rows are done" in stopped.output
    path = tmp_path / "tiles" / "nvidia-h200.json"
    assert [*load(path)] == [("forward", "sm_90", 2, 128)]
    assert tune_with(*CAUSAL_128).exit_code == 0
    assert len(load(path)) == 4


def test_the_tile_in_use_is_tried_even_when_there_is_no_time(fake_gpu, tmp_path):
    tune_with(*CAUSAL_128, "--pass", "dq")
    tiles.reload_user_tables()
    (job,) = gpu_jobs(
        choose_cases(["paper-d128-causal-4096"], None), ["dq"], "sm_90", torch.device("cuda", 0)
    )
    used = load(tmp_path / "tiles" / "nvidia-h200.json")["dq", "sm_90", 2, 128].tile
    assert job.starts == (tiles.table_tile("sm_90", 2, 128, "dq"), used) and {*job.starts} <= {*job.pool}


def test_a_broken_table_stops_the_command_with_one_line(fake_gpu, tmp_path):
    path = tmp_path / "tiles" / "nvidia-h200.json"
    path.parent.mkdir()
    path.write_text("not JSON")
    done = tune_with(*CAUSAL_128)
    assert done.exit_code == 2 and f"Delete {path}" in done.output


def test_short_cases_try_no_tile_longer_than_they_are(fake_gpu):
    cases = choose_cases(["short-d64-128"], None)
    (job,) = gpu_jobs(cases, ["forward"], "sm_90", torch.device("cuda", 0))
    assert max(tile.tile_q for tile in job.pool) == 128


def test_smoke_jobs_are_tiny():
    jobs = smoke_jobs(choose_cases([], None), [])
    assert [job.key[0] for job in jobs] == [*PASSES, "hopper"]
    for job in jobs:
        assert len(job.pool) == 3 and job.key[1] == "interpreter"
        assert all(case.q_heads == case.batch == 1 for case in job.cases)


def test_the_command_runs_in_the_interpreter_and_stores_nothing(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "TILEWISE_CACHE": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    command = [sys.executable, "-m", "tilewise", "tune", "--minutes", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Its times mean nothing" in done.stdout and "Nothing was stored" in done.stdout
    assert all(f"{work} 16-bit 64" in done.stdout for work in (*PASSES, "hopper"))
    assert "times as fast" not in done.stdout
    assert not (tmp_path / "cache").exists()
