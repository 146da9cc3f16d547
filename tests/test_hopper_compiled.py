"""What Hopper's forward becomes, read from its machine code: no GPU needed, none replaced by it.

Whether it is right, no listing says. What one says is whether the compiler has kept what the kernel is built
for: P in registers, softmax under the second product, registers handed over, named barriers as planned. What
was measured once is the budget of later changes.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

import pytest

from harness import ptx
from harness.baseline import against_baseline
from harness.hopper_code import (
    LONGER,
    HopperCode,
    above,
    complaints_of_barriers,
    count,
    others_than,
    read_kernels,
)
from harness.variants import HOPPER_TILES, hopper_variants
from tilewise.kernels import room
from tilewise.kernels.hopper.limits import hopper_pieces
from tilewise.kernels.tile import HopperTile
from tilewise.plan import tiles
from tilewise.tools.compiled.in_flight import touched_in_flight
from tilewise.tools.compiled.machine_code import Instruction
from tilewise.tools.compiled.main_loop import a_in_registers, overlapped
from tilewise.tools.inspect.inspect import inspect_one

pytestmark = pytest.mark.oldest

NAMES = [variant.name for variant in hopper_variants(in_turns=True)]
REGISTERS = {2: dict(consumer=240, producer=24), 3: dict(consumer=160, producer=32)}  # by warpgroups
SHARED_BYTES = 232_448  # of a program at most (CUDA programming guide)


@dataclass(frozen=True)
class Budget:
    """What Triton 3.6.0 and 3.9.0 made of a variant: the larger of the two."""

    full: int  # instructions of the longest loop over full tiles
    spill_bytes: int = 0  # a thread's stack
    spills: int = 0  # loads and stores of it in a loop over full tiles


BUDGETS = {
    "bf16 64 causal": Budget(435),
    "bf16 64 full": Budget(438),
    "bf16 128 causal": Budget(478),
    "bf16 128 full": Budget(494),
    "bf16 256 causal": Budget(464, spill_bytes=32),
    "bf16 256 full": Budget(457),
    "fp16 128 causal": Budget(478),
    "bf16 64 features": Budget(1990, spill_bytes=8),  # nearly all of it is tanh
    "bf16 160 causal": Budget(573, spill_bytes=8),
    "bf16 192x128 causal": Budget(532, spill_bytes=16),
    "bf16 64 causal, three warpgroups": Budget(278),
    "bf16 128 causal, no turns": Budget(476),
    "bf16 128 causal, Q in registers": Budget(551, spill_bytes=80, spills=8),
    "bf16 128 causal, four producer warps": Budget(478),
    "bf16 64 causal, three warpgroups, four producer warps": Budget(278),
}


def dims_of(name: str) -> tuple[int, int]:
    """Of head and value: "bf16 128 causal", "bf16 192x128 causal"."""
    head, _, value = name.split()[1].partition("x")
    return int(head), int(value or head)


@dataclass(frozen=True)
class Kernel(HopperCode):
    @cached_property
    def warpgroups(self) -> int:
        return self.compiled.tile["TILE_Q"] // 64

    @property
    def tile(self) -> HopperTile:
        name = self.compiled.variant.partition(", ")[2]
        if name:
            return HOPPER_TILES[name][1]
        return tiles.table_tile("sm_90", 2, tiles.tile_dim(*self.dims, "hopper"), "hopper")

    @property
    def dims(self) -> tuple[int, int]:
        return dims_of(self.compiled.variant)

    @cached_property
    def ptx(self) -> ptx.Kernel:
        products = len(hopper_pieces(self.dims[1]))
        return ptx.Kernel(self.ptx_text, self.warpgroups, self.tile.producer_warps, products)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    """By variant."""
    return read_kernels(
        Kernel, "hopper_variants", tmp_path_factory, [dict(part=i, in_turns=True) for i in (0, 1)]
    )


# ---- What a listing must not show, in words; nothing where all is well


def complaints_of_both_loops(
    code: list[Instruction], tile: dict[str, int], q_in_registers: bool
) -> list[str]:
    """O += P V with P in registers, two products under way at once, and the softmax under the second. Where
    columns are in pieces, a product is one for each."""
    head_pieces, value_pieces = (len(hopper_pieces(tile[name])) for name in ("HEAD_TILE", "VALUE_TILE"))
    along_head, along_kv = tile["HEAD_TILE"] // 16, value_pieces * tile["TILE_KV"] // 16
    needed = head_pieces + value_pieces + 2
    in_registers = along_kv + q_in_registers * along_head
    exponentials = sum(each.opcode == "MUFU.EX2" for each in code)
    found = {
        "HGMMA": (count(code, "HGMMA"), along_head + along_kv),
        "HGMMA with A in registers": (sum(map(a_in_registers, code)), in_registers),
        f"WARPGROUP, {needed} of which are needed": (count(code, "WARPGROUP"), needed),
    }
    complaints = others_than(found)
    if overlapped(code) < 0.9 * exponentials:
        complaints.append(f"exponentials under a product: {overlapped(code)} of {exponentials}")
    return complaints


def complaints_of_full_loop(code: list[Instruction], budget: Budget) -> list[str]:
    """Nothing of the softmax goes through shared memory, nobody waits more often than planned, no 16-bit
    number has a register of its own, nothing is spilled."""
    return above({
        "LDS, STS, LDSM, STSM": (count(code, "LDS", "STS", "LDSM", "STSM"), 0),
        "BAR": (count(code, "BAR"), 5),
        "PRMT": (count(code, "PRMT"), 8),
        "LDL, STL": (count(code, "LDL", "STL"), budget.spills),
        "instructions": (len(code), LONGER * budget.full),
    })  # fmt: skip


def planned_barriers(warpgroups: int, stages: int, producer_warps: int = 1) -> set[tuple[int, int | None]]:
    """(number, threads that it counts), as hopper/forward.py numbers them; Triton's own come first: a barrier
    of each role of more than a warp, and 1, where the workers wait for a role."""
    producer, everyone = 32 * producer_warps, all_threads(warpgroups, producer_warps)
    first_turn = warpgroups + 2
    first_q, first_ring = first_turn + warpgroups, first_turn + 2 * warpgroups
    return (
        {(1, None), (0, 128)}
        | {(n, 128) for n in range(2, warpgroups + (2 if producer_warps > 1 else 1))}
        | {(n, 256) for n in range(first_turn, first_q)}
        | {(n, 128 + producer) for n in range(first_q, first_ring)}
        | {(n, everyone) for n in range(first_ring, first_ring + 2 * stages)}
    )


def all_threads(warpgroups: int, producer_warps: int = 1) -> int:
    return 128 * warpgroups + 32 * producer_warps


# ---- The variants


def test_every_variant_has_a_budget():
    assert {variant.name for variant in hopper_variants()} == set(BUDGETS)


@pytest.mark.parametrize("name", NAMES)
def test_the_assembler_serialises_nothing(kernels, name):
    """Short of registers it makes every matmul wait for the one before, and says so: C7510 and its like."""
    assert kernels[name].compiled.assembler.warnings == []


@pytest.mark.parametrize("name", NAMES)
def test_spills_are_known(kernels, name):
    assert kernels[name].compiled.spill_bytes <= BUDGETS[name].spill_bytes


@pytest.mark.parametrize("name", NAMES)
def test_registers_are_handed_over(kernels, name):
    """The program starts with equal shares; then the consumers get what the producer leaves."""
    kernel = kernels[name]
    registers = kernel.compiled.role_registers
    assert registers == REGISTERS[kernel.warpgroups]
    assert kernel.compiled.warps == 4 * kernel.warpgroups + 4
    assert 128 * (kernel.warpgroups * registers["consumer"] + registers["producer"]) <= 65_536
    assert inspect_one(kernel.compiled).occupancy.programs == 1


@pytest.mark.parametrize("name", NAMES)
def test_shared_memory_is_as_estimated(kernels, name):
    kernel = kernels[name]
    with_out_buffer = room.has_out_buffer(kernel.tile, *kernel.dims)
    estimate = room.hopper_bytes(kernel.tile, *kernel.dims, with_out_buffer)
    assert kernel.compiled.shared_bytes <= min(SHARED_BYTES, estimate)
    if kernel.dims[0] == kernel.dims[1]:
        assert estimate == room.shared_bytes(kernel.tile, "sm_90", 2, kernel.dims[0], "hopper")


@pytest.mark.parametrize("name", NAMES)
def test_the_tile_is_the_one_asked_for(kernels, name):
    kernel = kernels[name]
    compiled, tile = kernel.compiled, kernel.tile
    dtype, (head_dim, value_dim) = name.split()[0], kernel.dims
    sizes = dict(TILE_Q=tile.tile_q, TILE_KV=tile.tile_kv, HEAD_TILE=head_dim, VALUE_TILE=value_dim)
    assert compiled.tile == sizes and compiled.stages == tile.num_stages
    assert compiled.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_each_warpgroup_has_a_loop_of_cut_and_one_of_full_tiles(kernels, name):
    """Each multiplies 64 rows once. Only the cut ones select: a score, or -inf."""
    kernel = kernels[name]
    compiled = kernel.compiled
    teams = range(1, kernel.warpgroups + 1)
    names = [f"{kind} {team}" for team in teams for kind in ("cut", "full")]
    assert [loop.name for loop in compiled.loops] == names
    pairs = 64 * compiled.tile["TILE_KV"]
    for loop in compiled.loops:
        assert (loop.warps, loop.teams) == (4, kernel.warpgroups)
        assert loop.matmul_flops == loop.tile_flops == 2 * pairs * sum(kernel.dims)
    for cut, full in kernel.loops:
        assert count(cut, "FSEL") >= count(full, "FSEL") + pairs // 128


@pytest.mark.parametrize("name", NAMES)
def test_nothing_touches_the_registers_of_a_matmul_in_flight(kernels, name):
    for loops in kernels[name].loops:
        for loop in loops:
            assert touched_in_flight(loop) == []


@pytest.mark.parametrize("name", NAMES)
def test_softmax_runs_under_the_second_product(kernels, name):
    kernel = kernels[name]
    for loops in kernel.loops:
        for loop in loops:
            in_registers = kernel.tile.is_q_in_registers
            assert complaints_of_both_loops(loop, kernel.compiled.tile, in_registers) == []


@pytest.mark.parametrize("name", NAMES)
def test_full_tiles_cost_no_more_than_planned(kernels, name):
    for _, full in kernels[name].loops:
        assert complaints_of_full_loop(full, BUDGETS[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_named_barriers_are_the_planned_ones(kernels, name):
    kernel = kernels[name]
    tile = kernel.tile
    planned = planned_barriers(kernel.warpgroups, tile.num_stages, tile.producer_warps)
    everyone = all_threads(kernel.warpgroups, tile.producer_warps)
    assert complaints_of_barriers(kernel.code, planned, everyone) == []


@pytest.mark.parametrize("name", NAMES)
def test_roles_hand_over_as_ptx_demands(kernels, name):
    assert ptx.complaints(kernels[name].ptx) == []


def test_hoppers_forward_is_no_worse_than_the_baseline(kernels):
    against_baseline(kernel.compiled for kernel in kernels.values())


# ---- Each check can fail: listings with something done to them


def changed(code: list[Instruction], old: str, new: Instruction, last: bool = False) -> list[Instruction]:
    """With the first, or last, instruction of this opcode replaced."""
    places = [i for i, each in enumerate(code) if each.opcode.split(".")[0] == old]
    place = places[-1 if last else 0]
    return [*code[:place], new, *code[place + 1 :]]


@pytest.fixture(scope="module")
def kernel(kernels) -> Kernel:
    return kernels["bf16 64 full"]


@pytest.fixture(scope="module")
def full(kernel) -> list[Instruction]:
    return kernel.loops[0][1]


@pytest.mark.parametrize(
    ("what", "limit", "instruction"),
    [
        ("LDS, STS, LDSM, STSM", 0, Instruction("STS.128", "[R4], R8")),
        ("LDS, STS, LDSM, STSM", 0, Instruction("LDSM.16.M88.4", "R4, [R8]")),
        ("BAR", 5, Instruction("BAR.SYNC.DEFER_BLOCKING", "0x0, 0x80")),
        ("PRMT", 8, Instruction("PRMT", "R4, R4, 0x5410, R5")),
        ("LDL, STL", 2, Instruction("LDL", "R4, [R1]")),
        ("instructions", 21, Instruction("FADD", "R4, R4, R5")),
    ],
)
def test_a_costlier_full_loop_is_noticed(what, limit, instruction):
    budget = Budget(full=20, spills=2)
    assert complaints_of_full_loop([instruction] * limit, budget) == []
    complaints = complaints_of_full_loop([instruction] * (limit + 1), budget)
    assert complaints == [f"{what}: {limit + 1}, above {limit}"]


def test_exponentials_after_the_wait_are_noticed(kernel, full):
    """The wait for the second product moved up to the first, as ptxas would have it."""
    waits = [i for i, each in enumerate(full) if each.opcode.startswith("WARPGROUP.DEPBAR")]
    first, second = waits
    early = [*full[: first + 1], full[second], *full[first + 1 : second], *full[second + 1 :]]
    (complaint,) = complaints_of_both_loops(early, kernel.compiled.tile, False)
    assert complaint == "exponentials under a product: 0 of 66"


def test_serialised_matmuls_are_noticed(kernel, full):
    wait = Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    complaints = complaints_of_both_loops([*full, wait], kernel.compiled.tile, False)
    assert complaints == ["WARPGROUP, 4 of which are needed: 5, not 4"]


def test_p_in_shared_memory_is_noticed(kernel, full):
    product = Instruction("HGMMA.64x64x16.F32.BF16", "R88, gdesc[UR20].tnspB, R88")
    doctored = changed(full, "HGMMA", product, last=True)
    complaints = complaints_of_both_loops(doctored, kernel.compiled.tile, False)
    assert "HGMMA with A in registers: 7, not 8" in complaints


@pytest.mark.parametrize(
    "operands", ["0x0", "0x3, 0x80", "0xc, 0x120", "0x4, 0x80", "0x6, 0x100", "R4, 0x100", "R4"]
)
def test_a_barrier_that_is_not_planned_is_noticed(kernel, operands):
    """Of two warpgroups: role, turns 4 and 5, q 6 and 7, k and v 8 to 11."""
    doctored = changed(kernel.code, "BAR", Instruction("BAR.ARV", operands))
    assert complaints_of_barriers(doctored, planned_barriers(2, 2), all_threads(2)) == [f"BAR.ARV {operands}"]


def test_scores_are_summed_as_the_portable_kernels_do(kernels):
    """In one sum of steps of 16: the backward after it computes P again (see test_same_sums.py)."""
    for each in kernels.values():
        assert set(each.compiled.sums) == {f"{each.compiled.tile['HEAD_TILE'] // 16} HGMMA"}, each.compiled


FENCE = r"fence\.proxy\.async\.shared::cta;"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            r"(setmaxnreg\.dec\S+\s+)24;",
            r"\g<1>32;",
            "registers_add_up: .* registers are asked for, of 64512",
        ),
        (r"\.maxnreg 168", ".maxnreg 176", "registers_add_up: the launch takes 67584 registers"),
        (r"\{0, (\d+)\}", r"{1, \1}", r"warps_have_their_roles: warpgroup 1 is of workers \[1, 0, 0, 0\]"),
        (FENCE, "", "mbarriers_are_ready: no fence of the first role"),
        (r"(expect_tx.*), 32768;", r"\1, 16384;", "bytes_are_expected: 16384 bytes .* 32768 come"),
        (
            r"(bar\.arrive %r\d+), 288;",
            r"\1, 256;",
            r"barriers_count_who_comes: barrier 8 counts 288 threads, and 32 come",
        ),
        (
            rf"(st\.shared\.v4.*;[^;]*?){FENCE}",
            r"\1",
            "writes_are_seen: a fence is missing before mbarrier.arr",
        ),
        (
            rf"({FENCE}\s+(?:(?://|\.loc).*\s+)*)bar\.sync \t0, 128;",
            r"\1",
            "writes_are_seen: a barrier is missing before",
        ),
        (FENCE, "", "reads_are_over: no fence between a load and mbarrier.arrive"),
        (r"wgmma\.fence\S+;", "", "matmuls_are_fenced_.*: no wgmma.fence before wgmma.mma_async"),
        (r"wgmma\.commit_group\S+;", "", "matmuls_are_fenced_.*: no wgmma.commit_group before wgmma.wait_g"),
        (r"(wgmma\.wait_group\S+ \t?)0;", r"\g<1>3;", "matmuls_are_fenced_.*: 3 groups under way at bar"),
    ],
)
def test_what_ptx_forbids_is_noticed(kernels, old, new, complaint):
    """Doctored everywhere in the text; each is an error by its own name."""
    kernel = kernels["bf16 128 causal"].ptx
    text, count = re.subn(old, new, kernel.text)
    assert count
    found = ptx.complaints(replace(kernel, text=text))
    assert any(re.match(complaint, each) for each in found), found
