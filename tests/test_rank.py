"""The ranking of tiles: the model of a call in closed form, who is thrown out, and one tile compiled."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton

from tilewise.kernels.hopper.launch import CACHED_BYTES
from tilewise.kernels.tile import CopiedTile, HopperTile, Tile, tile_from
from tilewise.plan import tiles
from tilewise.tools.compiled.bound import bound
from tilewise.tools.compiled.compiler import Compiled
from tilewise.tools.compiled.main_loop import MainLoop
from tilewise.tools.rank import call_model, rank
from tilewise.tools.rank.__main__ import write_rows
from tilewise.tools.rank.call_model import (
    HEADS_BYTES,
    LATENCY,
    Step,
    TileModel,
    alone,
    busiest,
    call_clocks,
    call_seconds,
    dealt_in_order,
    dealt_to_the_first_free,
    in_turns,
    model_of,
    numbered,
    steps_of,
    with_copies,
)
from tilewise.tools.tune.candidates import candidates

CHIP = rank.CHIP
FULL, CAUSAL = (rank.case_of(128, mask) for mask in ("full", "causal"))
# 64 keys against 128 queries at 128: 1024 clocks of matmul, 512 of exponentials, 16 of the rest.
LOOP = MainLoop("full", 8, 1, 400, 400, 16, 8, 4194304, 4194304, 32, 0, 0, 100, 0, 0, 65536, 0, 4)


def some_kernel(**change) -> Compiled:
    tile = dict(TILE_Q=128, TILE_KV=64, HEAD_TILE=128, VALUE_TILE=128)
    matmuls = {"HGMMA.64x64x16.F32.BF16": 16}
    kernel = Compiled(
        "0", "forward_kernel", "sm_90", "bfloat16", tile, 8, 2, 200, {}, 0, 100_000, 0, {}, matmuls,
        [LOOP, replace(LOOP, name="cut", issued=700, instructions=700)],
    )  # fmt: skip
    return replace(kernel, **change)


def model(**change) -> TileModel:
    step = Step(2000.0, 1500.0, 1000.0)
    made = TileModel(
        "forward", 128, Tile(128, 64, 8, 2), 1, 0.0, step, Step(3000.0, 2500.0, 2000.0), "matmul"
    )
    return replace(made, **change)


# ---- Steps and programs


@pytest.mark.parametrize("work", ["forward", "dkv", "dq"])
@pytest.mark.parametrize("tile", [Tile(64, 64), Tile(128, 32), Tile(32, 128), Tile(256, 64)], ids=str)
def test_steps_are_those_that_the_mask_leaves(work, tile):
    """Counted pair by pair: a tile with a pair that counts is visited, one in which all count is full."""
    length = 512
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    blocks = mask.unflatten(1, (-1, tile.tile_kv)).unflatten(0, (-1, tile.tile_q)).transpose(1, 2)
    some, whole = blocks.flatten(2).any(2), blocks.flatten(2).all(2)  # [tiles of q, tiles of kv]
    along = 0 if work == "dkv" else 1
    expected = [*zip(whole.sum(along).tolist(), (some & ~whole).sum(along).tolist(), strict=True)]
    found = steps_of(work, tile, length, True)
    assert found == (expected if work == "dkv" else expected[::-1])
    assert sum(found[0]) >= sum(found[-1])  # the longest start first
    assert {*steps_of(work, tile, length, False)} == {(whole.shape[along], 0)}
    assert len(steps_of(work, tile, length, False)) == len(found)


def test_the_smaller_the_tile_the_less_is_computed_beyond_the_diagonal():
    def computed(tile):
        return sum(map(sum, steps_of("forward", tile, 4096, True))) * tile.tile_q * tile.tile_kv

    half = 4096 * 4097 / 2
    for tile in (Tile(128, 128), Tile(64, 64)):
        waste = (tile.tile_q + tile.tile_kv) / (2 * 4096)
        assert computed(tile) / half == pytest.approx(1 + waste, abs=0.002)
    assert computed(Tile(64, 64)) < computed(Tile(128, 64)) <= computed(Tile(128, 128))


def test_programs_are_dealt_out_in_waves():
    assert dealt_to_the_first_free([1.0] * 132, 132) == 1 and dealt_to_the_first_free([1.0] * 133, 132) == 2
    assert dealt_to_the_first_free([3.0, 1.0, 1.0, 1.0], 2) == 3  # the long one first: nobody waits
    assert dealt_to_the_first_free([1.0, 1.0, 1.0, 3.0], 2) == 4
    assert dealt_in_order([3.0, 1.0, 1.0, 1.0], 2) == 4  # a program takes every second, whoever is free


def test_a_full_call_is_its_waves():
    # 4 x 16 heads, 32 tiles of rows, 64 steps each: 2048 programs are 16 waves of 132.
    assert call_clocks(model(), FULL, CHIP) == 16 * 64 * 1500
    assert call_clocks(model(), FULL, CHIP, "none") == 16 * 64 * 2000
    assert call_clocks(model(), FULL, CHIP, "full") == 16 * 64 * 1000
    assert call_clocks(model(start=100.0), FULL, CHIP) == 16 * (64 * 1500 + 100)
    # Two programs of a multiprocessor share it: 8 waves of twice the time.
    assert call_clocks(model(programs=2), FULL, CHIP) == 8 * 2 * 64 * 1500
    assert call_seconds(model(), FULL, CHIP) == 16 * 64 * 1500 / CHIP.clock


def test_a_causal_call_takes_about_half_and_pays_for_cut_tiles():
    half, full = call_clocks(model(), CAUSAL, CHIP), call_clocks(model(), FULL, CHIP)
    assert 0.5 < half / full < 0.6
    assert call_clocks(model(cut=Step(9e3, 9e3, 9e3)), CAUSAL, CHIP) > half


def test_hopper_s_programs_take_the_last_rows_of_the_heads_that_fit_the_cache():
    # 2 MiB of keys and values a head at 4096 and 128, in 24 MiB.
    assert HEADS_BYTES == CACHED_BYTES
    together = HEADS_BYTES // (4 * FULL.kv_len * FULL.head_dim)
    order = [*numbered([2.0, 1.0], 14, together)]
    assert order == [2.0] * 12 + [1.0] * 12 + [2.0] * 2 + [1.0] * 2
    tile = HopperTile(128, 128, 8, 2)
    hopper = model(work="hopper", tile=tile)
    assert call_clocks(hopper, FULL, CHIP) == 16 * 32 * 1500


# ---- A step


def test_a_step_of_a_program_that_is_alone():
    b = bound(LOOP, CHIP, 2)
    assert (b.matmul, b.exponentials, b.shared) == (1024, 512, 512)
    assert (
        alone("forward", LOOP, b) == in_turns(b) + 30 * (4 + 6) and alone("dq", LOOP, b) < in_turns(b) + 200
    )
    # All exponentials under matmuls: what takes the vector units is hidden, as far as matmuls reach.
    hidden = alone("forward", replace(LOOP, overlapped=32), b)
    assert hidden == pytest.approx(in_turns(b) + 300 - min(1024, b.exponentials + b.other))


def test_copies_are_waited_for_by_stages():
    assert with_copies(1000, 600, 1) == 1600
    assert with_copies(1000, 600, 2) == 1000 and with_copies(1000, 1500, 2) == 1500
    assert with_copies(1000, 1500, 3) == 1000


def test_a_kernel_s_model_follows_from_its_loops():
    tile = Tile(128, 64, 8, 2)
    one = model_of(some_kernel(), "forward", 128, tile, CHIP)
    b = bound(LOOP, CHIP, 2)
    assert (one.programs, one.limit, one.full.full, one.full.none) == (1, "matmul", busiest(b), in_turns(b))
    assert one.full.expected == alone("forward", LOOP, b) and one.cut.expected > one.full.expected
    assert one.start > 2 * LATENCY
    # Registers for two: a half of what a step takes alone, but no less than the busiest unit.
    two = model_of(some_kernel(registers=128), "forward", 128, tile, CHIP)
    assert two.programs == 2 and two.full.expected == max(1024, one.full.expected / 2)
    assert two.start == one.start / 2
    # One stage waits for its copy.
    single = model_of(some_kernel(stages=1), "forward", 128, replace(tile, num_stages=1), CHIP)
    assert single.full.expected > one.full.expected + LATENCY


def test_what_has_no_model_says_why():
    with pytest.raises(ValueError, match="it has no loop 'cut' but full"):
        model_of(some_kernel(loops=[LOOP]), "forward", 128, Tile(128, 64, 8, 2), CHIP)
    with pytest.raises(ValueError, match="a multiprocessor holds no program"):
        model_of(some_kernel(shared_bytes=300_000), "forward", 128, Tile(128, 64, 8, 2), CHIP)


# ---- Who is thrown out


@pytest.mark.parametrize(
    "compiled, reason",
    [
        (some_kernel(), ""),
        ("CompilationError: x", "CompilationError: x"),
        (some_kernel(spill_bytes=8), "spills 8 bytes"),
        (some_kernel(loops=[replace(LOOP, spills=2)]), "spills 0 bytes"),
        (some_kernel(matmuls={"HGMMA.64": 4, "HMMA.16816": 4}), "multiplies with HMMA.16816"),
        (some_kernel(matmuls={}), "multiplies without tensor cores"),
    ],
)
def test_who_is_thrown_out(compiled, reason):
    assert rank.why_not(compiled) == reason


def faked(monkeypatch, registers, full_spills=()):
    """Tiles compile to `some_kernel` with so many registers; in the full call those in full_spills spill."""

    def compile_tiles(work, dim, mask, chosen):
        spills = {tile: 8 if mask == "full" and tile in full_spills else 0 for tile in chosen}
        return {tile: some_kernel(registers=registers(tile), spill_bytes=spills[tile]) for tile in chosen}

    monkeypatch.setattr(rank, "compile_tiles", compile_tiles)


def test_the_five_best_are_kept_in_order_without_the_shipped_one(monkeypatch):
    faked(monkeypatch, lambda tile: 128 if tile.tile_kv == 128 else 200)
    chosen = rank.near("forward", 128)
    shipped = tiles.table_tile("sm_90", 2, 128)
    # By either way of loading: so many of each.
    assert chosen[0] == shipped and len(chosen) == 2 * rank.NEAREST + 1
    assert Tile(128, 32, 8, 2) in chosen and CopiedTile(128, 64, 8, 2) in chosen
    assert len(rank.near("dq", 128)) == rank.NEAREST + 1
    assert {*chosen} <= {*candidates("forward", "sm_90", 2, 128)}
    rows = rank.best("forward", 128)
    figures = [row["model"]["over_shipped"] for row in rows]
    assert len(rows) == 5 and figures == sorted(figures)
    found = [tile_from("forward", row) for row in rows]
    assert shipped not in found and {*found} <= {*chosen}
    assert {(row["pass"], row["arch"], row["element_bytes"], row["dim"]) for row in rows} == {
        ("forward", "sm_90", 2, 128)
    }
    # One that spills in a full call gives way to the next.
    faked(monkeypatch, lambda tile: 128 if tile.tile_kv == 128 else 200, {found[0]})
    again = [tile_from("forward", row) for row in rank.best("forward", 128)]
    assert again[:4] == found[1:] and len(again) == 5


def test_a_row_without_a_usable_shipped_tile_or_five_others_is_an_error(monkeypatch):
    shipped = tiles.table_tile("sm_90", 2, 128)
    faked(monkeypatch, lambda tile: 200, {*rank.near("forward", 128)})
    with pytest.raises(ValueError, match="forward 128: only 0 tiles are left of 53"):
        rank.best("forward", 128)
    monkeypatch.setattr(rank, "compile_tiles", lambda *a: dict.fromkeys(a[3], "CompilationError"))
    with pytest.raises(ValueError, match=r"forward 128: the shipped tile, 128 x 128, .*, is out itself"):
        rank.best("forward", 128)
    assert shipped == Tile(128, 128, 8, 2)


def test_all_of_hopper_s_tiles_are_looked_at():
    for dim in rank.RANKED_DIMS:
        assert {*rank.near("hopper", dim)} == {*candidates("hopper", "sm_90", 2, dim)}


# ---- Compiled


def test_tiles_are_compiled_in_a_child_and_one_that_fails_is_named():
    """64 x 64 as given, not as the table has it; the other is too wide for Triton's limit of numbers."""
    good, bad = Tile(64, 64, 4, 2), Tile(4096, 4096, 4, 2)
    found = rank.compile_tiles("forward", 64, "causal", [good, bad])
    assert found[good].tile["TILE_Q"] == found[good].tile["TILE_KV"] == 64 and found[good].warps == 4
    assert rank.why_not(found[good]) == "" and "Error" in rank.why_not(found[bad])
    made = model_of(found[good], "forward", 64, good, CHIP)
    assert made.programs > 1 and made.full.full < made.full.expected < made.full.none


def test_the_command_says_what_it_needs():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tilewise.tools.rank"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--out FILE or --shipped FILE" in done.stderr


def test_rows_are_written_a_line_each_and_read_back(tmp_path):
    rows = [{"pass": "dq", "dim": 64}, {"pass": "dkv", "triton": triton.__version__}]
    write_rows(tmp_path / "x.json", rows)
    assert rank.read_rows(tmp_path / "x.json") == rows == json.loads((tmp_path / "x.json").read_text())
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4


def test_the_calls_are_the_grid_s_at_4096():
    assert (FULL.name, CAUSAL.name) == ("paper-d128-full-4096", "paper-d128-causal-4096")
    assert all((case.batch, case.q_heads, case.kv_heads) == (4, 16, 16) for case in (FULL, CAUSAL))


# ---- What the model cannot tell apart


def ranked(tile: Tile, mean: float) -> rank.Ranked:
    return rank.Ranked(some_kernel(), model(tile=tile), {"full": mean, "causal": mean})


def test_where_the_model_sees_no_difference_one_change_at_a_time_is_tried():
    shipped = HopperTile(128, 128, 8, 2)
    switched = [
        replace(shipped, num_stages=3),
        replace(shipped, has_turns=False),
        replace(shipped, is_q_in_registers=True),
        replace(shipped, has_turns=False, is_q_in_registers=True, num_stages=3),
        replace(shipped, tile_kv=64),
        replace(shipped, tile_kv=64, is_q_in_registers=True),
    ]
    usable = [ranked(tile, 1.0 if tile.tile_kv == 128 else 0.993) for tile in switched]
    found = rank.choose(usable, shipped)
    assert {*switched[:3], switched[4]} <= {each.model.tile for each in found}
    # Nearer ones of a shape that is there give way to one of another.
    third = replace(shipped, tile_q=192, num_warps=12, tile_kv=64)
    found = rank.choose([*(ranked(tile, 1.0) for tile in switched[:4]), ranked(third, 1.01)], shipped)
    assert third in {each.model.tile for each in found}
    more = [ranked(tile, 1.0) for tile in (*switched, replace(switched[0], has_turns=False))]
    assert third in {each.model.tile for each in rank.choose([*more, ranked(third, 1.01)], shipped)}
    assert [each.mean for each in found] == sorted(each.mean for each in found)
    # What is clearly better comes first, however far away.
    far = ranked(replace(shipped, tile_q=192, num_warps=12, tile_kv=64, has_turns=False), 0.5)
    assert rank.choose([*usable, far], shipped)[0] is far


# ---- One walk


def one_walk_model() -> call_model.TileModel:
    step = call_model.Step(1.0, 1.0, 1.0)
    return call_model.TileModel("dqkv", 64, Tile(16, 16), 1, 0.0, step, step, "matmul")


def test_in_turns_each_program_runs_a_step_behind_the_one_before():
    """Three programs of four steps; and with those of a second head, of which fewer start at once."""
    model = one_walk_model()
    assert call_model.in_order(model, [(4, 0)] * 3, 1, 1.0, 1.0, 3) == 4 + 2
    assert call_model.in_order(model, [(4, 0)] * 3, 2, 1.0, 1.0, 3) == 8 + 1
    assert call_model.in_order(model, [(4, 0)] * 3, 1, 1.0, 1.0, 1) == 3 * 4  # one after another: no wait


def test_one_walk_owns_keys_and_has_its_sums_finished():
    tile = Tile(32, 64)
    assert call_model.rows_of("dqkv", tile) == call_model.rows_of("dkv", tile) == (64, 32)
    assert call_model.steps_of("dqkv", tile, 256, True) == call_model.steps_of("dkv", tile, 256, True)
    case = rank.case_of(64, "full")
    elements = case.batch * case.q_heads * case.q_len * case.head_dim
    assert call_model.finish_seconds(case, rank.CHIP) == elements * 12 / rank.CHIP.memory_bytes
