"""Turns in machine code: no addition to dQ before the wait for its turn, none behind its end."""

import re

import pytest

from harness.variants import oldest
from tilewise.tools.compiled.compiler import assembly_file

ASKS, MEETS, FENCES, PASSES, ADDS = "ask", "meet", "fence", "pass", "add"
EVENTS = {  # what an instruction is to the order, by its opcode
    r"LDG\.E\.STRONG\.GPU|ATOMG\.E\.ADD\.STRONG\.GPU": ASKS,
    r"BAR\.SYNC": MEETS,
    r"MEMBAR\.(ALL|SC)\.GPU": FENCES,
    r"REDG?\.E\.ADD\.STRONG\.GPU": PASSES,
    r"REDG?\.E\.ADD\.F32": ADDS,
}


def events(text: str) -> list[str]:
    """Those of a listing, in its order."""
    found = []
    for line in text.splitlines():
        for pattern, event in EVENTS.items():
            if re.search(rf"(^|\s){pattern}", line):
                found.append(event)
    return found


@pytest.mark.oldest
@pytest.mark.parametrize("target, numbers", [("sm_80", 1), ("sm_90", 4)])
def test_additions_stand_between_a_turn_and_its_end(target, numbers, tmp_path_factory):
    """A wait is an answer and a meeting of all threads. The end of a turn is a meeting, a fence, and the
    counter; numbers: how many of fp32 an addition takes to memory at once."""
    _, folder = oldest(tmp_path_factory)
    text = assembly_file(folder, target, "dqkv_kernel", "bf16 64 causal").read_text()
    found = events(text)
    assert found.count(PASSES) == 3 and found.count(ADDS) and found.count(ASKS) >= 5
    wide = re.findall(r"REDG?\.E\.ADD\.F32(?:x(\d))?\.", text)
    assert {int(each or 1) for each in wide} == {numbers}
    for place, event in enumerate(found):
        before = found[:place][::-1]
        if event == ADDS and before[0] != ADDS:
            since = before[: before.index(ASKS)]
            assert MEETS in since and PASSES not in since, "an addition before its turn"
        if event == PASSES:
            assert before[0] == FENCES, "a counter without a fence"
            since = before[: before.index(ADDS)] if ADDS in before else before
            assert MEETS in since, "a counter before all threads have added"


def test_a_listing_in_the_wrong_order_is_seen():
    line = "        /*0000*/  @P0 {} R1, [R2.64] ;"
    opcodes = ("ATOMG.E.ADD.STRONG.GPU", "BAR.SYNC.DEFER_BLOCKING", "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU",
               "MEMBAR.ALL.GPU", "RED.E.ADD.STRONG.GPU", "LDG.E.128", "MEMBAR.ALL.CTA")  # fmt: skip
    listing = "\n".join(line.format(opcode) for opcode in opcodes)
    assert events(listing) == [ASKS, MEETS, ADDS, FENCES, PASSES]
