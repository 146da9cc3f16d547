"""The run's tuning: the tiles that it tries, a row in the interpreter, what a check says, and the way into a
table."""

import json
from dataclasses import replace

import pytest
import torch
import triton

from bench import tuning
from bench.results import Check
from tilewise.kernels import room
from tilewise.kernels.tile import CopiedTile, Tile
from tilewise.plan import tiles, user_tiles
from tilewise.plan.tile_table import load, save
from tilewise.tools.rank.rank import read_rows
from tilewise.tools.tune import store as tune_store
from tilewise.tools.tune.bench import DeviceLost, Rejected, Verdict, label
from tilewise.tools.tune.candidates import candidates
from tilewise.tools.tune.journal import read_entries

ROWS = tuning.tuned_rows()
REFRESH = "python -m tilewise.tools.rank --out bench/candidates.json, with the oldest supported Triton"


# ---- candidates.json


def test_rows_come_in_the_order_of_use():
    works = ["forward", "hopper", "dkv", "dq"]
    assert [*((work, 128) for work in works), *((work, 64) for work in works), ("dqkv", 64)] == ROWS
    assert {dim for _, _, dim in tiles.ONE_WALK} == {64}, "one walk is tuned where a call may take it"


@pytest.mark.parametrize("work, dim", ROWS)
def test_five_tiles_of_a_row_are_candidates_and_another_than_the_shipped_one(work, dim):
    found, shipped = tuning.ranked_tiles(work, dim), tiles.table_tile("sm_90", 2, dim, work)
    assert len({*found}) == len(found) == 5
    assert {*found} <= {*candidates(work, "sm_90", 2, dim)}
    assert shipped not in found, f"the table has changed: {REFRESH}"
    rows = [row for row in read_rows(tuning.CANDIDATES) if (row["pass"], row["dim"]) == (work, dim)]
    order = [row["model"]["over_shipped"] for row in rows]
    assert order == sorted(order) and all(row["arch"] == "sm_90" for row in rows)
    for row in rows:
        model = row["model"]
        assert 0 < model["together"] <= model["expected"] * 1.0001 and model["together"] <= model["apart"]
        assert model["milliseconds"]["causal"] < model["milliseconds"]["full"]
        assert model["registers"] <= 255 and model["shared_bytes"] <= room.SHARED_BYTES["sm_90"]


def test_every_row_says_with_what_it_was_ranked_and_nothing_else_is_in_the_file():
    rows = read_rows(tuning.CANDIDATES)
    assert len(rows) == 5 * len(ROWS) and {(row["pass"], row["dim"]) for row in rows} == {*ROWS}
    assert all(row["triton"] and len(row["kernels"]) == 12 for row in rows)
    assert len(tuning.CANDIDATES.read_text().splitlines()) == len(rows) + 2  # a row a line


# ---- A row, in the interpreter


@pytest.mark.parametrize("work, dim", [("forward", 64), ("dkv", 128), ("dq", 64), ("hopper", 64)])
def test_a_row_in_the_interpreter(work, dim, tmp_path):
    if not tiles.INTERPRETED:
        pytest.skip("the kernels are compiled here")
    (check,), remark = tuning.tune_row(work, dim, tmp_path, "cpu", 60.0)
    assert check.name == f"tuning: {work} 16-bit {dim}" and check.passed and remark == ""
    assert "2 tried" in check.detail and "none refused" in check.detail and "ms: paper-d" in check.detail
    assert "times as fast" not in check.detail
    entries = read_entries(tmp_path / "tiles.journal.jsonl")
    assert [entry["kind"] for entry in entries].count("timed") == 2
    assert {entry["row"][1] for entry in entries} == {"interpreter"} and (tmp_path / "tiles.json").exists()
    # Once more: it is all in the journal.
    (again,), _ = tuning.tune_row(work, dim, str(tmp_path), "cpu", 60.0)
    assert len(read_entries(tmp_path / "tiles.journal.jsonl")) == len(entries) and again.passed
    assert tuning.compile_row(work, dim, "cpu") == ([], "")


# ---- A row, on an H200 that is not there

KEY = ("forward", "sm_90", 2, 128)
SHIPPED = tiles.table_tile(*KEY[1:], "forward")
TRIED = tuning.ranked_tiles("forward", 128)


class FakeBench:
    """All tiles take a second, the fastest less; `wrong` are refused, at `loses` the GPU is lost."""

    batch, fastest, gain, wrong, loses = 8, TRIED[2], 1.25, (), None

    def __init__(self, work, cases, device, length):
        self.work, self.cases = work, tuple(map(label, cases))
        self.compiled, self.checked = [], []
        self.forward_tile = tiles._forced.get("forward")
        type(self).made.append(self)

    def compile_ahead(self, ahead):
        self.compiled += ahead

    def check(self, tile):
        self.checked.append(tile)
        if tile == self.loses:
            raise DeviceLost("an illegal address")
        if tile in self.wrong:
            raise Rejected("wrong: out is 7 times as far from float64 as is allowed")
        return Verdict(0.5, 200, 0, 1024)

    def check_every_feature(self, tile):
        return Verdict(0.5)

    def time(self, case, tile, milliseconds):
        return [1.0 / self.gain if tile == self.fastest else 1.0] * 3

    def time_portable(self, case, milliseconds):
        return [1.5] * 3


@pytest.fixture
def fake_gpu(monkeypatch):
    Bench = type("Bench", (FakeBench,), dict(made=[]))

    where = tune_store.Where("NVIDIA H200", "sm_90", "580.1", "2.11.0", triton.__version__,
                             user_tiles.kernels_hash())  # fmt: skip
    monkeypatch.setattr(tuning, "Bench", Bench)
    monkeypatch.setattr(tuning, "here", lambda device: where)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    return Bench


def tuned(folder, work="forward", dim=128) -> tuple[Check, str]:
    (check,), remark = tuning.tune_row(work, dim, folder, "cuda:0", 15.0)
    return check, remark


def test_exactly_the_shipped_tile_and_the_five_are_tried_and_the_fastest_is_kept(fake_gpu, tmp_path):
    check, remark = tuned(tmp_path)
    (bench,) = fake_gpu.made
    assert bench.checked[0] == SHIPPED and {*bench.checked} == {SHIPPED, *TRIED}
    assert bench.cases == ("paper-d128-full-4096 bfloat16", "paper-d128-causal-4096 bfloat16")
    assert check.name == "tuning: forward 16-bit 128" and check.passed and remark == ""
    assert "gain 1.250" in check.detail and "6 tried" in check.detail and "none refused" in check.detail
    assert "paper-d128-full-4096 bfloat16 1 -> 0.8" in check.detail
    assert load(tmp_path / "tiles.json")[KEY].tile == TRIED[2]


def test_where_no_candidate_gains_the_shipped_tile_stays(fake_gpu, tmp_path):
    fake_gpu.gain = 1.01
    check, _ = tuned(tmp_path)
    assert check.passed and "it stays" in check.detail and load(tmp_path / "tiles.json") == {}


def test_refused_candidates_are_named_with_their_reasons(fake_gpu, tmp_path):
    fake_gpu.wrong = TRIED[:1]
    check, _ = tuned(tmp_path)
    assert check.passed and "refused: " in check.detail and "7 times as far" in check.detail


def test_a_shipped_tile_that_is_wrong_fails_the_check(fake_gpu, tmp_path):
    fake_gpu.wrong = (SHIPPED,)
    check, _ = tuned(tmp_path)
    assert not check.passed and "which cannot be used here: wrong: out is 7 times" in check.detail


def test_a_candidate_that_took_the_gpu_with_it_is_left_out_next_time(fake_gpu, tmp_path):
    fake_gpu.loses = TRIED[0]
    check, remark = tuned(tmp_path)
    assert check.status == "crashed" and "illegal address" in check.detail and remark == ""
    assert "in a new process" in check.detail
    again, remark = tuned(tmp_path)
    assert TRIED[0] not in fake_gpu.made[-1].checked and "gain 1.250" in again.detail and remark == ""
    fake_gpu.loses = SHIPPED
    assert not tuned(tmp_path / "other")[0].passed


def test_hoppers_forward_is_timed_beside_the_portable_one_s_winner(fake_gpu, tmp_path):
    check, _ = tuned(tmp_path, "hopper")
    assert fake_gpu.made[-1].forward_tile is None and "1.500 times as fast" in check.detail
    tuned(tmp_path)
    tuned(tmp_path, "hopper", 64)
    assert fake_gpu.made[-1].forward_tile is None  # the winner is of another row
    (tmp_path / "tiles.journal.jsonl").unlink()
    tuned(tmp_path, "hopper")
    assert fake_gpu.made[-1].forward_tile == TRIED[2]


def test_compiling_ahead_takes_all_six_and_the_last_check_of_the_five(fake_gpu):
    assert tuning.compile_row("dq", 64, "cuda:0") == ([], "")
    plain, features = fake_gpu.made
    five = tuning.ranked_tiles("dq", 64)
    assert plain.compiled == [tiles.table_tile("sm_90", 2, 64, "dq"), *five] and features.compiled == five
    assert features.cases == ("every feature bfloat16",)


def test_a_gpu_that_the_tiles_were_not_ranked_for_is_refused(fake_gpu, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_80")
    with pytest.raises(ValueError, match="ranked for sm_90, and this GPU is sm_80"):
        tuning.job_of("dq", 64, torch.device("cuda", 0))


# ---- From a run's folder into a table


def export(*arguments):
    from typer.testing import CliRunner

    from tilewise.cli import build_app

    return CliRunner().invoke(build_app(), ["tune", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_rows_of_a_run_s_folder_go_into_a_table_without_a_gpu(fake_gpu, tmp_path):
    tuned(tmp_path)
    fake_gpu.gain = 1.0
    tuned(tmp_path, "dq")  # where the shipped tile stays, its row now says that it was timed
    shared = tmp_path / "shared.json"
    save(shared, load(tiles.SHIPPED).values())
    done = export("--from", tmp_path / "tiles.json", "--export", shared)
    assert done.exit_code == 0 and "wrote 2 rows timed on NVIDIA H200" in done.output
    before, after = load(tiles.SHIPPED), load(shared)
    assert [*after] == [*before]
    changed = {key: row for key, row in after.items() if row != before[key]}
    dq = ("dq", *KEY[1:])
    assert {*changed} == {KEY, dq} and changed[KEY].tile == TRIED[2] and changed[dq].tile == before[dq].tile
    assert all(row.evidence.gpu == "NVIDIA H200" and row.evidence.error == 0.5 for row in changed.values())


def test_what_cannot_be_exported_is_refused(fake_gpu, tmp_path, monkeypatch):
    shared = tmp_path / "shared.json"
    missing = export("--from", tmp_path / "tiles.json", "--export", shared)
    assert missing.exit_code == 2 and "nothing was timed with these kernels yet" in missing.output
    alone = export("--from", tmp_path / "tiles.json")
    assert alone.exit_code == 2 and "goes with --export FILE" in alone.output
    tuned(tmp_path)
    lines = (tmp_path / "tiles.journal.jsonl").read_text().splitlines()
    row = next(entry for entry in map(json.loads, lines) if entry["kind"] == "row")
    row["data"]["arch"] = "interpreter"
    (tmp_path / "tiles.journal.jsonl").write_text(json.dumps(row) + "\n")
    smoke = export("--from", tmp_path / "tiles.json", "--export", shared)
    assert smoke.exit_code == 2 and "whose times mean nothing" in smoke.output
    assert not shared.exists()


def test_a_tile_of_the_file_is_a_tile_of_its_pass():
    (first, *_) = tuning.ranked_tiles("hopper", 128)
    assert first.warpgroups in (2, 3) and replace(first, has_turns=not first.has_turns) != first
    assert {type(tile) for tile in TRIED} == {Tile, CopiedTile}
