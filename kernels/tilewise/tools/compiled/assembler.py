"""What did the assembler say? Triton prints it where it is asked to, and then only as it compiles.

ptxas says where it ran short of registers, and where it makes each of Hopper's matmuls wait for the one
before (C7510 and the like: "wgmma.mma_async instructions are serialized"). Of a kernel that comes from
Triton's cache it is asked once more, just as Triton asks it: that takes 0.1 s for a small kernel, and a
second or two for one whose warps have roles.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
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


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """What ptxas says of what Triton compiles inside."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        yield said


def assembler_messages(kernel: Any, said: str) -> Messages:
    """Of a kernel that Triton compiled for an NVIDIA target, ptxas having said so much: nothing, where the
    kernel was in Triton's cache."""
    if not said.strip():
        backend = triton.compiler.make_backend(kernel.metadata.target)
        with listening() as again:
            backend.make_cubin(kernel.asm["ptx"], {}, kernel.metadata, kernel.metadata.target.arch)
        said = again.getvalue()
    return read_messages(said)


def read_messages(text: str) -> Messages:
    """What `ptxas -v` prints for one kernel."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if spills is None:
        raise RuntimeError(f"ptxas says nothing about the kernel: {text}")
    warnings = [line.strip() for line in text.splitlines() if _WARNING.search(line)]
    return Messages(warnings, int(spills[1]), int(spills[2]))
