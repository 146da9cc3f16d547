"""Is everything there that tilewise needs, and what runs here? One probe a question; none of them may fail.

Nothing is installed, compiled or written by asking, but for the self test on a GPU, which compiles a kernel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton

import tilewise_reference
from tilewise_reference.yardstick import (
    allowed_error,
    difference,
    largest_difference,
    pytorch_attention,
)

from ...api import attention, why_not
from ...kernels.room import family
from ...kernels.tile import Pass
from ...parts.masks.causal import Causal
from ...parts.numerics import INTERPRETED
from ...plan.implementation import IMPLEMENTATIONS, backward_implementation, implementation
from ...plan.request import make_request
from ...plan.tiles import PROVEN, TABLE, architecture, user_table
from ...plan.user_tiles import cache_folder
from ...version import __version__
from ..chips import find_chip

Verdict = Literal["ok", "note", "problem"]
OLDEST_PYTHON, OLDEST_TORCH, OLDEST_TRITON = (3, 10), (2, 11), (3, 6)
# By extra (pyproject.toml): the modules that it brings.
EXTRAS = {
    "tools": ("typer", "rich"),
    "demo": ("matplotlib", "safetensors", "tokenizers", "numpy"),
    "bench": ("pytest", "pytest_benchmark", "matplotlib", "tabulate", "pynvml"),
    "test": ("pytest", "xdist", "hypothesis", "numpy", "hatchling"),
}
RIVALS = ("flash_attn", "flash_attn_interface", "flashinfer", "xformers", "jax")


@dataclass(frozen=True)
class Finding:
    """One answer: what was asked, what was found, and what to do where that is a problem or worth a note."""

    topic: str
    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps tilewise from working here."""
        return tuple(finding for finding in self.findings if finding.verdict == "problem")

    def to_dict(self) -> dict[str, Any]:
        return {"healthy": not self.problems, "findings": [asdict(finding) for finding in self.findings]}


def examine() -> Diagnosis:
    """Ask everything. A probe that breaks is a problem of its own, and does not stop the others."""
    findings: list[Finding] = []
    for topic, probe in PROBES:
        try:
            findings += probe()
        except Exception as error:
            found = f"could not be found out: {type(error).__name__}: {error}"
            findings.append(Finding(topic, probe.__name__, found, "problem", "report this, with this output"))
    return Diagnosis(tuple(findings))


# ---- Versions


def versions() -> Iterator[Finding]:
    yield version("Python", platform.python_version(), OLDEST_PYTHON)
    yield version("torch", torch.__version__, OLDEST_TORCH)
    yield version("triton", triton.__version__, OLDEST_TRITON)
    yield Finding("versions", "tilewise", f"{__version__}, in {Path(__file__).parents[2]}")
    built = "ROCm " + torch.version.hip if torch.version.hip else "CUDA " + str(torch.version.cuda)
    built = built if torch.version.hip or torch.version.cuda else "the CPU alone"
    yield Finding("versions", "torch is built for", built)
    if INTERPRETED and as_numbers(triton.__version__) < (3, 7):
        numpy = installed_version("numpy")
        if numpy is not None and as_numbers(numpy) >= (2, 4):
            advice = "pip install 'numpy<2.4', or a newer triton"
            found = f"{numpy}: the interpreter of Triton {triton.__version__} needs one below 2.4"
            yield Finding("versions", "numpy", found, "problem", advice)


def version(name: str, given: str, oldest: tuple[int, ...]) -> Finding:
    if as_numbers(given) >= oldest:
        return Finding("versions", name, given)
    wanted = ".".join(map(str, oldest))
    return Finding("versions", name, given, "problem", f"tilewise needs {name} {wanted} or newer")


def as_numbers(given: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu": the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"^(\d+)(?:\.(\d+))?", given)[0] if number)


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- GPUs


def gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = (
            "torch is built without CUDA and ROCm"
            if not (torch.version.cuda or torch.version.hip)
            else ("torch sees none: is there a driver, and is CUDA_VISIBLE_DEVICES empty?")
        )
        yield Finding("GPU", "GPU", f"none: {why}", "note")
        return
    yield Finding("GPU", "driver", driver())
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        arch = architecture(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found = f"{properties.name}, {arch}, {properties.multi_processor_count} multiprocessors, {memory}"
        yield Finding("GPU", str(device), found)
        yield chip_of(properties.name, properties.multi_processor_count)


def chip_of(name: str, multiprocessors: int) -> Finding:
    """Whether `explain` and `inspect` know this chip's figures."""
    try:
        chip = find_chip(name)
    except ValueError:
        found = "not in the list of datasheets: estimates stand on another chip's figures"
        return Finding("GPU", "datasheet", found, "note")
    if chip.multiprocessors != multiprocessors:
        found = (
            f"that of {chip.name} has {chip.multiprocessors} multiprocessors, and this chip {multiprocessors}"
        )
        return Finding(
            "GPU", "datasheet", found, "note", "another variant: estimates are too high by the ratio"
        )
    return Finding("GPU", "datasheet", f"{chip.name} ({chip.source})")


def driver() -> str:
    """The driver's version, from NVIDIA's library or command; ROCm's own where that is what runs."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if importlib.util.find_spec("pynvml") is not None:
        import pynvml

        try:
            pynvml.nvmlInit()
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError as error:
            return f"unknown: {error}"
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown: neither nvidia-ml-py nor nvidia-smi is here"
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[0] if done.returncode == 0 else f"unknown: {done.stderr.strip()}"


# ---- What runs


def implementations() -> Iterator[Finding]:
    """What answers here in a line, and how to see the kernels where it is none of them; then each by name."""
    has_gpu = torch.cuda.is_available()
    advice = ""
    if INTERPRETED:
        found = "the kernels, in Triton's interpreter on the CPU: slowly, as ordinary Python"
        advice = "unset TRITON_INTERPRET to use the GPU" if has_gpu else ""
    elif has_gpu:
        found = "the kernels on the GPU, plain PyTorch on CPU tensors"
    else:
        found = "plain PyTorch on the CPU (impl=None is 'torch'), and no kernel"
        advice = "TRITON_INTERPRET=1 in the environment, before Python starts, runs the kernels on the CPU"
    if not INTERPRETED and os.environ.get("TRITON_INTERPRET") in ("1", "true", "on", "yes"):
        advice = "TRITON_INTERPRET=1 does nothing here: it was set after triton was imported"
    yield Finding("runs", "here", found, "note" if advice else "ok", advice)
    devices = [device for device, is_there in (("cpu", INTERPRETED), ("cuda", has_gpu)) if is_there]
    for device in devices:
        q = torch.empty(1, 1, 1, 16, device=device, dtype=torch.float16)
        for name in IMPLEMENTATIONS:
            reasons = why_not(q, q, q, impl=name)
            subject = f"impl={name!r} on {device}"
            if reasons:
                yield Finding("runs", subject, f"not available: {'; '.join(reasons)}", "note")
            elif name == "hopper":
                yield Finding("runs", subject, hopper_here(device, "hopper"))
                yield Finding("runs", f"{subject}, gradients", hopper_here(device, "hopper_backward"))
            else:
                yield Finding("runs", subject, "available")
        yield Finding("runs", f"impl=None on {device}", f"is {implementation(make_request(q, q, q))!r}")


def hopper_here(device: str, work: Pass) -> str:
    """Where Hopper's forward or backward can run: how, and whether it must be asked for."""
    if device == "cpu":
        return "available, in an emulator"
    if not has_proven(work):
        return "available where it is asked for: no GPU has shown yet that it is right and faster"
    return "available" if work == "hopper" else "available where it is asked for"


def has_proven(work: Pass) -> bool:
    """Whether the shipped table has a row for which a GPU has shown that it is right and faster."""
    return any(key[0] == work for key in PROVEN)


def tile_tables() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        found = f"the shipped one, {len(TABLE)} rows; tables of your own are looked for in {cache_folder()}"
        yield Finding("tiles", "table", found)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            table = user_table(device)
        except ValueError as error:
            yield Finding("tiles", f"table for {device}", str(error), "problem", "tilewise tune --forget")
            continue
        if table.applied:
            found = f"yours ({table.path}), {len(table.applied)} of its rows; else the shipped one"
        else:
            found = f"the shipped one, {len(TABLE)} rows; none of your own in {table.path}"
        yield Finding("tiles", f"table for {device}", found)
        arch = architecture(device)
        if not any(key[1] == arch for key in TABLE):
            lacking = f"no row for {arch}: those of {family(arch)}, cut until they fit"
            yield Finding("tiles", "shipped table", lacking, "note", "tilewise tune finds better ones")
        for row, reason in table.refused:
            yield Finding("tiles", f"row {row.key} of yours", f"not used: {reason}", "note", "tilewise tune")


# ---- What Triton needs


def compilers() -> Iterator[Finding]:
    needed: Verdict = "problem" if torch.cuda.is_available() and not INTERPRETED else "note"
    names = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is not None:
        yield Finding("compilers", "C compiler", found)
    else:
        advice = "install gcc, or set CC: Triton builds its launcher with it at the first call on a GPU"
        yield Finding("compilers", "C compiler", "none", needed, advice)
    if torch.version.hip:
        return
    try:
        tool = triton.knobs.nvidia.ptxas
        yield Finding("compilers", "ptxas", f"{tool.path}, {tool.version}")
    except RuntimeError as error:
        yield Finding("compilers", "ptxas", f"none: {error}", needed, "reinstall triton, which brings it")


def caches() -> Iterator[Finding]:
    needed: Verdict = "problem" if torch.cuda.is_available() and not INTERPRETED else "note"
    folders: list[tuple[str, Path, str, Verdict]] = [
        ("Triton's compiled kernels", Path(triton.knobs.cache.dir), "TRITON_CACHE_DIR", needed),
        ("tilewise's own", cache_folder(), "TILEWISE_CACHE", "note"),
    ]
    for subject, folder, variable, verdict in folders:
        if is_writable(folder):
            yield Finding("caches", subject, str(folder))
        else:
            advice = f"set {variable} to a folder that can be written"
            yield Finding("caches", subject, f"{folder} cannot be written", verdict, advice)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder can; nothing is made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            advice = f"pip install 'tilewise[{extra}]', if you want it"
            yield Finding("extras", extra, f"lacks {', '.join(missing)}", "note", advice)
        else:
            yield Finding("extras", extra, "complete")
    rivals = [module for module in RIVALS if importlib.util.find_spec(module) is not None]
    yield Finding("extras", "rivals for the benchmarks", ", ".join(rivals) or "none besides PyTorch's own")


def settings() -> Iterator[Finding]:
    precision = torch.get_float32_matmul_precision()
    meaning = "fp32 inputs in IEEE" if precision == "highest" else "fp32 inputs in TF32 on a GPU"
    yield Finding("settings", "float32 matmul precision", f"{precision}: {meaning}")
    deterministic = "on" if torch.are_deterministic_algorithms_enabled() else "off"
    yield Finding(
        "settings",
        "deterministic algorithms",
        f"{deterministic}; tilewise is deterministic but where it is told otherwise",
    )
    ours = ("TRITON_", "TILEWISE_", "CUDA_VISIBLE", "HIP_VISIBLE", "PYTORCH_")
    names = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ours)]
    yield Finding("settings", "environment", " ".join(names) or "none that matters")


# ---- A self test


def self_test() -> Iterator[Finding]:
    """A small causal call against float64, on the device and with the implementation that calls get here; and
    one with Hopper's forward, and the gradients of one with its backward, in the emulator, or where a GPU has
    proven them: before that they might hang."""
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    yield tested(None, torch.float32, device)
    q = torch.empty(1, 1, 1, 16, device=device, dtype=torch.float16)
    if why_not(q, q, q, impl="hopper"):
        return
    if device == "cpu" or has_proven("hopper"):
        yield tested("hopper", torch.float16, device)
    if device == "cpu" or (has_proven("hopper") and has_proven("hopper_backward")):
        yield tested("hopper", torch.float16, device, gradients=True)


def tested(impl: str | None, dtype: torch.dtype, device: str, gradients: bool = False) -> Finding:
    """What became of the call in this dtype, or of its gradients."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 40, 32, device=device, generator=generator).to(dtype) for _ in range(4))
    causal = tilewise_reference.masks.causal(40, 40)

    def results(attend: Callable[..., torch.Tensor], dtype: torch.dtype = dtype) -> torch.Tensor:
        """out, or dq, dk and dv."""
        leaves = [x.to(dtype, copy=True).requires_grad_(gradients) for x in (q, k, v)]
        out = attend(*leaves)
        return torch.stack(torch.autograd.grad(out, leaves, do.to(dtype))) if gradients else out

    exact = results(lambda *qkv: tilewise_reference.attention(*qkv, mask=causal), torch.float64)
    torch_error = largest_difference(results(lambda *qkv: pytorch_attention(*qkv, mask=causal)[0]), exact)
    errors = difference(results(lambda *qkv: attention(*qkv, mask=Causal(), impl=impl)), exact)
    allowed = allowed_error(exact, dtype, torch_error)
    worst = (errors / allowed).argmax()
    error, limit = (x.flatten()[worst].item() for x in (errors, allowed))
    request = make_request(q, k, v, impl=impl)
    name = backward_implementation(request) if gradients else implementation(request)
    what = "gradients" if gradients else "attention"
    subject = what if impl is None else f"{what}, impl={impl!r}"
    precision = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    found = f"{name} on {device}, {precision}: largest error {error:.1e}, allowed {limit:.1e}"
    if error <= limit:
        return Finding("self test", subject, found)
    return Finding(
        "self test", subject, found, "problem", "the result is wrong: report this, with this output"
    )


Probe = Callable[[], Iterator[Finding]]
PROBES: tuple[tuple[str, Probe], ...] = (
    ("versions", versions),
    ("GPU", gpus),
    ("runs", implementations),
    ("tiles", tile_tables),
    ("compilers", compilers),
    ("caches", caches),
    ("extras", extras),
    ("settings", settings),
    ("self test", self_test),
)
