"""Registers of matmuls in flight: what counts as touching them, in code as the disassembler prints it."""

from __future__ import annotations

import pytest

from tilewise.tools.compiled.in_flight import touched_in_flight
from tilewise.tools.compiled.machine_code import Instruction

LOOP = """
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR52], RZ, !UPT
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR48], R24, gsb0
HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR20].tnspB, R88
HGMMA.64x64x16.F32.BF16 R88, R156, gdesc[UR20].tnspB, R88, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
FMNMX R2, R24, R25, !PT
FFMA R24, R24, R3, -R2
MUFU.EX2 R25, R24
WARPGROUP.DEPBAR.LE gsb0, 0x0
F2FP.BF16.F32.PACK_AB R152, R25, R24
FMUL R88, R88, R4
BRA 0x5040
"""


def parse(text: str) -> list[Instruction]:
    return [Instruction(*line.split(" ", 1)) for line in text.strip().splitlines()]


def test_a_loop_that_keeps_away():
    assert touched_in_flight(parse(LOOP)) == []


@pytest.mark.parametrize(
    "after, inserted, words",
    [
        ("R24, gsb0", "FADD R5, R40, R6", "reads R40"),  # S before its wait
        ("0x1", "FMUL R90, R7, R8", "writes R90"),  # O before its wait
        ("0x1", "F2FP.BF16.F32.PACK_AB R153, R25, R24", "writes R153"),  # P of the next step
        ("0x1", "LDS.128 R149, [R9]", "writes R152"),  # the last of four registers
        ("0x1", "IMAD.WIDE R87, R9, 0x4, R10", "writes R88"),
        ("0x1", "STG.E desc[UR4][R6.64], R119", "reads R119"),
        ("tnspB, R88\n", "MOV R155, R1", "writes R155"),  # of a group that has not ended
    ],
)
def test_what_touches_them(after, inserted, words):
    at = LOOP.index(after) + len(after.rstrip("\n"))
    found = touched_in_flight(parse(f"{LOOP[:at]}\n{inserted}{LOOP[at:]}"))
    assert len(found) == 1 and found[0].startswith(inserted) and words in found[0]


@pytest.mark.parametrize(
    "harmless",
    [
        "FMUL R23, R120, R121",
        "SHF.R.U64 R23, R3, 0x4, R5",  # one register, in spite of its name
        "FADD R5, R152, R6",
        "ISETP.GE.AND P0, PT, R3, R4, PT",
    ],
)
def test_what_does_not(harmless):
    """Neighbours; a read of what the matmul reads too; a predicate as the target."""
    at = LOOP.index("0x1") + 3
    assert touched_in_flight(parse(f"{LOOP[:at]}\n{harmless}{LOOP[at:]}")) == []


def test_a_loop_that_never_waits():
    endless = LOOP.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0\n", "")
    assert "the loop ends, and a matmul is still in flight" in touched_in_flight(parse(endless))
