"""What Hopper's backward becomes, read from its machine code and its PTX, as the forward in
test_hopper_compiled.py: products from registers and under one another, registers by role, spills, barriers,
and the order of what passes the turn to the next program.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pytest

from harness import ptx
from harness.hopper_code import (
    LONGER,
    HopperCode,
    above,
    complaints_of_barriers,
    count,
    others_than,
    read_kernels,
)
from harness.variants import hopper_backward_variants
from tilewise.kernels import room
from tilewise.kernels.hopper.limits import backward_barriers
from tilewise.kernels.tile import HopperBackwardTile, hopper_backward_tile
from tilewise.tools.compiled.in_flight import touched_in_flight
from tilewise.tools.compiled.machine_code import Instruction
from tilewise.tools.compiled.main_loop import a_in_registers

pytestmark = pytest.mark.oldest

NAMES = [variant.name for variant in hopper_backward_variants(in_turns=True)]
EVERYONE = 288  # threads: both warpgroups' and the producer's


@dataclass(frozen=True)
class Budget:
    """What Triton 3.6.0 and 3.9.0 made of a variant: the larger of the two."""

    full: int  # instructions of the longest loop over full tiles
    spill_bytes: int  # a thread's stack
    spills: int  # loads and stores of it in a loop over full tiles
    loads: int = 3  # from global memory: three numbers of rows, a row a thread


BUDGETS = {
    "bf16 64 causal": Budget(824, 360, 55),
    "bf16 64 full": Budget(808, 320, 47),
    "bf16 128 causal": Budget(560, 408, 27),
    "bf16 128 full": Budget(548, 328, 30),
    "fp16 128 causal": Budget(560, 408, 27),
    "bf16 64 causal, 64 rows": Budget(480, 72, 0),
    "bf16 64 features": Budget(4424, 1960, 1050, 67),  # the softcap's input is kept until its derivative
}


@dataclass(frozen=True)
class Kernel(HopperCode):
    @cached_property
    def ptx(self) -> ptx.Kernel:
        return ptx.Kernel(self.ptx_text, 2, 1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    """By variant."""
    return read_kernels(Kernel, "hopper_backward_variants", tmp_path_factory, [dict(in_turns=True)])


# ---- What a listing must not show, in words; nothing where all is well


def under_a_product(code: list[Instruction]) -> list[Instruction]:
    """Those that stand where a product of the same warps is under way."""
    under_way, found = 0, []
    for each in code:
        if each.opcode.startswith("WARPGROUP.DEPBAR"):
            under_way = min(under_way, int(each.operands.split()[-1], 16))
        elif each.opcode.startswith("HGMMA"):
            under_way += each.operands.endswith("gsb0")
        elif under_way:
            found.append(each)
    return found


def complaints_of_both_loops(code: list[Instruction], tile: dict[str, int]) -> list[str]:
    """Five products, P and dS from registers, and all that is between them under one of them."""
    along_columns, along_rows = tile["HEAD_TILE"] // 16, tile["TILE_Q"] // 16
    dq = tile["TILE_KV"] // 16
    found = {
        "HGMMA": (count(code, "HGMMA"), 2 * along_columns + 2 * along_rows + dq),
        "HGMMA with A in registers": (sum(map(a_in_registers, code)), 2 * along_rows),
        "WARPGROUP, 10 of which are needed": (count(code, "WARPGROUP"), 10),
    }
    complaints = others_than(found)
    under = under_a_product(code)
    exponentials = sum(each.opcode == "MUFU.EX2" for each in code)
    if (seen := sum(each.opcode == "MUFU.EX2" for each in under)) < exponentials:
        complaints.append(f"exponentials under a product: {seen} of {exponentials}")
    dq_stores = tile["TILE_Q"] * tile["HEAD_TILE"] // 2 // 128 // 2  # STS.64, of a half by 128 threads
    for what, names, least in (
        ("roundings", ("F2FP",), count(code, "F2FP")),
        ("stores of dQ", ("STS",), dq_stores),
    ):
        if (seen := count(under, *names)) < least:
            complaints.append(f"{what} under a product: {seen} of {least}")
    return complaints


def complaints_of_full_loop(code: list[Instruction], budget: Budget) -> list[str]:
    return above({
        "BAR": (count(code, "BAR"), 7),
        "PRMT": (count(code, "PRMT"), 8),
        "LDG": (count(code, "LDG"), budget.loads),
        "LDL, STL": (count(code, "LDL", "STL"), budget.spills),
        "instructions": (len(code), LONGER * budget.full),
    })  # fmt: skip


def planned_barriers(stages: int) -> set[tuple[int, int | None]]:
    """(number, threads that it counts), as backward/kernel.py numbers them; those of Triton come first."""
    together = 5 + stages
    planned = {(0, 128), (1, None), (2, 128), (together, 256)}
    planned |= {(number, 160) for number in range(together + 1, together + 5)}
    planned |= {(number, EVERYONE) for number in range(5, together)}
    assert max(number for number, _ in planned) + 1 == backward_barriers(stages)
    return planned


def complaints_of_turns(kernel: ptx.Kernel) -> Iterator[str]:
    """On every way from an addition to the next release memory has it, then come a fence and a barrier of the
    warp; and on every way from a look at a counter to an addition a fence."""
    steps = ("cp.async.bulk.wait_group", "fence.proxy.async.global", "bar.warp.sync")
    add, look, release = "cp.reduce", "ld.global.gpu.acquire", ".global.gpu.release"

    def to_release(each: Instruction, missing: int) -> int:
        """How many of the last steps are missing still."""
        if each.opcode.startswith(add):
            return len(steps)
        is_read = each.opcode.endswith(".read")  # of the source alone
        if missing and each.opcode.startswith(steps[-missing]) and not is_read:
            return missing - 1
        return missing

    def to_add(each: Instruction, missing: int) -> int:
        if each.opcode.startswith(look):
            return 1
        return 0 if each.opcode.startswith(steps[1]) else missing

    released = [i for i, each in enumerate(kernel.code) if release in each.opcode]
    if not released or not kernel.places(look):
        yield "no counter is looked at, or counts on with release"
    missing = ptx.on_every_way(kernel, max, to_release)
    yield from (f"{steps[-missing[i]]} is missing before a release" for i in released if missing[i])
    missing = ptx.on_every_way(kernel, max, to_add)
    yield from (f"{steps[1]} is missing before an addition" for i in kernel.places(add) if missing[i])


# ---- The variants


def test_every_variant_has_a_budget():
    assert {variant.name for variant in hopper_backward_variants()} == set(BUDGETS)


@pytest.mark.parametrize("name", NAMES)
def test_the_assembler_serialises_nothing(kernels, name):
    assert kernels[name].compiled.assembler.warnings == []


@pytest.mark.parametrize("name", NAMES)
def test_spills_are_known(kernels, name):
    assert kernels[name].compiled.spill_bytes <= BUDGETS[name].spill_bytes


@pytest.mark.parametrize("name", NAMES)
def test_registers_are_handed_over(kernels, name):
    compiled = kernels[name].compiled
    assert compiled.role_registers == dict(consumer=240, producer=24, reducer=24)
    assert compiled.warps == 12


@pytest.mark.parametrize("name", NAMES)
def test_the_tile_is_the_one_that_fits(kernels, name):
    compiled = kernels[name].compiled
    dtype, dim = name.split()[:2]
    tile = HopperBackwardTile(64, 128, 8, 3) if name.endswith("64 rows") else hopper_backward_tile(int(dim))
    sizes = dict(TILE_Q=tile.tile_q, TILE_KV=tile.tile_kv, HEAD_TILE=int(dim), VALUE_TILE=int(dim))
    assert compiled.tile == sizes and compiled.stages == tile.num_stages
    assert compiled.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    estimate = room.shared_bytes(tile, "sm_90", 2, int(dim), "hopper_backward")
    assert compiled.shared_bytes <= estimate <= room.SHARED_BYTES["sm_90"]


@pytest.mark.parametrize("name", NAMES)
def test_each_warpgroup_has_a_loop_of_cut_and_one_of_full_tiles(kernels, name):
    compiled = kernels[name].compiled
    assert [loop.name for loop in compiled.loops] == ["cut 1", "full 1", "cut 2", "full 2"]
    for loop in compiled.loops:
        assert (loop.warps, loop.teams) == (4, 2)
        assert loop.matmul_flops == loop.tile_flops


@pytest.mark.parametrize("name", NAMES)
def test_nothing_touches_the_registers_of_a_matmul_in_flight(kernels, name):
    for loops in kernels[name].loops:
        for loop in loops:
            assert touched_in_flight(loop) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_between_products_runs_under_one(kernels, name):
    kernel = kernels[name]
    for loops in kernel.loops:
        for loop in loops:
            assert complaints_of_both_loops(loop, kernel.compiled.tile) == []


@pytest.mark.parametrize("name", NAMES)
def test_full_tiles_cost_no_more_than_planned(kernels, name):
    for _, full in kernels[name].loops:
        assert complaints_of_full_loop(full, BUDGETS[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_named_barriers_are_the_planned_ones(kernels, name):
    kernel = kernels[name]
    assert complaints_of_barriers(kernel.code, planned_barriers(kernel.compiled.stages), EVERYONE) == []


@pytest.mark.parametrize("name", NAMES)
def test_roles_hand_over_as_ptx_demands(kernels, name):
    assert ptx.complaints(kernels[name].ptx) == []


@pytest.mark.parametrize("name", NAMES)
def test_turns_are_passed_on_when_memory_has_the_sums(kernels, name):
    assert [*complaints_of_turns(kernels[name].ptx)] == []


def test_scores_are_summed_as_the_forward_does(kernels):
    """S and dP in one sum of steps of 16 along the columns; and dQ along the keys."""
    for each in kernels.values():
        columns = each.compiled.tile["HEAD_TILE"] // 16
        assert set(each.compiled.sums) == {f"{columns} HGMMA", "8 HGMMA"}, each.compiled


# ---- Each check can fail


@pytest.fixture(scope="module")
def kernel(kernels) -> Kernel:
    return kernels["bf16 128 full"]


@pytest.fixture(scope="module")
def full(kernel) -> list[Instruction]:
    return kernel.loops[0][1]


def test_a_wait_that_comes_early_is_noticed(kernel, full):
    """The wait for dK moved up to that for dQ, as ptxas would have it: then dQ leaves under no product."""
    waits = [i for i, each in enumerate(full) if each.opcode.startswith("WARPGROUP.DEPBAR")]
    third, last = waits[2:]
    early = [*full[: third + 1], full[last], *full[third + 1 : last], *full[last + 1 :]]
    (complaint,) = complaints_of_both_loops(early, kernel.compiled.tile)
    assert complaint.startswith("stores of dQ under a product: 0 of")


def test_what_is_serialised_or_in_shared_memory_is_noticed(kernel, full):
    wait = Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    complaints = complaints_of_both_loops([*full, wait], kernel.compiled.tile)
    assert complaints == ["WARPGROUP, 10 of which are needed: 11, not 10"]
    at = next(i for i, each in enumerate(full) if a_in_registers(each))
    product = Instruction("HGMMA.64x128x16.F32.BF16", "R88, gdesc[UR20].tnspB, R88")
    complaints = complaints_of_both_loops([*full[:at], product, *full[at + 1 :]], kernel.compiled.tile)
    assert "HGMMA with A in registers: 7, not 8" in complaints


def test_a_costlier_loop_is_noticed():
    budget = Budget(full=20, spill_bytes=0, spills=2)
    for what, limit, opcode in (("BAR", 7, "BAR.SYNC"), ("PRMT", 8, "PRMT"), ("LDL, STL", 2, "LDL")):
        code = [Instruction(opcode, "R4, [R1]")] * limit
        assert complaints_of_full_loop(code, budget) == []
        assert complaints_of_full_loop([*code, code[0]], budget) == [f"{what}: {limit + 1}, above {limit}"]


@pytest.mark.parametrize("operands", ["0x0", "0x4, 0x80", "0x7, 0xa0", "0xc, 0xa0", "R4, 0x100", "R4"])
def test_a_barrier_that_is_not_planned_is_noticed(kernel, operands):
    doctored = [*kernel.code, Instruction("BAR.ARV", operands)]
    assert complaints_of_barriers(doctored, planned_barriers(2), EVERYONE) == [f"BAR.ARV {operands}"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"ld\.global\.gpu\.acquire", "ld.global"),
        (r"(atom|red)\.global\.gpu\.release", r"\1.global.gpu.relaxed"),
        (r"cp\.async\.bulk\.wait_group 0;", "cp.async.bulk.wait_group.read 0;"),
        (r"fence\.proxy\.async\.global;", ""),
    ],
)
def test_a_turn_passed_on_too_early_is_noticed(kernel, old, new):
    text, changed = re.subn(old, new, kernel.ptx_text)
    assert changed
    assert [*complaints_of_turns(replace(kernel.ptx, text=text))] != []
