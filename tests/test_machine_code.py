"""Machine code from snippets: instructions, jumps, loops, and what each instruction does."""

import pytest

from tilewise.tools.machine_code import Instruction, natural_loops, read_amd, read_sass
from tilewise.tools.main_loop import kind_of, main_loops, matmul_flops, operand_bytes, shared_bytes

# A loop over heads with two loops over tiles, in the words of cuobjdump: of the first, the assembler moved
# a wait out of line, to 0x0100, from where it jumps back; the second ends in a jump without a condition.
SASS = """
        code for sm_90
                Function : dkv_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*0010*/                   S2R R3, SR_TID.X ;                              /* 0x0000000000037919 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0030*/              @!P1 BRA 0x100 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/               @P2 BRA 0xd0 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R88, R176, gdesc[UR16].tnspB, R88, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   FMUL R6, R5, R5 ;
        /*00b0*/              @!P3 BRA 0xd0 ;
        /*00c0*/                   BRA 0x80 ;
        /*00d0*/                   BRA.U UP0, 0x10 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R4 ;
        /*0110*/              @!P1 BRA 0x100 ;
        /*0120*/                   BRA 0x40 ;
"""


def test_sass_is_read_with_its_jumps():
    code = read_sass(SASS)
    assert len(code) == 0x130 // 16
    assert code[0].opcode == "LDC" and code[0].operands == "R1, c[0x0][0x28]"
    jump = Instruction("BRA", "0x100", target=0x10)
    assert code[3] == jump, "conditional: the next instruction may follow"
    assert code[0xC].target == 8 and not code[0xC].continues
    assert code[0xD].target == 1 and code[0xD].continues, "the condition stands among the operands"
    assert not code[0xE].continues and code[0xE].target is None
    assert [i for i, each in enumerate(code) if each.skipped] == [5]


def test_loops_are_natural_loops():
    head, full, cut, wait = natural_loops(read_sass(SASS))
    assert head == [*range(1, 0xE), 0x10, 0x11, 0x12]
    assert full == [2, 3, 4, 5, 6, 0x10, 0x11, 0x12], "what was moved out of line belongs to it"
    assert cut == [8, 9, 0xA, 0xB, 0xC]
    assert wait == [0x10, 0x11]


def test_main_loops_are_the_innermost_that_multiply():
    full, cut = main_loops(read_sass(SASS), warps=8, warp=32)
    assert (full.name, cut.name) == ("full", "cut")
    assert (full.instructions, cut.instructions) == (8, 5)
    assert (full.matmuls, full.exponentials, full.waits) == (1, 1, 1)
    assert (cut.matmuls, cut.float32, cut.waits) == (1, 1, 1)
    assert full.shared_loads == 0, "an instruction whose predicate is never true does nothing"
    # Two groups of four warps, each a product of 64 x 128 x 16; the first reads A and B, the second B.
    assert full.matmul_flops == full.tile_flops == 2 * 2 * 64 * 128 * 16
    assert full.shared_bytes == 2 * (64 + 128) * 16 * 2
    assert cut.shared_bytes == 2 * 128 * 16 * 2


def test_a_jump_into_the_middle_makes_no_loop():
    code = [
        Instruction("BRA", "", target=2),
        Instruction("FADD"),
        Instruction("FMUL"),
        Instruction("BRA", "", target=1),
        Instruction("EXIT", continues=False),
    ]
    assert natural_loops(code) == [], "2 is entered past 1"
    code[0] = Instruction("NOP")
    assert natural_loops(code) == [[1, 2, 3]]


def test_a_branch_for_threads_that_have_parted_is_not_taken():
    code = read_sass(
        """
        /*0000*/                   MUFU.EX2 R5, R5 ;
        /*0010*/                   BRA.DIV UR4, 0x40 ;
        /*0020*/               @P0 BRA 0x0 ;
        /*0030*/                   EXIT ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   BRA 0x20 ;
        """
    )
    (loop,) = main_loops(code, warps=4, warp=32)
    assert (loop.name, loop.instructions, loop.exponentials) == ("1", 3, 1)


AMD = """
forward_kernel:                         ; @forward_kernel
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	s_cbranch_execz .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	ds_read2_b64 v[4:7], v3 offset1:4
	v_mfma_f32_32x32x8_bf16 v[8:23], v[4:5], v[6:7], v[8:23]
	v_exp_f32_e32 v8, v8
	v_pk_mul_f32 v[10:11], v[8:9], v[10:11]
	s_waitcnt lgkmcnt(0)
	s_cbranch_vccnz .LBB0_2
; %bb.3:
.LBB0_4:
	s_endpgm
	.section	.rodata,"a",@progbits
"""


def test_amds_assembly_is_read():
    code = read_amd(AMD)
    assert natural_loops(code) == [[2, 3, 4, 5, 6, 7]]
    (loop,) = main_loops(code, warps=4, warp=64)
    assert (loop.instructions, loop.issued, loop.matmuls, loop.exponentials) == (6, 3, 1, 1)
    assert (loop.float32, loop.shared_loads, loop.waits) == (1, 1, 1)
    assert loop.matmul_flops == 4 * 2 * 32 * 32 * 8
    assert loop.shared_bytes == 4 * 64 * 16


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", (2 * 64 * 128 * 16, 4)),
        ("HGMMA.64x32x8.F32.TF32", (2 * 64 * 32 * 8, 4)),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", (2 * 64 * 64 * 32, 4)),
        ("HMMA.16816.F32.BF16", (2 * 16 * 8 * 16, 1)),
        ("HMMA.1688.F32.TF32", (2 * 16 * 8 * 8, 1)),
        ("v_mfma_f32_32x32x8_bf16", (2 * 32 * 32 * 8, 1)),
        ("v_mfma_f32_16x16x16_bf16", (2 * 16 * 16 * 16, 1)),
        ("v_mfma_f32_4x4x4_16b_f16", (2 * 4 * 4 * 4 * 16, 1)),
        ("UTCHMMA", None),
    ],
)
def test_opcodes_spell_the_shape_of_a_product(opcode, flops):
    assert kind_of(opcode) == "matmul"
    assert matmul_flops(opcode) == flops


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HFMA2.MMA", ""),
        ("MUFU.EX2", "exponential"),
        ("MUFU.RCP", "special"),
        ("v_exp_f32_e32", "exponential"),
        ("v_log_f32_e32", "special"),
        ("FFMA.FTZ", "float32"),
        ("FMNMX3", "float32"),
        ("F2FP.BF16.F32.PACK_AB", ""),
        ("v_cndmask_b32_e64", "float32"),
        ("v_cmp_gt_f32_e32", "float32"),
        ("v_cvt_f32_u32_e32", ""),
        ("LDS.128", "shared load"),
        ("LDG.E.128", ""),
        ("LDGSTS.E.BYPASS.128", "shared store"),
        ("LDGDEPBAR", ""),
        ("STL.64", "spill"),
        ("scratch_load_dword", "spill"),
        ("BAR.SYNC.DEFER_BLOCKING", "wait"),
        ("WARPGROUP.DEPBAR.LE", "wait"),
        ("WARPGROUP.ARRIVE", ""),
        ("s_barrier", "wait"),
    ],
)
def test_kinds_of_instructions(opcode, kind):
    assert kind_of(opcode) == kind


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDS", 4),
        ("LDS.U8", 1),
        ("LDS.128", 16),
        ("STS.64", 8),
        ("STS.U16", 2),
        ("LDSM.16.M88", 4),
        ("LDSM.16.MT88.4", 16),
        ("STSM.16.M88.2", 8),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDG.E.128", 0),
        ("ds_read_u16", 2),
        ("ds_read_u8_d16_hi", 1),
        ("ds_write_b128", 16),
        ("ds_read2st64_b64", 16),
        ("ds_bpermute_b32", 4),
    ],
)
def test_bytes_that_a_thread_moves_through_shared_memory(opcode, size):
    assert shared_bytes(opcode) == size


def test_operands_of_tf32_are_as_wide_as_those_of_bf16():
    assert operand_bytes(Instruction("HGMMA.64x32x8.F32.TF32", "R8, gdesc[UR4], R8")) == 96 * 8 * 4
    assert operand_bytes(Instruction("HMMA.16816.F32", "R8, R4, R2, R8")) == 0
