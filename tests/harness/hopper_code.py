"""What the compiler made of Hopper's kernels, as the tests of forward and backward read it: machine code, the
loops of each warpgroup, PTX."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pytest

from tilewise.tools.compiled.compiler import Compiled, assembly_file
from tilewise.tools.compiled.machine_code import Instruction, read_sass
from tilewise.tools.compiled.main_loop import loops_by_team

from .variants import compiled_once, shared_folder

LONGER = 1.05  # than it was once, a loop may be


@dataclass(frozen=True)
class HopperCode:
    compiled: Compiled
    code: list[Instruction]
    ptx_text: str

    @cached_property
    def loops(self) -> list[tuple[list[Instruction], list[Instruction]]]:
        """Of each warpgroup, the loops over cut and over full tiles."""
        return [(cut, full) for cut, full in loops_by_team(self.code)]


Code = TypeVar("Code", bound=HopperCode)


def read_kernels(
    kind: type[Code], variants: str, factory: pytest.TempPathFactory, parts: Sequence[dict[str, Any]] = ({},)
) -> dict[str, Code]:
    """The kernels of a function of harness.variants, by variant."""
    folder = shared_folder(factory) / variants.removesuffix("_variants")
    options = dict(parts=parts, assembly=folder, messages=True)
    found = compiled_once(variants, factory, ["sm_90"], **options)["sm_90"]

    def read(each: Compiled) -> Code:
        sass = assembly_file(folder, each.target, each.kernel, each.variant)
        return kind(each, read_sass(sass.read_text()), sass.with_suffix(".ptx").read_text())

    return {each.variant: read(each) for each in found}


def count(code: Sequence[Instruction], *names: str) -> int:
    """Instructions whose opcode, without modifiers, is one of these, and that do something."""
    return sum(each.opcode.split(".")[0] in names and not each.skipped for each in code)


# ---- What a listing must not show, in words; nothing where all is well


def others_than(found: Mapping[str, tuple[int, int]]) -> list[str]:
    """What was seen, where it is not what was meant."""
    return [f"{what}: {seen}, not {meant}" for what, (seen, meant) in found.items() if seen != meant]


def above(limits: Mapping[str, tuple[int, float]]) -> list[str]:
    """What was seen, where it is more than the most."""
    return [f"{what}: {seen}, above {most:g}" for what, (seen, most) in limits.items() if seen > most]


def complaints_of_barriers(
    code: Sequence[Instruction], planned: Collection[tuple[int, int | None]], of_a_buffer: int
) -> list[str]:
    """Named barriers that are not among the planned (number, threads that it counts). Only those of buffers
    are told apart at run time: their number is in a register."""
    found = []
    for each in code:
        if each.opcode.split(".")[0] == "BAR":
            number, *threads = (word.strip() for word in each.operands.split(","))
            counted = int(threads[0], 16) if threads else None
            is_planned = counted == of_a_buffer if number[0] == "R" else (int(number, 16), counted) in planned
            if not is_planned:
                found.append(f"{each.opcode} {each.operands}")
    return found
