"""Tuning: which cases, which tiles are tried for them, and in which order."""

import itertools
from dataclasses import replace

import pytest

from harness.fake_bench import SHIPPED
from tilewise.kernels.room import fits
from tilewise.kernels.tile import HOPPER_PASSES, PASSES, Tile, hopper_backward_tile
from tilewise.plan import tiles
from tilewise.tools.tune.candidates import candidates, distance, nearest_first
from tilewise.tools.tune.case import small
from tilewise.tools.tune.plan import choose_cases, grouped
from tilewise_reference import CASES, FEATURE_CASES

# ---- Candidates


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("work", PASSES)
def test_candidates_are_feasible_and_hold_the_shipped_tile(arch, work):
    for element_bytes, dim in itertools.product((2, 4), (64, 128, 256)):
        if not tiles.has_tile(element_bytes, dim, work):
            continue
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


@pytest.mark.parametrize("dim, found", [(64, {(64, 2), (64, 3), (64, 4), (128, 2)}), (128, {(64, 2)})])
def test_candidates_of_hoppers_backward(dim, found):
    """Rows and stages; nothing else fits."""
    chosen = candidates("hopper_backward", "sm_90", 2, dim)
    assert {(tile.tile_q, tile.num_stages) for tile in chosen} == found and len(chosen) == len(found)
    shipped = tiles.table_tile("sm_90", 2, dim, "hopper_backward")
    assert shipped == hopper_backward_tile(dim) and shipped in chosen


# ---- Cases


def test_default_cases_are_the_papers_grid_at_4096():
    cases = choose_cases([], None)
    assert {case.q_len for case in cases} == {4096} and {case.dtype for case in cases} == {"bfloat16"}
    rows = grouped(cases, [], "sm_90")
    assert [*rows] == [
        *((work, "sm_90", 2, dim) for work in (*PASSES, "hopper") for dim in (128, 64, 256)),
        *(("hopper_backward", "sm_90", 2, dim) for dim in (128, 64)),
    ]
    assert [*grouped(cases, [], "sm_80")] == [
        (work, "sm_80", 2, dim) for work in PASSES for dim in (128, 64, 256)
    ]
    assert all([case.name for case in group] == [f"paper-d{key[3]}-full-4096", f"paper-d{key[3]}-causal-4096"]
               for key, group in rows.items())  # fmt: skip


def test_named_cases_decide_their_own_rows():
    cases = choose_cases(["deepseek-v3-prefill", "minilm-l6-encoder", "bloom-7b1-training"], None)
    assert [*grouped(cases, [], "sm_80")] == [
        ("forward", "sm_80", 2, 256), ("forward", "sm_80", 4, 64), ("forward", "sm_80", 2, 128),
        ("dkv", "sm_80", 2, 128), ("dq", "sm_80", 2, 128), ("dqkv", "sm_80", 2, 128),
    ]  # fmt: skip
    assert [*grouped(cases[:1], ["dq"], "sm_80")] == [("dq", "sm_80", 2, 192)]
    assert {case.dtype for case in choose_cases(["minilm-l6-encoder"], "float16")} == {"float16"}
    # A prefill has no backward; and one tile of Hopper's backward serves all dimensions up to 128.
    narrow = replace(cases[2], head_dim=80, value_dim=80)
    assert [*grouped([narrow], [], "sm_90")][-1] == ("hopper_backward", "sm_90", 2, 128)
    prefill = replace(narrow, phase="prefill")
    assert [key[0] for key in grouped([prefill], [], "sm_90")] == ["forward", "hopper"]


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


@pytest.mark.parametrize(
    "names, dtype, arch, said",
    [
        ([], None, "sm_80", "--pass hopper, case paper-d128-.*needs a Hopper GPU .sm_90., .* is sm_80"),
        ([], "float32", "sm_90", "q.dtype=torch.float32 must be torch.float16"),
        (["feature-dropout"], None, "sm_90", "case feature-dropout: dropout_p="),
    ],
)
def test_what_hoppers_kernels_cannot_answer_is_not_tuned(names, dtype, arch, said):
    cases = choose_cases(names, dtype)
    for work in HOPPER_PASSES:
        with pytest.raises(ValueError, match=said.replace("--pass hopper", f"--pass {work}")):
            grouped(cases, [work], arch)
    assert not {*HOPPER_PASSES} & {key[0] for key in grouped(cases, [], arch)}
