"""Does the backward sum S as the forward does? Its P is the forward's only then; read from machine code.

Both are one sum along head_dim, from zero, with the same products in each step. What no listing shows: which
step takes which products, and whether two instructions, or one with its operands exchanged, round alike.
"""

import re

import pytest

from harness.variants import shipped
from tilewise.parts.pieces import pieces_of
from tilewise.tools.compiled.compiler import MATMUL, TARGETS, Compiled
from tilewise.tools.compiled.machine_code import Instruction, read_sass
from tilewise.tools.compiled.sums import sums

LISTS = ("main_variants", "backward_variants", "pieces_variants")
NVIDIA = [target for target in TARGETS if target.startswith("sm")]
STEP = {"bfloat16": 16, "float16": 16, "float32": 1}  # products of an instruction; 8 in tf32


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, list[Compiled]]:
    """By target: rows of the table, forward and backward, and the tiles that short queries get."""
    compiled = [shipped(variants, tmp_path_factory) for variants in LISTS]
    return {
        target: [each for found in compiled for each in found[target] if each.kernel != "prepare_kernel"]
        for target in NVIDIA
    }


@pytest.fixture(scope="module")
def tf32_kernels(tmp_path_factory) -> dict[str, list[Compiled]]:
    return shipped("tf32_variants", tmp_path_factory)


OWN_KEYS = ("dkv_kernel", "dk_kernel", "dv_kernel", "dqkv_kernel")
ONE_SUM = ("forward_kernel", "dv_kernel")  # S alone


def instruction(kernel: Compiled) -> str:
    """That for S: the chip's own from 64 rows on (of keys in dkv and dqkv, which compute S transposed)."""
    if kernel.dtype == "float32":
        return "FFMA"
    rows = kernel.tile["TILE_KV" if kernel.kernel in OWN_KEYS else "TILE_Q"]
    return MATMUL[kernel.target] if rows >= 64 else "HMMA"


def steps(kernel: Compiled, columns: int) -> int:
    """How many a listing shows of a sum along so many columns. Two pieces are one sum; but in Blackwell's
    tensor memory a barrier stands before the second, which goes on where the first has ended."""
    shown = pieces_of(columns)[0] if instruction(kernel) == MATMUL["sm_100"] else columns
    return shown // STEP[kernel.dtype]


@pytest.mark.parametrize("target", NVIDIA)
def test_every_kernel_sums_in_as_many_steps(kernels, target):
    """Where head_dim and value_dim are the same, dP, the other sum from zero, looks like S."""
    found = [each for each in kernels[target] if "tf32" not in each.variant]
    everywhere = {"forward_kernel", "dq_kernel", "dkv_kernel", "dqkv_kernel"}
    assert {each.kernel for each in found} >= ({*everywhere, *OWN_KEYS} if target == "sm_90" else everywhere)
    for each in found:
        columns = ["HEAD_TILE"] if each.kernel in ONE_SUM else ["HEAD_TILE", "VALUE_TILE"]
        counts = {steps(each, each.tile[name]) for name in columns}
        wanted = {f"{count} {instruction(each)}" for count in counts}
        if each.kernel == "dqkv_kernel":  # whose share of dQ is a sum from zero too, along the keys
            of_share = f"{each.tile['TILE_KV'] // STEP[each.dtype]} "
            assert wanted <= set(each.sums), each
            assert all(sums.startswith(of_share) for sums in set(each.sums) - wanted), each
            continue
        assert set(each.sums) == wanted, each


def test_tf32_too(kernels, tf32_kernels):
    found = [each for target in NVIDIA for each in (*kernels[target], *tf32_kernels[target])]
    found = [each for each in found if "tf32" in each.variant]
    assert {each.kernel for each in found} == {"forward_kernel", "dq_kernel", "dkv_kernel"}
    for each in found:
        assert set(each.sums) == {f"{each.tile['HEAD_TILE'] // 8} HMMA"}, each


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_instruction_of_16_bits_takes_16_products(kernels, target):
    """As the opcodes say: 16x8x16, 64xNx16. Blackwell's have their shape in a register, but as many steps."""
    opcodes = {opcode for each in kernels[target] if each.dtype != "float32" for opcode in each.matmuls}
    assert opcodes and all(re.match(r"HMMA\.16816\.|HGMMA\.64x\d+x16\.", opcode) for opcode in opcodes)


# ---- The reading of a listing


def code(text: str) -> list[Instruction]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return read_sass("\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)))


def test_a_sum_moves_from_register_to_register():
    """Two of two steps each, and one that goes on from before."""
    found = code(
        """
        HMMA.16816.F32.BF16 R132, R76.reuse, R80, RZ
        HMMA.16816.F32.BF16 R128, R76, R84, RZ
        HMMA.16816.F32.BF16 R80, R72.reuse, R82, R132
        HMMA.16816.F32.BF16 R84, R72, R86, R128
        HMMA.16816.F32.BF16 R40, R80, R120, R40
        """
    )
    assert sums(found) == {"2 HMMA": 2}


def test_a_sum_ends_where_it_is_read_or_overwritten():
    found = code(
        """
        FFMA R12, R24, R28, RZ
        FFMA R12, R25, R29, R12
        FMUL R13, R12, R20
        FFMA R14, R15, R16, R12
        FFMA R30, R24, R28, RZ
        LDS.64 R30, [R2]
        FFMA R31, R15, R16, R30
        """
    )
    assert sums(found) == {"2 FFMA": 1, "1 FFMA": 1}


def test_sums_of_warpgroups():
    found = code(
        """
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
        HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0
        """
    )
    assert sums(found) == {"3 HGMMA": 1}


def test_sums_in_tensor_memory():
    """The barrier ends the first; the second is of P or dS, from zero in the first tile."""
    found = code(
        """
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR34], tmem[UR14], idesc[UR15], !UPT
        UTCHMMA gdesc[UR8], gdesc[UR18], tmem[UR34], tmem[UR14], idesc[UR15], UPT
        UTCBAR [UR5], URZ
        UTCHMMA tmem[UR9], gdesc[UR8], tmem[UR34], tmem[UR4], idesc[UR5], UPT
        UTCHMMA tmem[UR9], gdesc[UR8], tmem[UR36], tmem[UR4], idesc[UR5], !UPT
        """
    )
    assert sums(found) == {"2 UTCHMMA": 1}
