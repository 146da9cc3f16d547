"""How does an inspection read? Tables for a terminal, and a legend in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..chips import chip_of_target
from ..compiled.compiler import FP8
from .inspect import Inspection

WIDTH = 116  # of the widest table
RESOURCES = {
    "tile": "rows of queries x keys that a program works on at a time",
    "warps": "groups of threads that share a program's tile",
    "stages": "steps over a tile whose loads are in flight at once",
    "registers": "of a thread; what does not fit is spilled. Hopper's two: of a consumer, of the producer "
    "and of the reducer, which adds dQ to memory",
    "spill": "bytes of a thread that travel to memory and back for want of registers; should be 0",
    "shared": "memory on the chip that a program's threads share: tiles on their way to the tensor cores",
    "programs": "that run at once on a multiprocessor, and what keeps out the next one",
}
COUNTS = {
    "loop": "full: over tiles in which every pair counts; cut: over tiles that a mask cuts, masking "
    "included; the number says which warpgroup's loop it is",
    "instr": "instructions of a thread for a step over one tile, of which the next columns are a part",
    "matmul": "matrix products on tensor cores (Hopper: by four warps together; Blackwell: by one thread for "
    "all); none in fp32 unless TF32 is allowed",
    "reg": "of these, on Hopper, those whose left operand is in registers",
    "exp": "exponentials",
    "under": "of these, on Hopper, those that run while matmuls of the same warps are under way",
    "fp32": "additions, multiplications, comparisons and selections of fp32",
    "loads, stores": "of shared memory, copies from global memory into it included",
    "waits": "barriers, and waits for matmuls and copies",
}
CLOCKS = {
    "clocks": "that a step keeps a multiprocessor's tensor cores (matmul), special function units (exp), "
    "issue slots (issue) and the port of its shared memory (shared) busy, by the datasheet; Hopper's two: a "
    "step of every warpgroup",
    "busiest": "the one of the four that takes longest",
    "apart": "share of the chip's matmul rate (fp32: of its fp32 rate) that is left if matmuls, exponentials "
    "and the other instructions take turns",
    "together": "the same if all of them run at once. No kernel gets beyond it; one whose softmax waits for "
    'its matmuls, as in plain Triton, comes out nearer to "apart"',
}
HONESTY = "Estimates from machine code and datasheets: no kernel ran, and nothing was timed."


def print_inspections(console: Console, inspections: Sequence[Inspection]) -> None:
    """Three tables a target, resources, counts and clocks, and what their columns mean."""
    for target in dict.fromkeys(each.target for each in inspections):
        of_target = [each for each in inspections if each.target == target]
        looping = [each for each in of_target if each.loops]
        first = of_target[0]
        versions = f"Triton {first.triton}, tilewise {first.tilewise}"
        console.print(f"{target}, compiled by {versions}", style="bold", markup=False)
        console.print(resources(of_target))
        for warning in warnings(of_target):
            console.print(warning, style="bold red", markup=False)
        if looping:
            console.print(counts(looping))
        if first.chip is None:
            console.print(f"no datasheet of a chip with {target} is listed, so no limits are stated")
        elif looping:
            console.print(headline(target, any(each.compiled.dtype == FP8 for each in looping)))
            console.print(clocks(looping))
    console.print(legend(RESOURCES | COUNTS | CLOCKS))
    console.print(HONESTY, markup=False)


def legend(words: dict[str, str]) -> Table:
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column()
    for term, meaning in words.items():
        made.add_row(Text(term, style="bold"), Text(meaning, style="dim"))
    return made


def headline(target: str, has_fp8: bool) -> str:
    """What the limits are stated by."""
    chip = chip_of_target(target)
    of_fp8 = f"{chip.matmul_flops_of(1)} of fp8, " if has_fp8 else ""
    return (
        f"a clock and multiprocessor of the {chip.name}: {chip.matmul_flops} FLOP of fp16 and bf16 matmul, "
        f"{of_fp8}"
        f"{chip.exponentials} exponentials, {chip.shared_bytes_a_clock} bytes of shared memory"
    )


def table(*columns: str) -> Table:
    """A table whose first two columns are words, the others numbers."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    return made


def resources(inspections: Sequence[Inspection]) -> Table:
    made = table(
        "kernel", "call", "tile", "warps", "stages", "registers", "spill", "shared", "programs", "limited by"
    )
    for each in inspections:
        compiled, runs = each.compiled, each.occupancy
        sizes = [compiled.tile[name] for name in ("TILE_Q", "TILE_KV") if name in compiled.tile]
        made.add_row(
            each.kernel,
            each.variant,
            " x ".join(map(str, sizes)),
            str(compiled.warps),
            str(compiled.stages),
            "/".join(map(str, compiled.role_registers.values())) or str(compiled.registers),
            Text(str(compiled.spill_bytes), style="bold red" if compiled.spill_bytes else ""),
            f"{compiled.shared_bytes / 1024:.0f} KiB",
            str(runs.programs) if runs else "",
            runs.limit if runs else "",
        )
    return made


def warnings(inspections: Sequence[Inspection]) -> list[str]:
    """What the assembler warns of."""
    return [
        f"{each.kernel} {each.variant}: {warning}"
        for each in inspections
        if each.compiled.assembler is not None
        for warning in each.compiled.assembler.warnings
    ]


def counts(inspections: Sequence[Inspection]) -> Table:
    made = table(
        "kernel", "call", "loop", "instr", "matmul", "reg", "exp", "under", "fp32", "loads", "stores", "waits"
    )
    for each in inspections:
        for loop in (found.counts for found in each.loops):
            numbers = (
                loop.instructions,
                loop.matmuls,
                loop.register_matmuls,
                loop.exponentials,
                loop.overlapped,
                loop.float32,
                loop.shared_loads,
                loop.shared_stores,
                loop.waits,
            )
            made.add_row(each.kernel, each.variant, loop.name, *map(str, numbers))
    return made


def clocks(inspections: Sequence[Inspection]) -> Table:
    made = table("kernel", "call", "loop", "matmul", "exp", "issue", "shared", "busiest", "apart", "together")
    for each in inspections:
        for loop in each.loops:
            limits = loop.bound
            if limits is not None:
                busy = (limits.matmul, limits.exponentials, limits.issue, limits.shared)
                shares = (f"{limits.apart:.0%}", f"{limits.together:.0%}")
                numbers = [f"{clocks:.0f}" for clocks in busy]
                made.add_row(each.kernel, each.variant, loop.counts.name, *numbers, limits.limit, *shares)
    return made
