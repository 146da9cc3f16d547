"""What a GPU would run, read without a GPU: registers, spills, shared memory and instructions of a kernel.

A variant is a name and a function that launches kernels in the usual way, `kernel[grid](...)` or a launcher
on CPU tensors. Under a stand-in driver every launch stops after compilation, so what is inspected is exactly
what the launcher asks for. Triton reads TRITON_INTERPRET when `@triton.jit` runs, and a kernel keeps what
it has compiled: hence one child process a target, which takes a list of variants and answers in JSON.

    def variants() -> list[Variant]: ...                           # in an importable module
    compile_variants("some.module:variants", ["sm_90", "gfx942"])  # {target: [Compiled, ...]}
    python -m harness.compiled some.module:variants sm_90          # one target, printed as JSON lines
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """A chip: Triton's name for it, the shared memory one program may have, and its matmul instructions."""

    gpu: GPUTarget
    shared_limit: int  # bytes
    matmul: str  # the start of the opcode that multiplies fp16 and bf16 tiles


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, "UTCHMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma"),
}
_MATMUL = re.compile(r"[A-Z]*MMA(\.|$)|v_s?mfma")


@dataclass(frozen=True)
class Variant:
    """A launch worth compiling; `launch` may launch several kernels."""

    name: str
    launch: Callable[[], Any]


@dataclass(frozen=True)
class Compiled:
    """One kernel of one variant as compiled for one target."""

    variant: str
    kernel: str
    target: str
    registers: int  # a thread's
    spill_bytes: int  # a thread's stack; Triton kernels put nothing else there
    shared_bytes: int  # a program's
    instructions: dict[str, int]  # by opcode without modifiers: {"LDG": 12, ...}
    matmuls: dict[str, int]  # by opcode with its modifiers: {"HMMA.16816.F32": 64, ...}

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether the target's instruction for fp16 and bf16 (and tf32) matmuls occurs."""
        return any(opcode.startswith(TARGETS[self.target].matmul) for opcode in self.matmuls)


class CompileError(RuntimeError):
    """Variants that did not compile, with the compiler's messages."""


class _StandInDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Kernels launched inside the block are compiled for `target`, not run; yields the compiled kernels.

    Use it for one target a process: a kernel keeps what it has compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels of this process cannot be compiled")
    triton.runtime.driver.set_active(_StandInDriver(TARGETS[target].gpu))
    kernels: list[Any] = []
    launch = triton.runtime.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel.result() if hasattr(kernel, "result") else kernel)
        return kernel

    with mock.patch.object(triton.runtime.JITFunction, "run", run):
        yield kernels


def inspect(variant: str, kernel: Any, target: str) -> Compiled:
    """Read a compiled kernel's machine code."""
    read = _read_amdgcn if "amdgcn" in kernel.asm else _read_cubin
    registers, spill_bytes, opcodes = read(kernel)
    return Compiled(
        variant=variant,
        kernel=kernel.metadata.name,
        target=target,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=kernel.metadata.shared,
        instructions=dict(Counter(opcode.split(".")[0] for opcode in opcodes)),
        matmuls=dict(Counter(opcode for opcode in opcodes if _MATMUL.match(opcode))),
    )


def _read_cubin(kernel: Any) -> tuple[int, int, list[str]]:
    """Registers, stack bytes and opcodes, from the disassembler that Triton's wheel carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path]
        usage = subprocess.run([*tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([*tool, "-sass", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage.stdout + usage.stderr)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass.stdout, re.M)
    if found is None or not opcodes:
        raise RuntimeError(
            f"cuobjdump says nothing about {kernel.metadata.name}: {usage.stdout}{usage.stderr}"
        )
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, opcodes


def _read_amdgcn(kernel: Any) -> tuple[int, int, list[str]]:
    text = kernel.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    opcodes = re.findall(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)", text, re.M)
    if registers is None or scratch is None or not opcodes:
        raise RuntimeError(f"the assembly of {kernel.metadata.name} has no metadata")
    return int(registers[1]), int(scratch[1]), opcodes


def compile_variants(source: str, targets: Sequence[str], workers: int = 2) -> dict[str, list[Compiled]]:
    """Compile the variants that `source` ("module:function") returns for each target, one process a target.

    Raises CompileError naming every variant that failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def child(target: str) -> tuple[list[Compiled], list[str]]:
        command = [sys.executable, "-m", "harness.compiled", source, target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return [], [f"{target}: the child process failed\n{done.stderr}"]
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        failures = [f"{target}, {a['variant']}: {a['error']}" for a in answers if "error" in a]
        return [Compiled(**answer) for answer in answers if "error" not in answer], failures

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(targets, pool.map(child, targets), strict=True))
    failures = [failure for _, failed in results.values() for failure in failed]
    if failures:
        raise CompileError("\n\n".join(failures))
    return {target: compiled for target, (compiled, _) in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.compiled", description="Compile without a GPU.")
    parser.add_argument("source", help="module:function that returns a list of Variant")
    parser.add_argument("target", choices=TARGETS)
    options = parser.parse_args()
    module, function = options.source.split(":")
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the answers alone
        variants = getattr(importlib.import_module(module), function)()
    for variant in variants:
        answers: list[dict[str, Any]] = []
        with contextlib.redirect_stdout(sys.stderr):
            try:
                with compile_only(options.target) as kernels:
                    variant.launch()
                if not kernels:
                    raise RuntimeError("it launched no kernel")
                for kernel in kernels:
                    answers.append(dataclasses.asdict(inspect(variant.name, kernel, options.target)))
            except Exception as error:  # one variant's failure must not hide the others'
                answers = [{"variant": variant.name, "error": f"{type(error).__name__}: {error}"}]
        for answer in answers:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
