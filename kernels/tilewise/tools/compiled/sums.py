"""In which steps does a kernel sum the products of two rows? Read from NVIDIA's machine code.

The backward computes P again from S = Q Kᵀ, and P is the forward's only if S is: if both sum along head_dim
in as many steps, in one chain that starts from zero. A listing shows the chains. It does not show which part
of head_dim a step takes, nor how an instruction adds up its own products.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .machine_code import Instruction
from .main_loop import kind_of

_FMA = re.compile(r"FFMA2?(\.|$)")
_REGISTER = re.compile(r"U?R\d+")


def sums(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many sums of products start from zero, by how many of which instructions make one: {"8 HGMMA": 2}.
    Those of O, dQ, dK and dV, which go on from tile to tile, are not among them: they start elsewhere, or
    with P or dS in tensor memory."""
    steps: list[int] = []
    names: list[str] = []
    held: dict[str, int] = {}  # the number of a sum that is under way, by its register
    for each in instructions:
        read = set(_REGISTER.findall(each.operands))
        if kind_of(each.opcode) != "matmul" and not _FMA.match(each.opcode):
            if each.opcode.startswith("UTCBAR"):  # Blackwell's products are complete when a barrier says so
                held.clear()
            for register in read:  # read, the sum is complete; overwritten, it is gone
                held.pop(register, None)
            continue
        result, addend, factors = _registers(each)
        number = held.pop(addend, None)
        for register in (result, *factors):
            held.pop(register, None)
        if addend == "RZ" and not each.operands.startswith("tmem"):
            number = len(steps)
            steps.append(0)
            names.append(each.opcode.split(".")[0])
        if number is not None:
            steps[number] += 1
            held[result] = number
    return dict(Counter(f"{count} {name}" for count, name in zip(steps, names, strict=True)))


def _registers(instruction: Instruction) -> tuple[str, str, list[str]]:
    """Those of D, C, and A and B of D = A B + C. C is RZ where the sum starts: there, or where !UPT says so.

    FFMA R24, R24, R32, RZ                           HMMA.16816.F32 R80, R72.reuse, R82, R132
    HGMMA.64x128x16.F32 R24, gdesc[UR20], RZ, !UPT   HGMMA.64x128x16.F32 R24, gdesc[UR20], R24, gsb0
    UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR34], tmem[UR14], idesc[UR15], !UPT   (D is tmem[UR34], and C)
    """
    operands = [operand.strip().removesuffix(".reuse") for operand in instruction.operands.split(",")]
    if instruction.opcode.startswith("UTC"):
        *factors, result = operands[:3]
        addend = result
    else:
        result, *factors, addend = [each for each in operands if each not in ("gsb0", "!UPT", "UPT")]
    starts = addend.startswith("RZ") or "!UPT" in operands
    names = [_REGISTER.findall(operand) for operand in (result, addend, " ".join(factors))]
    return names[0][0], "RZ" if starts else (names[1] or [addend])[0], names[2]
