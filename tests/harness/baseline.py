"""Are the compiled kernels worse than they were? Their figures beside those in tests/baselines/inspect.json.

    PYTHONPATH=tests python -m harness.baseline     write the figures that this version of Triton gives

The file holds figures by version of Triton: each compiles differently. Making them takes a minute or two.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import triton

from tilewise.tools.compiled.compiler import TARGETS, Compiled, compile_variants

FILE = Path(__file__).parents[1] / "baselines" / "inspect.json"
REFRESH = "PYTHONPATH=tests python -m harness.baseline"
SOURCES = {
    "main_variants": TARGETS,
    "backward_variants": TARGETS,
    "oldest_variants": ("sm_80", "sm_90"),
    "hopper_variants": ("sm_90",),
}
MORE_REGISTERS, LONGER_LOOP = 8, 1.1  # what passes as the same


@dataclass(frozen=True)
class Figures:
    """What is kept of a compiled kernel; of its main loops, a number each."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: list[int]
    matmuls: list[int]
    exponentials: list[int]
    overlapped: list[int]


def figures_of(compiled: Compiled) -> Figures:
    loops = compiled.loops
    return Figures(
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        instructions=[loop.instructions for loop in loops],
        matmuls=[loop.matmuls for loop in loops],
        exponentials=[loop.exponentials for loop in loops],
        overlapped=[loop.overlapped for loop in loops],
    )


def key(compiled: Compiled) -> str:
    """The name of a kernel in the file: "sm_90 forward bf16 128 causal"."""
    return f"{compiled.target} {compiled.name} {compiled.variant}"


def worse(old: Figures, new: Figures) -> list[str]:
    """What a change must not do, in words; empty where it did not."""
    longer = len(new.instructions) != len(old.instructions) or any(
        now > LONGER_LOOP * before for before, now in zip(old.instructions, new.instructions, strict=True)
    )
    found = {
        "registers": new.registers > old.registers + MORE_REGISTERS,
        "spill_bytes": new.spill_bytes > old.spill_bytes,
        "shared_bytes": new.shared_bytes > old.shared_bytes,
        "instructions": longer,
        "matmuls": new.matmuls != old.matmuls,
        "exponentials": new.exponentials != old.exponentials,
        "overlapped": any(now < before for before, now in zip(old.overlapped, new.overlapped, strict=False)),
    }
    return [
        f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name, is_worse in found.items() if is_worse
    ]


def better(old: Figures, new: Figures) -> list[str]:
    """What a change saved."""
    names = ("registers", "spill_bytes", "shared_bytes")
    found = [name for name in names if getattr(new, name) < getattr(old, name)]
    if sum(new.instructions) < sum(old.instructions) / LONGER_LOOP:
        found.append("instructions")
    return [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in found]


def load(file: Path = FILE) -> dict[str, dict[str, Figures]]:
    """By version of Triton and by key."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return {
        version: {name: Figures(**figures) for name, figures in kernels.items()}
        for version, kernels in found.items()
    }


def save(baseline: dict[str, dict[str, Figures]], file: Path = FILE) -> None:
    """A kernel a line, so that a difference reads well."""
    versions = []
    for version, kernels in sorted(baseline.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(asdict(kernels[name]))}" for name in sorted(kernels)]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def against_baseline(kernels: Iterable[Compiled]) -> None:
    """Fail the test where a kernel is worse than in the file, or not in it; warn where it is better. Skip it,
    and say so, where the file has nothing of this version of Triton: figures of another say nothing."""
    known = load().get(triton.__version__)
    if known is None:
        pytest.skip(f"no figures of Triton {triton.__version__} in {FILE.name}: {REFRESH} makes them")
    complaints, praise = [], []
    for compiled in kernels:
        name, new = key(compiled), figures_of(compiled)
        if name not in known:
            complaints.append(f"{name}: not in {FILE.name}")
            continue
        complaints += [f"{name}: {what}" for what in worse(known[name], new)]
        praise += [f"{name}: {what}" for what in better(known[name], new)]
    if praise:
        lines = "\n".join(praise)
        warnings.warn(f"better than {FILE.name}; to keep it so: {REFRESH}\n{lines}", stacklevel=2)
    if complaints:
        lines = "\n".join(complaints)
        pytest.fail(
            f"worse than {FILE.name} (old -> new); where that is meant: {REFRESH}\n{lines}", pytrace=False
        )


def main() -> None:
    kernels = [
        compiled
        for source, targets in SOURCES.items()
        for found in compile_variants(f"harness.variants:{source}", targets).values()
        for compiled in found
    ]
    figures = {key(compiled): figures_of(compiled) for compiled in kernels}
    save(load() | {triton.__version__: figures})
    print(f"{len(figures)} kernels of Triton {triton.__version__} in {FILE}")


if __name__ == "__main__":
    main()
