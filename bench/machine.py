"""On what does a run run? The GPU and its state, the versions of everything involved, the git revision.

describe() -> Machine        once a run
clocks_now() -> dict         MHz, °C and W, as often as wanted; empty without a GPU

Both ask nvidia-ml-py, and where it is missing or does not tell, the command nvidia-smi.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from tilewise.plan.user_tiles import kernels_hash

from .results import Machine

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".revision"
CLOCKS = ("sm_mhz", "temperature_c", "power_w")
# What is installed of these is named with its version: distribution names, rivals and what they stand on.
DISTRIBUTIONS = (
    "triton",
    "numpy",
    "jax",
    "jaxlib",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "flashinfer-python",
    "xformers",
)


def describe() -> Machine:
    """This machine, with its clocks as they are now."""
    gpu = torch.cuda.is_available()
    return Machine(
        gpu=torch.cuda.get_device_name() if gpu else None,
        arch=_arch() if gpu else None,
        driver=_driver() if gpu else None,
        versions=versions(),
        revision=revision(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        clocks=clocks_now(),
    )


def versions() -> dict[str, str]:
    """Of Python, torch, what torch was built with, and every rival that is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["rocm"] = torch.version.hip
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if cudnn:
        found["cudnn"] = str(cudnn)
    return found


def revision(root: Path = ROOT) -> str | None:
    """The commit that is checked out, with "-dirty" where tracked files differ from it. Outside git what
    `write_stamp` wrote, "-dirty" where the kernels are others; None where nothing tells."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is not None:
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    stamp = root / STAMP
    if not stamp.exists():
        return None
    stamped, kernels = stamp.read_text().split()
    return stamped if kernels == kernels_hash() else stamped.removesuffix("-dirty") + "-dirty"


def write_stamp(root: Path = ROOT) -> Path:
    """Write the revision into a file, for a copy of the files without their .git. Raises ValueError outside
    git."""
    found = revision(root)
    if _git(root, "rev-parse", "HEAD") is None:
        raise ValueError(f"{root} is no git checkout: there is no revision to write down")
    stamp = root / STAMP
    stamp.write_text(f"{found} {kernels_hash()}\n")
    return stamp


def clocks_now() -> dict[str, float]:
    """How the GPU stands: clock of its multiprocessors, temperature, power."""
    if not torch.cuda.is_available():
        return {}
    # Of device 0 by its number: asked for the current one, PyTorch would start the GPU for this process.
    asked: tuple[Callable[[], float], ...] = (
        lambda: float(torch.cuda.clock_rate(0)),
        lambda: float(torch.cuda.temperature(0)),
        lambda: torch.cuda.power_draw(0) / 1000,  # in mW
    )
    found = {}
    for name, read in zip(CLOCKS, asked, strict=True):
        try:
            found[name] = read()
        except Exception:  # no nvidia-ml-py, or a driver that does not tell: each in its own exception
            continue
    return found or _clocks_by_command()


def _clocks_by_command() -> dict[str, float]:
    found = {}
    for name, word in zip(CLOCKS, _nvidia_smi("clocks.sm", "temperature.gpu", "power.draw"), strict=False):
        try:
            found[name] = float(word)
        except ValueError:  # "[N/A]"
            continue
    return found


def _arch() -> str:
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # not installed, or no NVIDIA driver: nvidia-ml-py has an exception a reason
        return next(iter(_nvidia_smi("driver_version")), None)
    return version.decode() if isinstance(version, bytes) else str(version)


def _nvidia_smi(*questions: str) -> list[str]:
    """The command's answers about the current GPU, without units; empty where it gives none."""
    if torch.version.hip:
        return []
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    words = ["nvidia-smi", gpu, f"--query-gpu={','.join(questions)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [word.strip() for word in lines[0].split(",")] if lines else []


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
