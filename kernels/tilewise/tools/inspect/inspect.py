"""What do the shipped kernels look like to a GPU? Each compiled ahead of time, counted, and bounded.

No GPU is needed and none is asked. `inspect_kernels` compiles in child processes, one a target, so it works
from a process that runs kernels in Triton's interpreter too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from tilewise_reference.cases import find_case

from ...plan.rules.tensors import MAX_VALUE_DIM
from ...version import __version__
from ..chips import Chip, chip_of_target
from ..compiled.bound import Bound, Occupancy, bound, occupancy
from ..compiled.compiler import FP8, Compiled, compile_variants, gpu_target
from ..compiled.main_loop import MainLoop
from ..compiled.variants import (
    DTYPES,
    KERNELS,
    MASKS,
    case_variants,
    plain_variants,
    why_not_fp8,
    why_not_hopper,
)

SOURCE = f"{__name__}:variants"
DIMS = (64, 128, 256)
ALL_KERNELS = (*KERNELS, "prepare", "parameter")
HOPPERS = ("hopper", "hopper_backward")


@dataclass(frozen=True)
class InspectedLoop:
    """A main loop: what a step does, and the limits that follow on the chip; no limits where the target's
    datasheet is not in `chips.CHIPS`."""

    counts: MainLoop
    bound: Bound | None


@dataclass(frozen=True)
class Inspection:
    """One kernel, compiled for one target."""

    kernel: str  # of ALL_KERNELS
    variant: str  # "bf16 128 causal", or a case's name
    target: str
    chip: str | None  # by whose datasheet the limits are stated
    triton: str  # versions
    tilewise: str
    compiled: Compiled
    occupancy: Occupancy | None
    loops: tuple[InspectedLoop, ...]


def inspect_kernels(
    archs: Sequence[str] = ("sm_90",),
    dtypes: Sequence[str] = ("bf16",),
    dims: Sequence[int] = DIMS,
    masks: Sequence[str] = ("causal", "full"),
    kernels: Sequence[str] | None = None,
    cases: Sequence[str] = (),
    assembly: Path | None = None,
    on_variant: Callable[[str, str], None] = lambda target, variant: None,
) -> list[Inspection]:
    """Compile the kernels of the plain calls, or of named cases, and look at what came out.

    archs: targets such as "sm_90" and "gfx942", of `tiles.SHARED_BYTES`.
    dtypes, dims, masks: the plain calls; "fp16", "bf16", "fp32", "fp8"; head dimensions from 1 to 512;
        "causal", "full". Not used where there are cases.
    kernels: of "forward", "hopper", "dkv", "dq", "dqkv", "hopper_backward", "prepare", "parameter"; None: the
        first six, but Hopper's two only where they can do what is asked for: sm_90, 16 bits, and cases that
        they take. Of dims they have those that they take, "hopper_backward" up to 128. fp8 has "forward"
        alone, on sm_90 and sm_100, and with it that is what None means.
    cases: names of `tilewise_reference.cases`, each compiled with its own dtype, dimensions and features.
    assembly: a folder for the machine code as text.
    on_variant: told of each target and variant that is done.
    Raises ValueError for a name that is unknown, CompileError for what does not compile.
    """
    if kernels is None:
        kernels = applicable(KERNELS, archs, dtypes, dims, cases)
    arguments = check_arguments(archs, dtypes, dims, masks, kernels, cases)
    done = compile_variants(SOURCE, archs, arguments, assembly=assembly, messages=True, on_variant=on_variant)
    found = [inspect_one(compiled) for target in archs for compiled in done[target]]
    return sorted(found, key=lambda each: (archs.index(each.target), place_of(each.kernel)))


def place_of(kernel: str) -> int:
    """Where a kernel stands in the tables; dK and dV that are summed apart stand where they do together."""
    return ALL_KERNELS.index("dkv" if kernel in ("dk", "dv") else kernel)


def applicable(
    kernels: Sequence[str],
    archs: Sequence[str],
    dtypes: Sequence[str],
    dims: Sequence[int],
    cases: Sequence[str],
) -> list[str]:
    """Those of the kernels that can be compiled for all of this."""
    asked = archs, dtypes, dims, cases
    if not cases and "fp8" in dtypes:
        kernels = [kernel for kernel in kernels if kernel == "forward"]
    return [kernel for kernel in kernels if kernel not in HOPPERS or not why_not_hopper(kernel, *asked)]


def check_arguments(
    archs: Sequence[str],
    dtypes: Sequence[str],
    dims: Sequence[int],
    masks: Sequence[str],
    kernels: Sequence[str],
    cases: Sequence[str],
) -> dict[str, Any]:
    """The arguments of `variants`, all of them right. Raises ValueError naming what is not."""
    for arch in archs:
        gpu_target(arch)
    for name, given, known in (
        ("dtype", dtypes, tuple(DTYPES)),
        ("mask", masks, tuple(MASKS)),
        ("kernel", kernels, ALL_KERNELS),
    ):
        for value in given:
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    for dim in dims:
        if not 1 <= dim <= MAX_VALUE_DIM:  # of head_dim and value_dim both
            raise ValueError(f"{dim=} must be from 1 to {MAX_VALUE_DIM}")
    for case in cases:
        if find_case(case).cache is not None:
            raise ValueError(
                f"{case=} reads a cache, which inspect does not look at: `tilewise explain --case {case}` "
                "says what it launches"
            )
    for kernel in kernels if not cases else ():
        if reason := why_not_fp8(kernel, archs, dtypes):
            raise ValueError(f"{kernel=}: {reason}")
    for kernel in HOPPERS:
        if kernel in kernels and (reason := why_not_hopper(kernel, archs, dtypes, dims, cases)):
            raise ValueError(f"{kernel=} does not apply: {reason}")
    if not archs or not kernels or not (cases or (dtypes and dims and masks)):
        raise ValueError(
            f"nothing to inspect: {archs=}, {kernels=}, {cases=}, {dtypes=}, {dims=}, {masks=} must not be "
            "empty (only cases, or what stands after it, may be)"
        )
    return dict(
        dtypes=list(dtypes), dims=list(dims), masks=list(masks), kernels=list(kernels), cases=list(cases)
    )


def variants(cases: Sequence[str], kernels: Sequence[str], **plain: Any) -> list[Any]:
    """What the child processes compile: the cases, or without any the plain calls."""
    return case_variants(cases, kernels) if cases else plain_variants(kernels=kernels, **plain)


def inspect_one(compiled: Compiled) -> Inspection:
    """What follows from a compiled kernel on the chip that stands for its target."""
    chip = chip_or_none(compiled.target)
    return Inspection(
        kernel=compiled.name,
        variant=compiled.variant,
        target=compiled.target,
        chip=None if chip is None else chip.name,
        triton=triton.__version__,
        tilewise=__version__,
        compiled=compiled,
        occupancy=None if chip is None else occupancy_of(compiled, chip),
        loops=tuple(
            InspectedLoop(loop, None if chip is None else bound_of(compiled, loop, chip))
            for loop in compiled.loops
        ),
    )


def occupancy_of(compiled: Compiled, chip: Chip) -> Occupancy:
    return occupancy(chip, compiled.warps, compiled.registers, compiled.shared_bytes, compiled.tensor_memory)


def bound_of(compiled: Compiled, loop: MainLoop, chip: Chip) -> Bound:
    return bound(loop, chip, {"float32": 4, FP8: 1}.get(compiled.dtype, 2))


def chip_or_none(target: str) -> Chip | None:
    """The chip that stands for a target; None where its datasheet is not listed."""
    try:
        return chip_of_target(target)
    except ValueError:
        return None


def to_json(inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """What `tilewise inspect --json` writes: a list of objects with the fields of `Inspection`."""
    return [asdict(inspection) for inspection in inspections]
