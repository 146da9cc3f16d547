"""What the kernels become on a GPU, read from their machine code: no GPU needed, none replaced by it.

Every row of the table and every feature compiles, in each run for one target at least and in four days for
all (harness/turns.py). Tiles of the table do not spill, stay within the chip's shared memory and the estimate
that `room.fits` relies on, and multiply on tensor cores.
"""

import re

import pytest
import torch
import triton
from packaging.version import Version

from harness.baseline import against_baseline, key, load
from harness.features import of_kind
from harness.variants import (
    COMBINATIONS,
    COPYING_TARGETS,
    FP8_TARGETS,
    OLDEST_TARGETS,
    PIECES,
    WIDE_FP32_TARGETS,
    ByTarget,
    compiled_once,
    oldest,
    shipped,
)
from tilewise.kernels.room import SHARED_BYTES, fits, shared_bytes
from tilewise.plan.tiles import TABLE, has_tile, table_tile
from tilewise.tools.compiled.compiler import TARGETS, CompileError
from tilewise.tools.inspect.inspect import inspect_one

NVIDIA = [target for target in TARGETS if target.startswith("sm")]
WITHOUT_PRODUCTS = (
    "prepare_kernel", "finish_dq_kernel", "combine_kernel", "list_keys_kernel", "list_rows_kernel"
)  # fmt: skip
BARRIER_BYTES = 2048  # what Triton keeps in shared memory besides tiles: barriers, scratch of reductions


@pytest.fixture(scope="module")
def main_tiles(tmp_path_factory) -> ByTarget:
    """By target and variant."""
    return shipped("main_variants", tmp_path_factory).keyed(lambda each: each.variant)


@pytest.fixture(scope="module")
def backward_tiles(tmp_path_factory) -> ByTarget:
    """By target, and by variant and kernel."""
    return shipped("backward_variants", tmp_path_factory).keyed(lambda each: (each.variant, each.kernel))


@pytest.fixture(scope="module")
def backward_feature_kernels(tmp_path_factory) -> ByTarget:
    return shipped("backward_feature_variants", tmp_path_factory)


@pytest.fixture(scope="module")
def feature_kernels(tmp_path_factory) -> ByTarget:
    return shipped("feature_variants", tmp_path_factory)


@pytest.fixture(scope="module")
def fp8_kernels(tmp_path_factory) -> ByTarget:
    return shipped("fp8_variants", tmp_path_factory)


@pytest.fixture(scope="module")
def oldest_kernels(tmp_path_factory) -> ByTarget:
    return oldest(tmp_path_factory)[0]


def test_a_target_that_fails_hides_no_other(tmp_path_factory, monkeypatch):
    def compiled(source, targets, arguments):
        if targets == ["gfx942"]:
            raise CompileError("gfx942, broken on AMD: ValueError: no such thing on AMD")
        return {target: [] for target in targets}

    monkeypatch.setattr("harness.variants.compile_variants", compiled)
    found = compiled_once("broken_on_amd_variants", tmp_path_factory, ("gfx942", "sm_90"))
    assert found["sm_90"] == []
    with pytest.raises(CompileError, match=r"gfx942, broken on AMD: ValueError: no such thing on AMD"):
        found["gfx942"]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_no_worse_than_the_baseline(main_tiles, backward_tiles, target):
    against_baseline([*main_tiles[target].values(), *backward_tiles[target].values()])


@pytest.mark.oldest
def test_oldest_kernels_are_no_worse_than_the_baseline(oldest_kernels):
    against_baseline([each for target in OLDEST_TARGETS for each in oldest_kernels[target]])


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_the_table_do_not_spill(main_tiles, backward_tiles, target):
    """But for those that an older Triton is known to spill: the file of figures has them by version."""
    kernels = [*main_tiles[target].values(), *backward_tiles[target].values()]
    known = {name for name, figures in load().get(triton.__version__, {}).items() if figures.spill_bytes}
    assert {key(each) for each in kernels if each.spill_bytes} <= known


def test_the_newest_triton_of_the_baseline_spills_no_tile():
    """But for Hopper's forward, whose spills test_hopper_compiled.py knows."""
    version = max(load(), key=Version)
    assert Version(version) >= Version("3.9.0")
    spilled = [name for name, figures in load()[version].items() if figures.spill_bytes]
    assert [name for name in spilled if not name.startswith("sm_90 hopper")] == []


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_the_table_fit_shared_memory(main_tiles, target):
    limit = SHARED_BYTES[target]
    assert all(each.shared_bytes <= limit for each in main_tiles[target].values())


ROWS = {  # of the table, those that a variant is named after: bytes an element, and head_dim
    f"{dtype} {dim} causal": (nbytes, dim)
    for dtype, nbytes in {"bf16": 2, "fp32": 4}.items()
    for dim in (64, 128, 256)
}


@pytest.mark.parametrize("target", TARGETS)
def test_estimate_of_shared_memory_holds(main_tiles, target):
    for name in ROWS.keys() & main_tiles[target].keys():
        estimate = shared_bytes(table_tile(target, *ROWS[name]), target, *ROWS[name])
        assert main_tiles[target][name].shared_bytes <= estimate + BARRIER_BYTES, name


FP8_MATMUL = {"sm_90": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3", "sm_100": r"UTCQMMA"}


@pytest.mark.parametrize("target", FP8_TARGETS)
def test_fp8_is_multiplied_by_tensor_cores(fp8_kernels, target):
    """By those for it in tiles of 64 rows and more; smaller ones as fp16, which holds every such number."""
    found = [each for each in fp8_kernels[target] if each.kernel == "forward_kernel"]
    assert len(found) >= 4
    for each in found:
        wanted = FP8_MATMUL[target] if each.tile["TILE_Q"] >= 64 else "HMMA"
        assert each.matmuls and all(re.match(wanted, opcode) for opcode in each.matmuls), each


@pytest.mark.parametrize("target", FP8_TARGETS)
def test_fp8_fits_and_plain_calls_do_not_spill(fp8_kernels, target):
    for each in fp8_kernels[target]:
        assert each.shared_bytes <= SHARED_BYTES[target], each
        if "causal" in each.variant or "few rows" in each.variant or "quantize" in each.variant:
            assert each.spill_bytes == 0, each
        dim = re.fullmatch(r"fp8 (64|128|192|256|576) causal", each.variant)
        if dim:
            given = target, 1, int(dim[1])
            assert each.shared_bytes <= shared_bytes(table_tile(*given), *given) + BARRIER_BYTES, each


def test_sums_of_fp8_products_are_kept_in_fp32(fp8_kernels):
    """What Hopper's tensor cores make of a step is added to O, as it is rescaled, by instructions of fp32:
    one for each number of O, beside those that make exponents of scores, for full tiles and for cut ones."""
    plain = [x for x in fp8_kernels["sm_90"] if "causal" in x.variant and x.tile["TILE_Q"] >= 64]
    assert plain
    for each in plain:
        numbers = each.tile["TILE_Q"] * (each.tile["VALUE_TILE"] + each.tile["TILE_KV"])
        assert each.instructions["FFMA"] >= 2 * numbers // (32 * each.warps), each


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> ByTarget:
    """By target, and by variant and kernel."""
    return shipped("pieces_variants", tmp_path_factory).keyed(lambda each: (each.variant, each.kernel))


@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_pieces_and_wide_ones_do_not_spill_and_fit(pieces, target):
    # Before Triton 3.9 a few registers of wide rows lie in memory, but not in the loop over full tiles.
    known = 0 if Version(triton.__version__) >= Version("3.9") else 24
    for (variant, _), each in pieces[target].items():
        assert each.spill_bytes <= (known if variant.startswith("bf16 576") else 0), each
        assert all(loop.spills == 0 for loop in each.loops if loop.name == "full"), each
        assert each.shared_bytes <= SHARED_BYTES[target], each
        assert bool(each.matmuls) == (variant.startswith("bf16") or target.startswith("gfx")), each


def test_each_kernel_of_pieces_is_compiled(pieces):
    """Of wide rows dK and dV apart, but for those in fp32."""
    assert len({key for target in TARGETS for key in pieces[target]}) == 3 * len(PIECES) - 2 + 1


def test_the_backward_of_wide_fp32_rows_does_not_spill_and_fits(tmp_path_factory):
    compiled = shipped("wide_fp32_variants", tmp_path_factory)
    kernels = [each for target in WIDE_FP32_TARGETS for each in compiled[target]]
    assert {each.kernel for each in kernels} == {"dq_kernel", "dkv_kernel"}
    for each in kernels:
        assert each.spill_bytes == 0 and each.shared_bytes <= SHARED_BYTES[each.target], each


def test_rows_in_pieces_are_multiplied_as_they_are(pieces):
    """80 columns are not 128: each product is made once, and of no other columns. docs/kernel.md has what
    that comes to in clocks."""
    products = {"forward_kernel": 2, "dkv_kernel": 4, "dq_kernel": 3}
    names = {f"bf16 {dim}x{dim} causal": dim for dim in (80, 192)}
    found = [each for target in ("sm_80", "sm_90") for each in pieces[target].values()]
    found = [each for each in found if each.variant in names]
    assert {each.kernel for each in found} == products.keys()
    for each in found:
        pairs = each.tile["TILE_Q"] * each.tile["TILE_KV"]
        flops = 2 * products[each.kernel] * pairs * names[each.variant]
        assert [loop.matmul_flops for loop in each.loops] == [flops] * 2, each


def test_wide_rows_are_multiplied_once(pieces):
    """No two warps compute the same numbers."""
    compiled = [each for target in NVIDIA for each in pieces[target].values()]
    kernels = [each for each in compiled if each.variant.startswith("bf16 576")]
    assert {each.kernel for each in kernels} == {f"{name}_kernel" for name in ("forward", "dq", "dk", "dv")}
    for each in kernels:
        assert [loop.matmul_flops / loop.tile_flops for loop in each.loops] == [1, 1], each


KERNELS = {"forward": "forward_kernel", "dkv": "dkv_kernel", "dq": "dq_kernel", "dqkv": "dqkv_kernel"}


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_the_backward_fit_shared_memory(backward_tiles, target):
    assert all(each.shared_bytes <= SHARED_BYTES[target] for each in backward_tiles[target].values())


@pytest.mark.parametrize("target", TARGETS)
def test_estimate_of_the_backwards_shared_memory_holds(backward_tiles, target):
    works = {KERNELS[work]: work for work in ("dkv", "dq", "dqkv")}
    compiled = backward_tiles[target].values()
    found = [each for each in compiled if each.variant in ROWS and each.kernel in works]
    assert {each.kernel for each in found} == works.keys()
    for each in found:
        row, work = ROWS[each.variant], works[each.kernel]
        estimate = shared_bytes(table_tile(target, *row, work), target, *row, work)
        assert each.shared_bytes <= estimate + BARRIER_BYTES, each


@pytest.mark.parametrize("target", TARGETS)
def test_the_backward_multiplies_on_tensor_cores_and_in_ieee_for_float32(backward_tiles, target):
    for (variant, kernel), each in backward_tiles[target].items():
        if kernel != "prepare_kernel":
            assert bool(each.matmuls) == (variant.startswith("bf16") or target.startswith("gfx")), each


@pytest.mark.parametrize("target", TARGETS)
def test_every_feature_compiles_in_the_backward(backward_feature_kernels, target):
    kernels = backward_feature_kernels[target]
    assert kernels
    for each in kernels:
        assert each.shared_bytes <= SHARED_BYTES[target], each
        assert each.matmuls or each.kernel in WITHOUT_PRODUCTS, each


# What the kernels of tangents spill at most, in bytes a thread; several features at once, as much as they do.
SPILLS = {"bf16 128 causal": 24, "bf16 576x512": 256}


@pytest.mark.parametrize("target", TARGETS)
def test_tangents_compile(tmp_path_factory, target):
    lists = ["second_variants", *["wide_second_variants"] * (target in WIDE_FP32_TARGETS)]
    kernels = [each for name in lists for each in shipped(name, tmp_path_factory)[target]]
    for each in kernels:
        assert each.matmuls and each.shared_bytes <= SHARED_BYTES[target], each
        if target in NVIDIA:
            assert each.spill_bytes <= SPILLS.get(each.variant, each.spill_bytes), each


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_compile(tmp_path_factory, target):
    kernels = shipped("statistics_variants", tmp_path_factory)[target]
    assert kernels
    for each in kernels:
        assert each.shared_bytes <= SHARED_BYTES[target], each
        assert each.matmuls or each.kernel in WITHOUT_PRODUCTS, each


@pytest.mark.parametrize("target", TARGETS)
def test_long_16_bit_tiles_use_the_chips_matmul_instruction(main_tiles, target):
    variants = main_tiles[target].values()
    for each in variants:
        if each.variant.startswith(("bf16", "fp16")) and "q_len" not in each.variant:
            assert each.uses_tensor_cores, each


def test_hoppers_matmuls_are_not_serialised(main_tiles):
    """Short of registers, ptxas waits after every single wgmma. In each of the two loops there are two
    products, Q Kᵀ and P V, and to each belong one WARPGROUP.ARRIVE and one WARPGROUP.DEPBAR."""
    for name, each in main_tiles["sm_90"].items():
        if name.startswith(("bf16", "fp16")) and "q_len" not in name:
            assert each.instructions["WARPGROUP"] == 2 * 2 * 2, each


@pytest.mark.parametrize("target", TARGETS)
def test_each_kernel_has_a_loop_of_full_tiles_and_a_longer_one_of_cut_tiles(
    main_tiles, backward_tiles, target
):
    for each in [*main_tiles[target].values(), *backward_tiles[target].values()]:
        if each.kernel == "prepare_kernel":
            assert not each.loops
            continue
        loops = {loop.name: loop for loop in each.loops}
        assert [*loops] == (["cut", "full"] if each.kernel == "dqkv_kernel" else ["full", "cut"]), each
        full, cut = loops["full"], loops["cut"]
        assert full.instructions < cut.instructions and full.spills == 0, each
        threads = each.warps * (64 if target.startswith("gfx") else 32)
        pairs = each.tile["TILE_Q"] * each.tile["TILE_KV"]
        assert full.exponentials >= pairs / threads, each


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_long_tiles_multiply_each_product_once(main_tiles, target):
    """The FLOPs that the opcodes spell are those of Q Kᵀ and P V, counted by hand."""
    dims = {f"bf16 {dim} causal": dim for dim in (64, 128, 256)}
    for name in dims.keys() & main_tiles[target].keys():
        compiled = main_tiles[target][name]
        pairs = compiled.tile["TILE_Q"] * compiled.tile["TILE_KV"]
        assert [loop.matmul_flops for loop in compiled.loops] == [4 * pairs * dims[name]] * 2, name


@pytest.mark.parametrize(("dim", "ratio"), [(64, 1.0), (128, 0.5), (256, 0.25)])
def test_hoppers_exponentials_take_the_known_share_of_the_matmuls_time(main_tiles, dim, ratio):
    """64 / head_dim on Hopper: 16 exponentials against 4096 FLOP a clock. Beside an exponential for each pair
    a thread takes one for each of its two rows, to rescale them."""
    compiled = main_tiles["sm_90"][f"bf16 {dim} causal"]
    limits = inspect_one(compiled).loops[0].bound
    pairs = compiled.tile["TILE_Q"] * compiled.tile["TILE_KV"] / (32 * compiled.warps)
    assert limits.exponentials / limits.matmul == pytest.approx(ratio * (pairs + 2) / pairs)


@pytest.mark.parametrize("target", COPYING_TARGETS)
def test_the_copy_engine_takes_the_threads_work(tmp_path_factory, target):
    """In full steps, in which threads ask for no copies of their own; in those that a mask cuts they do."""
    for each in shipped("copied_variants", tmp_path_factory)[target]:
        assert each.spill_bytes == 0 and each.uses_tensor_cores, each
        assert each.instructions["UTMALDG"] and each.instructions["LDGSTS"], each
        full, cut = each.loops
        assert full.shared_stores < cut.shared_stores, each


@pytest.mark.parametrize("target", TARGETS)
def test_short_16_bit_tiles_use_tensor_cores(main_tiles, target):
    """Fewer rows than Hopper's and Blackwell's instructions take: there the smaller HMMA serves."""
    assert all(each.matmuls for name, each in main_tiles[target].items() if "q_len" in name)


def test_float32_is_ieee_unless_tf32_is_asked_for(main_tiles):
    """The interpreter computes every precision exactly, so only machine code can tell."""
    found = [each for target in NVIDIA for each in main_tiles[target].values() if each.dtype == "float32"]
    assert {"tf32" in each.variant for each in found} == {True, False}
    for each in found:
        assert bool(each.matmuls) == ("tf32" in each.variant), each


@pytest.mark.parametrize("target", TARGETS)
def test_every_feature_compiles(feature_kernels, target):
    assert feature_kernels[target]
    for each in feature_kernels[target]:
        assert each.shared_bytes <= SHARED_BYTES[target], each
        assert each.matmuls or each.kernel in WITHOUT_PRODUCTS, each


@pytest.mark.parametrize("target", TARGETS)
def test_calls_on_a_cache_compile(tmp_path_factory, target):
    kernels = shipped("cache_variants", tmp_path_factory)[target]
    assert kernels
    for each in kernels:
        assert each.shared_bytes <= SHARED_BYTES[target] and each.spill_bytes == 0, each
        assert bool(each.matmuls) == (each.kernel == "forward_kernel"), each


@pytest.mark.oldest
def test_oldest_variants_compile_without_spills(oldest_kernels):
    for found in (oldest_kernels[target] for target in OLDEST_TARGETS):
        names = ["forward_kernel"] * 2 + ["prepare_kernel", "dq_kernel", "dkv_kernel", "dqkv_kernel"]
        assert [each.kernel for each in found] == names
        assert found[0].spill_bytes == 0 and found[0].uses_tensor_cores
        assert all(each.matmuls and each.spill_bytes == 0 for each in found[3:])


def test_every_feature_that_changes_a_kernel_is_in_a_combination():
    kinds = ("mask", "score", "bias", "sink", "dropout")
    names = {feature.name for kind in kinds for feature in of_kind(kind)}
    names |= {"cosine", "cosine_with_temperature", "other_scale", "tensor_scale"}
    names |= {"packed_rows", "packed_apart"}  # a cache has variants of its own
    assert {name for features in COMBINATIONS for name in features} == names


def test_every_row_of_the_table_fits():
    for (work, arch, element_bytes, dim), tile in TABLE.items():
        assert fits(tile, arch, element_bytes, dim, work), (work, arch, element_bytes, dim)
        assert table_tile(arch, element_bytes, dim, work) == tile
    assert len(TABLE) >= 3 * 4 * 2 * 3  # others may be tuned for chips of their own


# Shared memory of one block in KiB: CUDA programming guide, "compute capabilities"; AMD's ISA guides.
OTHER_CHIPS = {"sm_75": 64, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_103": 227, "sm_120": 99, "sm_121": 99}
OTHER_CHIPS |= {"gfx90a": 64, "gfx950": 160}


@pytest.mark.parametrize("arch", OTHER_CHIPS)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("work", ["forward", "dkv", "dq", "dqkv"])
def test_chips_that_the_table_does_not_list_get_a_tile_that_fits(arch, element_bytes, dim, work):
    if (arch, element_bytes, dim) == ("sm_75", 4, 256) and work in ("dkv", "dq"):
        with pytest.raises(NotImplementedError, match="sm_75 has too little shared memory"):
            table_tile(arch, element_bytes, dim, work)
        return
    if not has_tile(element_bytes, dim, work):
        with pytest.raises(NotImplementedError, match="take two walks"):
            table_tile(arch, element_bytes, dim, work)
        return
    tile = table_tile(arch, element_bytes, dim, work)
    estimate = shared_bytes(tile, arch, element_bytes, dim, work)
    assert estimate <= OTHER_CHIPS[arch] * 1024
    # One tile of what the pass walks over, at the least: AMD keeps what a program owns in registers.
    walked = tile.tile_q if work in ("dkv", "dqkv") else tile.tile_kv
    assert estimate >= element_bytes * walked * dim


def test_a_tile_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"tile_q=24 must be a power of two, at least 16"):
        tile = table_tile("sm_90", 2, 64)
        type(tile)(24, 32)


def test_precision_setting_is_left_as_it_was():
    assert torch.get_float32_matmul_precision() == "highest"
