"""What would a GPU run? Kernels compiled without one: registers, spills, shared memory, instructions, loops.

A variant is a name and a function that launches kernels in the usual way, `kernel[grid](...)` or a launcher
on CPU or meta tensors. Under a stand-in driver every launch stops after compilation, so what is inspected is
exactly what the launcher asks for. Triton reads TRITON_INTERPRET when `@triton.jit` runs, and a kernel keeps
what it has compiled: hence one child process a target, which takes a list of variants and answers in JSON.

    def variants() -> list[Variant]: ...                           # in an importable module
    compile_variants("some.module:variants", ["sm_90", "gfx942"])  # {target: [Compiled, ...]}
    python -m tilewise.tools.compiled some.module:variants sm_90   # one target, printed as JSON lines
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from ...kernels.hopper.limits import WARPGROUP_ROWS
from ...kernels.room import SHARED_BYTES, family
from .assembler import Messages, assembler_messages, listening
from .machine_code import Flow, MachineCode, read_amdgcn, read_cubin
from .main_loop import MainLoop, kind_of, main_loops
from .sums import sums

# The start of the opcode that multiplies fp16 and bf16 tiles of 64 rows and more, by family.
MATMUL = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
FP8_MATMUL = {"sm_90": "QGMMA", "sm_100": "UTCQMMA"}  # the same for fp8
TARGETS = tuple(MATMUL)  # those that the tests compile for
FP8 = "float8_e4m3fn"
HOPPER, HOPPER_BACKWARD = "hopper_forward_kernel", "hopper_backward_kernel"
ONE_WALK = "dqkv_kernel"
# Products of a tile step: how many of them are as long as head_dim, and how many as value_dim.
PRODUCTS = {
    "forward_kernel": (1, 1), HOPPER: (1, 1), "dkv_kernel": (2, 2), "dq_kernel": (2, 1), ONE_WALK: (3, 2),
    "dk_kernel": (2, 1), "dv_kernel": (1, 1), "parameter_kernel": (1, 1), HOPPER_BACKWARD: (3, 2),
}  # fmt: skip
TILE_SIZES = ("TILE_Q", "TILE_KV", "HEAD_TILE", "VALUE_TILE")
DESCRIBED = {"HEAD_TILE": "q_desc", "VALUE_TILE": "v_desc"}  # where Hopper's kernels have their columns


@dataclass(frozen=True)
class Variant:
    """A launch worth compiling; `launch` may launch several kernels. With `kernels`, only those of these
    names are compiled."""

    name: str
    launch: Callable[[], Any]
    kernels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Compiled:
    """One kernel of one variant as compiled for one target."""

    variant: str
    kernel: str
    target: str
    dtype: str  # of the inputs: "bfloat16"
    tile: dict[str, int]  # by TILE_SIZES, those that the kernel has
    warps: int  # a program's; with a producer, those that fill up its four included
    stages: int
    registers: int  # a thread's when the program starts
    role_registers: dict[str, int]  # later, of a "consumer" and the others, where warps have roles
    spill_bytes: int  # a thread's stack; Triton kernels put nothing else there
    shared_bytes: int  # a program's
    tensor_memory: int  # columns, of a program on Blackwell
    instructions: dict[str, int]  # by opcode without modifiers: {"LDG": 12, ...}
    matmuls: dict[str, int]  # by opcode with its modifiers: {"HMMA.16816.F32": 64, ...}
    loops: list[MainLoop]  # over tiles, in the program's order
    sums: dict[str, int] = dataclasses.field(default_factory=dict)  # by steps: see sums.py; none for AMD
    assembler: Messages | None = None  # None where nobody asked, and for AMD

    @property
    def name(self) -> str:
        """As `tilewise inspect --kernel` has it: "forward", "hopper", "dkv"."""
        return "hopper" if self.kernel == HOPPER else self.kernel.removesuffix("_kernel")

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether the target's instruction for long fp16 and bf16 (and tf32) matmuls occurs, or for fp8."""
        start = (FP8_MATMUL if self.dtype == FP8 else MATMUL)[family(self.target)]
        return any(opcode.startswith(start) for opcode in self.matmuls)

    @staticmethod
    def from_json(answer: dict[str, Any]) -> Compiled:
        """Undo `dataclasses.asdict`."""
        said = answer["assembler"]
        loops = [MainLoop(**loop) for loop in answer["loops"]]
        return Compiled(**answer | dict(loops=loops, assembler=None if said is None else Messages(**said)))


@dataclass(frozen=True)
class Launched:
    """A kernel that was compiled, and the arguments of its launch by name."""

    kernel: Any
    arguments: dict[str, Any]
    said: str  # by the assembler: nothing, where the kernel was in Triton's cache


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


def gpu_target(target: str) -> GPUTarget:
    """Triton's name for a target of `tiles.SHARED_BYTES`: "sm_90", "gfx942"."""
    if target not in SHARED_BYTES:
        raise ValueError(f"arch={target!r} must be one of {', '.join(SHARED_BYTES)}")
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


@contextlib.contextmanager
def compile_only(target: str, only: Sequence[str] | None = None) -> Iterator[list[Launched]]:
    """Kernels launched inside the block are compiled for `target`, not run; yields what was compiled. Of
    kernels whose names are not in `only`, if given, nothing is compiled.

    Use it for one target a process: a kernel keeps what it has compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels of this process cannot be compiled")
    triton.runtime.driver.set_active(_StandInDriver(gpu_target(target)))
    launched: list[Launched] = []
    launch = triton.runtime.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only is not None and self.fn.__name__ not in only:
            return None
        with listening() as said:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launched.append(Launched(kernel, arguments, said.getvalue()))
        return kernel

    with mock.patch.object(triton.runtime.JITFunction, "run", run):
        yield launched


def read(
    variant: str, launched: Launched, target: str, assembly: Path | None = None, messages: bool = False
) -> Compiled:
    """Read a compiled kernel's machine code; `assembly`: a folder to write it to; `messages`: ask what the
    assembler says."""
    kernel, metadata = launched.kernel, launched.kernel.metadata
    # Of dkv_kernel there may be one that sums dK and one that sums dV: backward.py.
    name = f"{launched.arguments['SUMS']}_kernel" if "SUMS" in launched.arguments else metadata.name
    amd = "amdgcn" in kernel.asm
    code = read_amdgcn(kernel.asm["amdgcn"]) if amd else read_cubin(kernel.asm["cubin"])
    if assembly is not None:
        file = assembly_file(assembly, target, name, variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code.text)
        if not amd:  # what the assembler was given, and the driver of descriptors
            boxes = [each["block_size"] for each in getattr(metadata, "tensordesc_meta", None) or () if each]
            file.with_suffix(".ptx").write_text(f"// tensor maps: {boxes}\n{kernel.asm['ptx']}")
    tile, inputs = tile_and_inputs(launched)
    opcodes = [instruction.opcode for instruction in code.instructions]
    return Compiled(
        variant=variant,
        kernel=name,
        target=target,
        dtype="" if inputs is None else str(inputs.dtype).removeprefix("torch."),
        tile=tile,
        warps=metadata.num_warps,
        stages=launched.arguments.get("STAGES", metadata.num_stages),
        registers=code.registers,
        role_registers=role_registers(code),
        spill_bytes=code.spill_bytes,
        shared_bytes=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,  # AMD's metadata have none
        instructions=dict(Counter(opcode.split(".")[0] for opcode in opcodes)),
        matmuls=dict(Counter(opcode for opcode in opcodes if kind_of(opcode) == "matmul")),
        loops=loops_of(code, name, tile, metadata.num_warps, gpu_target(target).warp_size),
        sums={} if amd else sums(code.instructions),
        assembler=assembler_messages(kernel, launched.said) if messages and not amd else None,
    )


def assembly_file(folder: Path, target: str, kernel: str, variant: str) -> Path:
    """Where `read` writes a kernel's machine code."""
    name = re.sub(r"\W+", "-", f"{kernel.removesuffix('_kernel')} {variant}")
    return folder / target / f"{name}.{'s' if target.startswith('gfx') else 'sass'}"


def tile_and_inputs(launched: Launched) -> tuple[dict[str, int], torch.Tensor | None]:
    """A launch's tile, by TILE_SIZES, and a tensor of its inputs' dtype; Hopper's kernel has them in
    descriptors of pieces of [1, 1, rows, columns]."""
    given = launched.arguments
    tile = {name: columns_of(given[name]) for name in TILE_SIZES if name in given}
    if "q_desc" not in given:
        (base, *_), *_ = given.get("call", (given.get("out", (None, None)),))
        return tile, base
    q, v = given["q_desc"], given["v_desc"]
    columns = {size: described_columns(given, name) for size, name in DESCRIBED.items()}
    if "dq_desc" in given:  # the backward's two warpgroups own a piece of keys each
        return tile | columns | dict(TILE_KV=2 * v.block_shape[2]), q.base
    return tile | columns | dict(TILE_Q=q.block_shape[2] * given["WARPGROUPS"]), q.base


def described_columns(given: dict[str, Any], name: str) -> int:
    """The columns that a descriptor's tiles have, and those of a second piece, if there is one."""
    pieces = (given[name], given.get(f"{name}_2"))
    return sum(int(piece.block_shape[3]) for piece in pieces if piece is not None)


def columns_of(size: int | tuple[int, ...]) -> int:
    """The columns of a tile of the portable kernels', which has them in pieces, or its rows."""
    return sum(size) if isinstance(size, tuple) else int(size)


def loops_of(code: MachineCode, kernel: str, tile: dict[str, int], warps: int, warp: int) -> list[MainLoop]:
    """A kernel's main loops. In Hopper's, each warpgroup runs its own over its 64 rows, or keys, the cut ones
    first, and the copy engine brings K and V, or Q and dO, for all of them."""
    flops = tile_flops(kernel, tile)
    if kernel not in (HOPPER, HOPPER_BACKWARD):
        order = ("cut", "full") if kernel == ONE_WALK else ("full", "cut")
        return main_loops(code.instructions, warps, warp, flops, order)
    own, walked = ("TILE_Q", "TILE_KV") if kernel == HOPPER else ("TILE_KV", "TILE_Q")
    teams = tile[own] // WARPGROUP_ROWS
    copied = 2 * tile[walked] * (tile["HEAD_TILE"] + tile["VALUE_TILE"]) // teams
    assert flops is not None
    return main_loops(code.instructions, 4, warp, flops // teams, ("cut", "full"), copied)


def role_registers(code: MachineCode) -> dict[str, int]:
    """What a thread of each role has where it does its work: the consumers multiply, the producer has tiles
    copied, the reducer has them added."""
    if not any(each.opcode.startswith("USETMAXREG") for each in code.instructions):
        return {}
    flow = Flow(code.instructions)
    found: dict[str, int] = {}
    for role, work in (("consumer", MATMUL["sm_90"]), ("producer", "UTMALDG"), ("reducer", "UTMAREDG")):
        places = [i for i, each in enumerate(code.instructions) if each.opcode.startswith(work)]
        if places:
            found[role] = min(flow.registers(place) or code.registers for place in places)
    return found


def tile_flops(kernel: str, tile: dict[str, int]) -> int | None:
    """What the products of a tile step need; None for kernels that multiply no tiles of ours."""
    if kernel not in PRODUCTS:
        return None
    along_head, along_value = PRODUCTS[kernel]
    columns = along_head * tile["HEAD_TILE"] + along_value * tile["VALUE_TILE"]
    return 2 * tile["TILE_Q"] * tile["TILE_KV"] * columns


def compile_variants(
    source: str,
    targets: Sequence[str],
    arguments: dict[str, Any] | None = None,
    workers: int = 2,
    assembly: Path | None = None,
    messages: bool = False,
    on_variant: Callable[[str, str], None] = lambda target, variant: None,
    on_failure: Callable[[str, str], None] | None = None,
) -> dict[str, list[Compiled]]:
    """Compile the variants that `source` ("module:function") returns for each target, one process a target.

    arguments: keyword arguments for that function, as JSON can say them. assembly: a folder for the machine
    code as text. messages: whether to ask what the assembler says. on_variant: told of each variant that is
    done, from a thread of its target's. on_failure: told of a variant that does not compile, and why.
    Raises CompileError naming every variant that failed, where nobody is told.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def child(target: str) -> tuple[list[Compiled], list[str]]:
        command = [sys.executable, "-m", "tilewise.tools.compiled", source, target]
        command += ["--arguments", json.dumps(arguments or {})]
        command += [] if assembly is None else ["--assembly", str(assembly)]
        command += ["--messages"] if messages else []
        compiled, failures = [], []
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    answer = json.loads(line)
                    if "error" in answer and on_failure is not None:
                        on_failure(answer["variant"], answer["error"])
                    elif "error" in answer:
                        failures.append(f"{target}, {answer['variant']}: {answer['error']}")
                    elif "done" in answer:
                        on_variant(target, answer["done"])
                    else:
                        compiled.append(Compiled.from_json(answer))
            if process.returncode:
                errors.seek(0)
                failures.append(f"{target}: the child process failed\n{errors.read()}")
        return compiled, failures

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(targets, pool.map(child, targets), strict=True))
    failures = [failure for _, failed in results.values() for failure in failed]
    if failures:
        raise CompileError("\n\n".join(failures))
    return {target: compiled for target, (compiled, _) in results.items()}
