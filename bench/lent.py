"""What more is there to do on a GPU that is lent for minutes? Its tests, compute-sanitizer, tuning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from . import tuning
from .jobs import CANARY_DIMS, Job, Jobs, Setting
from .results import Check, Results, load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.jsonl"
TEST_PROCESSES, TEST_SECONDS = 6, 45

# ---- Tests


def jobs_of_tests(*files: str, without_gpu: str, hopper: bool = False) -> Jobs:
    """These files of tests, in one job; without a GPU, on which there is nothing to see, one that runs."""

    def jobs(setting: Setting) -> list[Job]:
        name, on_gpu = " ".join(files), setting.on_gpu
        arguments = (name, files if on_gpu else (without_gpu,), str(setting.folder), on_gpu)
        widths = CANARY_DIMS if hopper else ()
        return [Job(("tests", name), name, do_tests, arguments, timed=True, hopper=widths)]

    return jobs


def do_tests(
    name: str, files: tuple[str, ...], folder: str, on_gpu: bool, seconds: float
) -> tuple[list[Check], str]:
    """Run these tests for so long at most. Each is a check of its own, written down as it ends; so are all of
    them, unless the time was too short."""
    command = [
        sys.executable, "-m", "pytest", *files, "-q", "-n", str(TEST_PROCESSES if on_gpu else 1),
        # In a thread of its own: a test that waits for a kernel hears no signal. It takes its process along.
        "--timeout", str(TEST_SECONDS), "--timeout-method", "thread",
        "-p", "bench.pytest_verdicts", "--checks", str(Path(folder, RESULTS).absolute()),
    ]  # fmt: skip
    with Path(folder, "tests.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return [], ""
    words = {0: "", 5: "there was no test to run"}.get(code, f"pytest ended with {code}: tests.log")
    return [Check(f"all of {name}", "failed" if words else "right", 0.0, words)], ""


# ---- compute-sanitizer

SMALL_CALL = """
import torch, tilewise
q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.float16, requires_grad=True)
tilewise.attention(q, q, q, mask=tilewise.Causal(), impl="{impl}").sum().backward()
torch.cuda.synchronize()
"""


def sanitizer_jobs(setting: Setting) -> list[Job]:
    """A small call of each kernel that gave a wrong answer or broke so far; nothing where all is right."""
    bad = [check.name for check in so_far(setting).checks if check.is_bad]
    kernels = ("hopper", "portable")
    asked = [impl for impl in kernels if any(is_about(name, impl) for name in bad)]
    return [
        Job(("check", f"compute-sanitizer {tool}: {impl}"), f"compute-sanitizer {tool}: {impl}", do_sanitizer,
            (tool, impl, str(setting.folder)))
        for impl in asked
        for tool in ("memcheck", "synccheck")
    ]  # fmt: skip


def is_about(name: str, impl: str) -> bool:
    """Whether a check of this name says something of that kernel."""
    return ("hopper" in name.lower()) == (impl == "hopper")


def so_far(setting: Setting) -> Results:
    return load(setting.folder / RESULTS)


def do_sanitizer(tool: str, impl: str, folder: str) -> tuple[list[Check], str]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [], "compute-sanitizer is not installed"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c",
               SMALL_CALL.format(impl=impl)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    name = f"compute-sanitizer {tool}: {impl}"
    with Path(folder, "sanitizer.log").open("a") as log:
        log.write(f"== {name}\n{done.stdout}{done.stderr}\n")
    if done.returncode == 0:
        return [Check(name, "right", 0.0, "a small causal call, forward and backward")], ""
    found = [line for line in done.stdout.splitlines() if line.startswith("=========") and line[9:].strip()]
    return [Check(name, "wrong", 0.0, "\n".join(found[:6]) or f"ended with {done.returncode}")], ""


# ---- Tuning


def tuning_jobs(setting: Setting) -> list[Job]:
    """A few candidates a row of the tile table, those that the static model holds to be the fastest."""
    rows = tuning.tuned_rows()[: None if setting.on_gpu else 2]
    return [
        Job(
            ("check", name), name, tuning.tune_row, (work, dim, str(setting.folder), setting.device),
            timed=True, hopper=(dim,) if work == "hopper" else (),
        )
        for work, dim in rows
        for name in [f"tuning: {work} 16-bit {dim}"]
    ]  # fmt: skip


def compile_for_tuning(setting: Setting) -> list[Job]:
    """The kernels of all candidates, side by side, before they are timed one by one."""
    if not setting.on_gpu:
        return []
    return [
        Job(
            ("compiled", job.key), f"compile {job.name}", tuning.compile_row,
            (*job.arguments[:2], setting.device), hopper=job.hopper,
        )
        for job in tuning_jobs(setting)
    ]  # fmt: skip
