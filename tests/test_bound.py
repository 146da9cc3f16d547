"""Occupancy, clocks and FLOPs of a main loop, by hand."""

import dataclasses

import pytest

from tilewise.tools.chips import find_chip
from tilewise.tools.compiled.bound import bound, occupancy
from tilewise.tools.compiled.compiler import tile_flops
from tilewise.tools.compiled.machine_code import Instruction
from tilewise.tools.compiled.main_loop import main_loops


# CUDA's occupancy rules: 65,536 registers in four parts, handed out to a warp in steps of 8 a thread; 228 KiB
# of shared memory, 1 KiB of it the system's in each program; 2048 threads; 32 programs.
@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs", "limit"),
    [
        (8, 254, 0, 1, "registers"),  # 256 x 32 x 8 is all there is
        (4, 64, 0, 8, "registers"),
        (4, 65, 0, 7, "registers"),  # 72: 7 warps a quarter of the registers
        (6, 168, 0, 2, "registers"),  # 3 warps a quarter: 12
        (4, 32, 0, 16, "registers"),  # as many as threads allow
        (8, 32, 0, 8, "registers"),
        (8, 16, 0, 8, "threads"),
        (1, 16, 0, 32, "programs"),
        (4, 32, 113 << 10, 2, "shared memory"),  # 2 x 114 KiB
        (4, 32, (113 << 10) + 1, 1, "shared memory"),
        (4, 32, 228 << 10, 0, "shared memory"),
    ],
)
def test_occupancy_follows_cudas_rules(warps, registers, shared, programs, limit):
    found = occupancy(find_chip("H200"), warps, registers, shared)
    assert (found.programs, found.limit) == (programs, limit)
    assert found.threads == programs * warps * 32 / 2048


def test_occupancy_of_other_chips():
    """AMD: 512 registers a lane and quarter, no reserve; Blackwell: 512 columns of tensor memory."""
    assert occupancy(find_chip("MI300X"), 4, 128, 0).programs == 4
    assert occupancy(find_chip("MI300X"), 4, 246, 0).programs == 2
    assert occupancy(find_chip("MI300X"), 4, 64, 32 << 10).programs == 2
    found = occupancy(find_chip("B200"), 4, 64, 0, tensor_memory=256)
    assert (found.programs, found.limit) == (2, "tensor memory")


def test_bound_by_hand():
    """A tile of 128 x 128 at head_dim 128, 8 warps: 64 exponentials a thread, 500 instructions."""
    (loop,) = main_loops([Instruction("MUFU.EX2"), Instruction("BRA", targets=(0,))], 8, 32, tile_flops=0)
    loop = dataclasses.replace(
        loop,
        instructions=500,
        issued=500,
        matmuls=16,
        matmul_flops=4 * 128**3,
        tile_flops=4 * 128**3,
        exponentials=60,
        special=4,
        float32=200,
        shared_bytes=128 * 1792,
    )
    found = bound(loop, find_chip("H200"), element_bytes=2)
    assert found.matmul == 4 * 128**3 / 4096 == 2048
    assert found.exponentials == 64 * 256 / 16 == 1024
    assert found.issue == 500 * 8 / 4
    assert found.other == (500 - 64 - 16) * 8 / 4
    assert found.shared == 1792
    assert found.limit == "matmul" and found.together == 1
    assert found.apart == 2048 / (2048 + 1024 + 840)
    # Products that are computed twice are no use; an A100 has half the lanes for fp32.
    twice = dataclasses.replace(loop, matmul_flops=2 * loop.matmul_flops, float32=450)
    assert bound(twice, find_chip("H200"), 2).together == 0.5
    assert bound(twice, find_chip("A100"), 2).issue == 450 * 8 / 2
    assert bound(loop, find_chip("H200"), 4).matmul == 2 * 2048, "TF32"


def test_bound_of_teams_is_that_of_a_step_of_each():
    """Two warpgroups with 64 rows each keep the units busy as long as eight warps with 128."""
    code = [Instruction("MUFU.EX2"), Instruction("BRA", targets=(0,))]
    (loop,) = main_loops(code, 8, 32, tile_flops=0)
    counts = dict(instructions=500, issued=500, matmuls=16, exponentials=64, float32=200)
    work = dict(matmul_flops=4 * 128**3, tile_flops=4 * 128**3, shared_bytes=128 * 1792)
    one = dataclasses.replace(loop, **counts, **work)
    halves = {name: amount // 2 for name, amount in work.items()}
    teams = dataclasses.replace(loop, warps=4, teams=2, **counts, **halves)
    assert bound(teams, find_chip("H200"), 2) == bound(one, find_chip("H200"), 2)


def test_bound_of_ieee_fp32_counts_its_products_once():
    """64 FFMA for a tile's products and 10 other instructions, one of them an exponential."""
    (loop,) = main_loops([Instruction("MUFU.EX2"), Instruction("BRA", targets=(0,))], 4, 32, tile_flops=0)
    loop = dataclasses.replace(
        loop,
        instructions=74,
        issued=74,
        float32=70,
        matmul_flops=64 * 256,
        tile_flops=64 * 256,
        exponentials=1,
    )
    found = bound(loop, find_chip("H200"), element_bytes=4)
    assert found.matmul == 64 and found.issue == 74 and found.limit == "issue"
    assert found.exponentials == 8 and found.other == 9 and found.shared == 0
    assert found.apart == 64 / (64 + 8 + 9)


def test_flops_of_a_tile_step():
    tile = dict(TILE_Q=64, TILE_KV=32, HEAD_TILE=128, VALUE_TILE=16)
    pairs = 2 * 64 * 32
    assert tile_flops("forward_kernel", tile) == pairs * (128 + 16)
    assert tile_flops("hopper_forward_kernel", tile) == pairs * (128 + 16)
    assert tile_flops("dkv_kernel", tile) == pairs * (2 * 128 + 2 * 16)  # S dK, dV dP
    assert tile_flops("dq_kernel", tile) == pairs * (2 * 128 + 16)  # S dQ, dP
    assert tile_flops("prepare_kernel", {}) is None
