"""Tuning: what becomes of a winner, in a table of tiles and by `tilewise tune`."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton

from harness.fake_bench import FASTEST, KEY, SHIPPED, WHERE, FakeBench, by_distance, searched
from tilewise.kernels.tile import HOPPER_PASSES, PASSES
from tilewise.plan import tiles, user_tiles
from tilewise.plan.tile_table import load, save
from tilewise.tools.tune import command as tune_command
from tilewise.tools.tune import store as tune_store
from tilewise.tools.tune.bench import label
from tilewise.tools.tune.journal import Journal, Subject
from tilewise.tools.tune.plan import choose_cases, gpu_jobs, smoke_jobs


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "x.journal.jsonl", "stamp")


# ---- From an outcome to a table


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
    shared, key = load(exported), ("hopper_backward", "sm_90", 2, 128)
    # Of one tile there is no other to win: its row confirms it, and says what a GPU has shown.
    assert {k: row for k, row in shared.items() if k != key} == load(path)
    assert shared[key].tile == tiles.table_tile("sm_90", 2, 128, "hopper_backward")
    faster = f"{shared[key].evidence.over_portable:.3f} times as fast as the portable backward"
    assert f"hopper_backward 16-bit 128: {faster}" in done.output and tiles.is_proven(shared[key].evidence)

    assert tune_with("--forget").exit_code == 0
    assert [*path.parent.iterdir()] == []
    assert "nothing is stored" in tune_with("--forget").output


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(fake_gpu, tmp_path):
    fake_gpu.stop_at = 2
    stopped = tune_with(*CAUSAL_128)
    assert stopped.exit_code == 130 and "1 of 6 rows are done" in stopped.output
    path = tmp_path / "tiles" / "nvidia-h200.json"
    assert [*load(path)] == [("forward", "sm_90", 2, 128)]
    assert tune_with(*CAUSAL_128).exit_code == 0
    assert len(load(path)) == 5


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
    assert [job.key[0] for job in jobs] == [*PASSES, *HOPPER_PASSES]
    for job in jobs:
        assert len(job.pool) == (1 if job.key[0] == "hopper_backward" else 3) and job.key[1] == "interpreter"
        assert all(case.q_heads == case.batch == 1 for case in job.cases)


def test_the_command_runs_in_the_interpreter_and_stores_nothing(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "TILEWISE_CACHE": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    command = [sys.executable, "-m", "tilewise", "tune", "--minutes", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Its times mean nothing" in done.stdout and "Nothing was stored" in done.stdout
    assert all(f"{work} 16-bit 64" in done.stdout for work in (*PASSES, *HOPPER_PASSES))
    assert "times as fast" not in done.stdout
    assert not (tmp_path / "cache").exists()
