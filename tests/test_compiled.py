"""What the kernels become on a GPU, read from their machine code: no GPU needed, none replaced by it.

Every variant that ships compiles for every target; the tiles of the table do not spill, stay within the
chip's shared memory and the estimate that `tiles.fits` relies on, and multiply on tensor cores.
"""

import pytest
import torch

from harness.compiled import TARGETS, Compiled, compile_variants
from tilewise.tiles import TABLE, fits, shared_bytes, table_tile

# One worker compiles for all tests of this file.
pytestmark = pytest.mark.xdist_group("compiled")
BARRIER_BYTES = 2048  # what Triton keeps in shared memory besides tiles: barriers, scratch of reductions


@pytest.fixture(scope="module")
def main_tiles() -> dict[str, dict[str, Compiled]]:
    """By target and variant."""
    compiled = compile_variants("harness.variants:main_variants", list(TARGETS))
    return {target: {each.variant: each for each in found} for target, found in compiled.items()}


@pytest.fixture(scope="module")
def feature_kernels() -> dict[str, list[Compiled]]:
    return compile_variants("harness.variants:feature_variants", list(TARGETS))


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_the_table_do_not_spill(main_tiles, target):
    spilling = {name: each.spill_bytes for name, each in main_tiles[target].items() if each.spill_bytes}
    assert not spilling


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_the_table_fit_shared_memory(main_tiles, target):
    limit = TARGETS[target].shared_limit
    assert all(each.shared_bytes <= limit for each in main_tiles[target].values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_estimate_of_shared_memory_holds(main_tiles, target, dtype, dim):
    element_bytes = 2 if dtype == "bf16" else 4
    estimate = shared_bytes(table_tile(target, element_bytes, dim), target, element_bytes, dim)
    assert main_tiles[target][f"{dtype} {dim} causal"].shared_bytes <= estimate + BARRIER_BYTES


@pytest.mark.parametrize("target", TARGETS)
def test_long_16_bit_tiles_use_the_chips_matmul_instruction(main_tiles, target):
    variants = main_tiles[target].values()
    for each in variants:
        if each.variant.startswith(("bf16", "fp16")) and "q_len" not in each.variant:
            assert each.uses_tensor_cores, each


@pytest.mark.parametrize("target", TARGETS)
def test_short_16_bit_tiles_use_tensor_cores(main_tiles, target):
    """Fewer rows than Hopper's and Blackwell's instructions take: there the smaller HMMA serves."""
    for each in main_tiles[target].values():
        if "q_len" in each.variant:
            assert any("MMA" in opcode or "mfma" in opcode for opcode in each.matmuls), each


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm")])
def test_float32_is_ieee_unless_tf32_is_asked_for(main_tiles, target):
    """The interpreter computes every precision exactly, so only machine code can tell."""
    for dim in (64, 128, 256):
        assert not main_tiles[target][f"fp32 {dim} causal"].matmuls
    assert main_tiles[target]["fp32 tf32 64 causal"].matmuls


@pytest.mark.parametrize("target", TARGETS)
def test_every_feature_compiles(feature_kernels, target):
    limit = TARGETS[target].shared_limit
    assert len(feature_kernels[target]) >= 12
    assert all(each.shared_bytes <= limit and each.uses_tensor_cores for each in feature_kernels[target])


@pytest.mark.oldest
def test_oldest_variants_compile_without_spills():
    compiled = compile_variants("harness.variants:oldest_variants", ["sm_80", "sm_90"])
    assert [len(found) for found in compiled.values()] == [3, 3]
    assert all(found[0].spill_bytes == 0 and found[0].uses_tensor_cores for found in compiled.values())


def test_every_row_of_the_table_fits():
    for (arch, element_bytes, dim), tile in TABLE.items():
        assert fits(tile, arch, element_bytes, dim), (arch, element_bytes, dim)
        assert table_tile(arch, element_bytes, dim) == tile


@pytest.mark.parametrize(
    "arch", ["sm_75", "sm_86", "sm_87", "sm_89", "sm_103", "sm_120", "sm_121", "gfx90a", "gfx950"]
)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_chips_that_the_table_does_not_list_get_a_tile_that_fits(arch, element_bytes, dim):
    assert fits(table_tile(arch, element_bytes, dim), arch, element_bytes, dim)


def test_a_tile_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"tile_q=24 must be a power of two, at least 16"):
        tile = table_tile("sm_90", 2, 64)
        type(tile)(24, 32)


def test_precision_setting_is_left_as_it_was():
    assert torch.get_float32_matmul_precision() == "highest"
