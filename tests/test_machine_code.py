"""Machine code from snippets: instructions, jumps, loops, and what each instruction does."""

import pytest

from tilewise.tools.compiled.assembler import Messages, read_messages
from tilewise.tools.compiled.machine_code import Flow, Instruction, read_amd, read_sass
from tilewise.tools.compiled.main_loop import (
    kind_of,
    main_loops,
    matmul_flops,
    operand_bytes,
    overlapped,
    shared_bytes,
)

# A loop over heads with two loops over tiles, in the words of nvdisasm: of the first, the assembler moved
# a wait out of line, to the end, from where it jumps back; the second ends in a jump without a condition.
SASS = """
.text.dkv_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   S2R R3, SR_TID.X ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0030*/              @!P1 BRA `(.L_x_6) ;
.L_x_7:
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R88, R176, gdesc[UR16].tnspB, R88, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   FMUL R6, R5, R5 ;
        /*00b0*/              @!P3 BRA `(.L_x_4) ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00d0*/                   BRA.U UP0, `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
.L_x_6:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R4 ;
        /*0110*/              @!P1 BRA `(.L_x_6) ;
        /*0120*/                   BRA `(.L_x_7) ;
.L_x_8:
"""


def test_sass_is_read_with_its_jumps():
    code = read_sass(SASS)
    assert len(code) == 0x130 // 16
    assert code[0].opcode == "LDC" and code[0].operands == "R1, c[0x0][0x28]"
    jump = Instruction("BRA", "`(.L_x_6)", targets=(0x10,))
    assert code[3] == jump, "conditional: the next instruction may follow"
    assert code[0xC].targets == (8,) and not code[0xC].continues
    assert code[0xD].targets == (1,) and code[0xD].continues, "the condition stands among the operands"
    assert not code[0xE].continues and not code[0xE].targets
    assert [i for i, each in enumerate(code) if each.skipped] == [5]


def test_loops_are_natural_loops():
    head, full, cut, wait = Flow(read_sass(SASS)).loops()
    assert head == [*range(1, 0xE), 0x10, 0x11, 0x12]
    assert full == [2, 3, 4, 5, 6, 0x10, 0x11, 0x12], "what was moved out of line belongs to it"
    assert cut == [8, 9, 0xA, 0xB, 0xC]
    assert wait == [0x10, 0x11]


def test_main_loops_are_the_innermost_that_multiply():
    full, cut = main_loops(read_sass(SASS), warps=8, warp=32)
    assert (full.name, cut.name) == ("full", "cut")
    assert (full.warps, full.teams) == (8, 1)
    assert (full.instructions, cut.instructions) == (8, 5)
    assert (full.matmuls, full.exponentials, full.waits) == (1, 1, 1)
    assert (full.register_matmuls, cut.register_matmuls) == (0, 1)
    assert (cut.matmuls, cut.float32, cut.waits) == (1, 1, 1)
    assert full.shared_loads == 0, "an instruction whose predicate is never true does nothing"
    # Two groups of four warps, each a product of 64 x 128 x 16; the first reads A and B, the second B.
    assert full.matmul_flops == full.tile_flops == 2 * 2 * 64 * 128 * 16
    assert full.shared_bytes == 2 * (64 + 128) * 16 * 2
    assert cut.shared_bytes == 2 * 128 * 16 * 2


# The first warps go on to a loop of their own; the others take theirs from a table, the second entry first in
# the code. A thread keeps what its role's last USETMAXREG leaves it.
ROLES = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100 ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0xf0 ;
.L_x_0:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   USETMAXREG.DEALLOC.CTAPOOL 0x78 ;
        /*0070*/                   BRX R4 -0x80                  (*"BRANCH_TARGETS .L_x_3,.L_x_2,.L_x_5"*);
.L_x_2:
        /*0080*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0090*/                   UTMALDG.4D [UR8], [UR6] ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
.L_x_4:
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*00d0*/                   MUFU.EX2 R5, R5 ;
        /*00e0*/               @P1 BRA `(.L_x_4) ;
        /*00f0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*0100*/                   EXIT ;
"""


def test_roles_are_told_by_the_table_of_a_jump():
    code = read_sass(ROLES)
    assert code[7].targets == (0xB, 8, 0x10) and not code[7].continues
    flow = Flow(code)
    assert [flow.role(place) for place in range(len(code))] == [0] * 8 + [2] * 3 + [1] * 5 + [3]
    assert [flow.registers(place) for place in (0, 2, 3, 7, 9, 0xC)] == [None, 256, 240, 120, 24, 232]


def test_roles_without_a_table_are_told_by_their_registers():
    """Two workers are told apart by a branch; the first one's code comes first."""
    code = read_sass(
        ROLES.replace(
            'BRX R4 -0x80                  (*"BRANCH_TARGETS .L_x_3,.L_x_2,.L_x_5"*)', "@P2 BRA `(.L_x_3)"
        ).replace("/*0070*/                   @P2", "/*0070*/ @P2")
    )
    assert [Flow(code).role(place) for place in range(len(code))][:-1] == [0] * 8 + [1] * 3 + [2] * 5


def test_each_team_has_its_main_loops():
    first, second = main_loops(read_sass(ROLES), 4, 32, tile_flops=7, order=("only",), copied_bytes=5)
    assert (first.name, second.name) == ("only 1", "only 2")
    assert (first.exponentials, second.exponentials) == (0, 1)
    assert first.teams == second.teams == 2 and first.warps == second.warps == 4
    assert first.matmul_flops == 2 * 64 * 128 * 16 and first.tile_flops == 7
    assert first.shared_bytes == (64 + 128) * 16 * 2 + 5


PRODUCT, COMMITTED = ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR20], R24"), ", gsb0"
LATER, EXP = Instruction(PRODUCT[0], PRODUCT[1] + COMMITTED), Instruction("MUFU.EX2")
WAIT = [Instruction("WARPGROUP.DEPBAR.LE", f"gsb0, 0x{left}") for left in (0, 1)]


@pytest.mark.parametrize(
    ("loop", "count"),
    [
        ([LATER, WAIT[0], EXP, EXP, LATER, WAIT[0]], 0),  # every product waited for at once
        ([LATER, LATER, WAIT[1], EXP, EXP, WAIT[0], EXP], 2),  # under the second
        ([LATER, LATER, WAIT[1], WAIT[0], EXP, EXP], 0),  # the wait moved in front of them
        ([LATER, WAIT[1], EXP, WAIT[0], EXP], 1),
        ([EXP, WAIT[0], LATER], 1),  # a product of the step before
        ([Instruction(*PRODUCT), EXP, LATER, WAIT[0]], 0),  # not handed over yet
        ([Instruction("HMMA.16816.F32.BF16", "R4, R8, R2, R4"), EXP], 0),
    ],
)
def test_exponentials_under_a_matmul(loop, count):
    assert overlapped(loop) == count


def test_a_jump_into_the_middle_makes_no_loop():
    code = [
        Instruction("BRA", "", targets=(2,)),
        Instruction("FADD"),
        Instruction("FMUL"),
        Instruction("BRA", "", targets=(1,)),
        Instruction("EXIT", continues=False),
    ]
    assert Flow(code).loops() == [], "2 is entered past 1"
    code[0] = Instruction("NOP")
    assert Flow(code).loops() == [[1, 2, 3]]


def test_a_branch_for_threads_that_have_parted_is_not_taken():
    code = read_sass(
        """
.L_x_0:
        /*0000*/                   MUFU.EX2 R5, R5 ;
        /*0010*/                   BRA.DIV UR4, `(.L_x_1) ;
.L_x_2:
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   BRA `(.L_x_2) ;
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
    assert Flow(code).loops() == [[2, 3, 4, 5, 6, 7]]
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


PTXAS = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to
ptxas warning : Too many maxnreg specified for entry hopper_forward_kernel, will be ignored
ptxas info    : Compiling entry function 'hopper_forward_kernel' for 'sm_90a'
ptxas info    : Function properties for hopper_forward_kernel
    64 bytes stack frame, 112 bytes spill stores, 156 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 64 bytes cumulative stack size
"""


def test_what_the_assembler_says():
    lines = PTXAS.strip().splitlines()
    assert read_messages(PTXAS) == Messages(lines[:2], 112, 156)
    assert read_messages("\n".join(lines[2:])) == Messages([], 112, 156)
    with pytest.raises(RuntimeError, match="ptxas says nothing"):
        read_messages("")
