"""What did the assembler say? Triton does not pass it on, so ptxas runs once more, just as Triton runs it.

It says where it ran short of registers, and where it makes each of Hopper's matmuls wait for the one before
(C7510 and the like: "wgmma.mma_async instructions are serialized"). It takes 0.1 s for a small kernel, and a
second or two for one whose warps have roles.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import triton

# A warning, or what ptxas numbers and calls an "info"; "error" where it gave up.
_WARNING = re.compile(r"warning|error|\(C\d+\)", re.I)


@dataclass(frozen=True)
class Messages:
    warnings: list[str]
    spill_stores: int  # bytes that a thread stores and loads, each instruction counted once
    spill_loads: int


def assembler_messages(kernel: Any) -> Messages:
    """Of a kernel that Triton compiled for an NVIDIA target."""
    backend = triton.compiler.make_backend(kernel.metadata.target)
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, kernel.metadata, kernel.metadata.target.arch)
    return read_messages(said.getvalue())


def read_messages(text: str) -> Messages:
    """What `ptxas -v` prints for one kernel."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if spills is None:
        raise RuntimeError(f"ptxas says nothing about the kernel: {text}")
    warnings = [line.strip() for line in text.splitlines() if _WARNING.search(line)]
    return Messages(warnings, int(spills[1]), int(spills[2]))
