"""`tilewise inspect`: machine code from snippets, occupancy and bounds by hand, the baseline's judgement,
and the command on one kernel. What the shipped kernels become is in test_compiled.py."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from harness.baseline import Figures, against_baseline, better, load, save, worse
from tilewise.tools.bound import bound, occupancy
from tilewise.tools.chips import find_chip
from tilewise.tools.compiled import Compiled, CompileError, Variant, compile_variants, tile_flops
from tilewise.tools.inspect import check_arguments, inspect_one, variants
from tilewise.tools.machine_code import Instruction, natural_loops, read_amd, read_sass
from tilewise.tools.main_loop import kind_of, main_loops, matmul_flops, operand_bytes, shared_bytes
from tilewise.tools.variants import find_case

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
    (loop,) = main_loops([Instruction("MUFU.EX2"), Instruction("BRA", "0x0", target=0)], 8, 32, tile_flops=0)
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
    found = bound(loop, find_chip("H200"), warps=8, element_bytes=2)
    assert found.matmul == 4 * 128**3 / 4096 == 2048
    assert found.exponentials == 64 * 256 / 16 == 1024
    assert found.issue == 500 * 8 / 4
    assert found.other == (500 - 64 - 16) * 8 / 4
    assert found.shared == 1792
    assert found.limit == "matmul" and found.together == 1
    assert found.apart == 2048 / (2048 + 1024 + 840)
    # Products that are computed twice are no use; an A100 has half the lanes for fp32.
    twice = dataclasses.replace(loop, matmul_flops=2 * loop.matmul_flops, float32=450)
    assert bound(twice, find_chip("H200"), 8, 2).together == 0.5
    assert bound(twice, find_chip("A100"), 8, 2).issue == 450 * 8 / 2
    assert bound(loop, find_chip("H200"), 8, 4).matmul == 2 * 2048, "TF32"


def test_bound_of_ieee_fp32_counts_its_products_once():
    """64 FFMA for a tile's products and 10 other instructions, one of them an exponential."""
    (loop,) = main_loops([Instruction("MUFU.EX2"), Instruction("BRA", "0x0", target=0)], 4, 32, tile_flops=0)
    loop = dataclasses.replace(
        loop,
        instructions=74,
        issued=74,
        float32=70,
        matmul_flops=64 * 256,
        tile_flops=64 * 256,
        exponentials=1,
    )
    found = bound(loop, find_chip("H200"), warps=4, element_bytes=4)
    assert found.matmul == 64 and found.issue == 74 and found.limit == "issue"
    assert found.exponentials == 8 and found.other == 9 and found.shared == 0
    assert found.apart == 64 / (64 + 8 + 9)


def test_flops_of_a_tile_step():
    tile = dict(TILE_Q=64, TILE_KV=32, HEAD_TILE=128, VALUE_TILE=16)
    pairs = 2 * 64 * 32
    assert tile_flops("forward_kernel", tile) == pairs * (128 + 16)
    assert tile_flops("dkv_kernel", tile) == pairs * (2 * 128 + 2 * 16)  # S dK, dV dP
    assert tile_flops("dq_kernel", tile) == pairs * (2 * 128 + 16)  # S dQ, dP
    assert tile_flops("prepare_kernel", {}) is None


OLD = Figures(200, 0, 1024, [500, 700], [16, 16], [66, 66])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(registers=208), None),
        (dict(registers=209), "registers 200 -> 209"),
        (dict(spill_bytes=8), "spill_bytes 0 -> 8"),
        (dict(shared_bytes=1025), "shared_bytes 1024 -> 1025"),
        (dict(instructions=[550, 770]), None),
        (dict(instructions=[551, 700]), "instructions [500, 700] -> [551, 700]"),
        (dict(instructions=[500]), "instructions [500, 700] -> [500]"),
        (dict(matmuls=[16, 8]), "matmuls [16, 16] -> [16, 8]"),
        (dict(exponentials=[65, 66]), "exponentials [66, 66] -> [65, 66]"),
        (dict(registers=100, shared_bytes=512, instructions=[400, 600]), None),
    ],
)
def test_what_is_worse_than_the_baseline(change, complaint):
    assert worse(OLD, dataclasses.replace(OLD, **change)) == ([] if complaint is None else [complaint])


def test_what_is_better_than_the_baseline():
    assert better(OLD, OLD) == []
    new = dataclasses.replace(OLD, registers=199, instructions=[400, 600])
    assert better(OLD, new) == ["registers 200 -> 199", "instructions [500, 700] -> [400, 600]"]


def some_kernel(**change) -> Compiled:
    loops = main_loops(read_sass(SASS), warps=8, warp=32)
    tile = dict(TILE_Q=64, TILE_KV=128, HEAD_TILE=64, VALUE_TILE=64)
    kernel = Compiled(
        "bf16 64 causal", "dkv_kernel", "sm_90", "bfloat16", tile, 8, 2, 200, 0, 1024, 0, {}, {}, loops
    )
    return dataclasses.replace(kernel, **change)


def test_baseline_file(tmp_path, monkeypatch):
    """Written and read back; what is worse fails, what is better warns, another Triton is skipped."""
    file = tmp_path / "inspect.json"
    monkeypatch.setattr("harness.baseline.load", lambda: load(file))
    name, figures = "sm_90 dkv bf16 64 causal", Figures(200, 0, 1024, [8, 5], [1, 1], [1, 0])
    monkeypatch.setattr("triton.__version__", "3.9.0")
    save({"3.9.0": {name: figures}, "3.6.0": {}}, file)
    assert load(file) == {"3.6.0": {}, "3.9.0": {name: figures}}
    against_baseline([some_kernel()])
    with pytest.raises(pytest.fail.Exception, match=f"{name}: registers 200 -> 220") as failure:
        against_baseline([some_kernel(registers=220)])
    assert "python -m harness.baseline" in str(failure.value)
    with pytest.raises(pytest.fail.Exception, match=r"not in inspect\.json"):
        against_baseline([some_kernel(variant="bf16 64 full")])
    with pytest.warns(UserWarning, match="registers 200 -> 190"):
        against_baseline([some_kernel(registers=190)])
    monkeypatch.setattr("triton.__version__", "9.9.9")
    with pytest.raises(pytest.skip.Exception, match=r"no figures of Triton 9\.9\.9"):
        against_baseline([some_kernel(registers=220)])


def test_targets_without_a_datasheet_have_counts_and_no_limits():
    found = inspect_one(some_kernel(target="sm_103"))
    assert found.chip is None and found.occupancy is None
    assert [loop.bound for loop in found.loops] == [None, None]
    assert [loop.counts.matmuls for loop in found.loops] == [1, 1]


DEFAULTS = dict(archs=["sm_90"], dtypes=["bf16"], dims=[64], masks=["full"], kernels=["forward"], cases=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(archs=["sm_33"]), "arch='sm_33' must be one of sm_75, sm_80"),
        (dict(dtypes=["fp8"]), "dtype='fp8' must be one of fp16, bf16, fp32"),
        (dict(masks=["window"]), "mask='window' must be one of causal, full"),
        (dict(kernels=["decode"]), "kernel='decode' must be one of forward, dkv, dq, prepare, parameter"),
        (dict(dims=[257]), "dim=257 must be from 1 to 256"),
        (dict(cases=["llama3-8b"]), "case='llama3-8b' is not a named case; there are for example llama3-8b-"),
        (dict(kernels=[]), "nothing to inspect"),
    ],
)
def test_wrong_names_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(**DEFAULTS | change)


def test_what_is_compiled():
    """Names that say which call; every named case is ready to launch, and nothing is launched here."""
    arguments = check_arguments(**DEFAULTS | dict(dims=[64, 128], kernels=["forward", "dkv", "parameter"]))
    found = variants(**arguments)
    walks = ["bias", "bias of keys", "bias of rows", "position table"]
    names = ["bf16 64 full"] * 2 + [f"bf16 64 full {walk}" for walk in walks]
    assert [each.name for each in found] == names + [name.replace("64", "128") for name in names]
    assert [each.kernels for each in found[:3]] == [None, ("dkv_kernel",), ("parameter_kernel",)]
    case = variants(**check_arguments(**DEFAULTS | dict(cases=["swinv2-b-window16", "short-d64-64"])))
    assert [each.name for each in case] == ["swinv2-b-window16", "short-d64-64"]
    assert find_case("feature-softcap").features["softcap"] == 50


def failing_variants() -> list[Variant]:
    def fails() -> None:
        raise ValueError("no such thing")

    return [Variant("wrong", fails), Variant("idle", lambda: None)]


def test_failures_are_named_with_target_and_variant():
    with pytest.raises(CompileError) as failure:
        compile_variants(f"{__name__}:failing_variants", ["sm_90"])
    assert str(failure.value) == (
        "sm_90, wrong: ValueError: no such thing\n\nsm_90, idle: RuntimeError: it launched no kernel"
    )


def test_the_command_on_one_kernel():
    """As a user types it, in a process that runs kernels in the interpreter: the child does not."""
    arguments = ["--arch", "sm_90", "--dim", "128", "--mask", "causal", "--kernel", "forward", "--json", "-"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tilewise", "inspect", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    names = ("kernel", "variant", "target", "chip")
    assert [found[name] for name in names] == ["forward", "bf16 128 causal", "sm_90", "H200"]
    assert found["compiled"]["spill_bytes"] == 0 and found["occupancy"]["programs"] == 1
    full, cut = found["loops"]
    assert full["counts"]["name"] == "full" and full["counts"]["matmuls"] == cut["counts"]["matmuls"] == 16
    assert 0 < full["bound"]["apart"] < full["bound"]["together"] <= 1
