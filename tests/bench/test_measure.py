"""Does a comparison say everything about everyone: times, errors, memory, and why not?"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench.measure
from bench import machine
from bench.cold import sample_cold_start
from bench.groups import comparisons
from bench.implementations import IMPLEMENTATIONS, UnsupportedError, for_group, select
from bench.implementations.base import Implementation, Prepared
from bench.measure import blank, measure, peak_bytes
from bench.results import Row, load
from tilewise.tools.inputs import Inputs
from tilewise.tools.shrink import smoke
from tilewise_reference.cases import CASES, FEATURE_CASES, Case

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {case.name: smoke(case) for case in [*CASES, *FEATURE_CASES]}
PLAIN = BY_NAME["minilm-l6-encoder"]


class Scripted(Implementation):
    """Answers as plain PyTorch does, unless a step is replaced."""

    needs_gpu = False

    def __init__(self, name: str, **steps: Any) -> None:
        self.name, self.steps = name, steps

    def unavailable(self, device: torch.device) -> str | None:
        return self.steps.get("unavailable")

    def unsupported(self, case: Case, work: Any) -> str | None:
        reason = self.steps.get("unsupported")
        return reason() if callable(reason) else reason

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        if "prepare" in self.steps:
            self.steps["prepare"]()
        prepared = IMPLEMENTATIONS["tilewise torch"].prepare(case, inputs, work)
        spoil = self.steps.get("spoil")
        return prepared if spoil is None else replace(prepared, call=lambda: spoil(prepared.call()))


def raises(error: Exception) -> Any:
    def step(*arguments: Any) -> None:
        raise error

    return step


def measured(case: Case, work: Any, *implementations: Implementation, **options: Any) -> list[Row]:
    options = dict(rounds=2, least=2, device=CPU) | options
    return measure(case, work, implementations, group="a group", seconds=0.0, **options)


def test_everyone_gets_a_row_with_what_became_of_it():
    calls = []

    def breaks_later(out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("an illegal memory access\nwas encountered")
        return out

    rows = measured(
        PLAIN,
        "forward",
        Scripted("right"),
        Scripted("missing", unavailable="not installed"),
        Scripted("refuses", unsupported="takes no masks at all"),
        Scripted("confused", unsupported=raises(KeyError("size"))),
        Scripted("refuses late", prepare=raises(UnsupportedError("head_dim is too large"))),
        Scripted("breaks", prepare=raises(ValueError("first line\nsecond line"))),
        Scripted("hungry", prepare=raises(torch.OutOfMemoryError("tried to allocate 80 GiB"))),
        Scripted("wrong", spoil=lambda out: out + 1e-3),
        Scripted("nan", spoil=lambda out: out * float("nan")),
        Scripted("breaks later", spoil=breaks_later),
        Scripted("right too"),
    )
    found = {row.implementation: (row.status, row.reason) for row in rows}
    wrong = {name: found.pop(name) for name in ("wrong", "nan")}
    assert found == {
        "right": ("ok", ""),
        "missing": ("unavailable", "not installed"),
        "refuses": ("unsupported", "takes no masks at all"),
        "confused": ("failed", "KeyError: 'size'"),
        "refuses late": ("unsupported", "head_dim is too large"),
        "breaks": ("failed", "ValueError: first line"),
        "hungry": ("failed", "out of memory: OutOfMemoryError: tried to allocate 80 GiB"),
        "breaks later": ("failed", "RuntimeError: an illegal memory access"),
        "right too": ("ok", ""),
    }
    assert all(status == "wrong" and "out is" in reason for status, reason in wrong.values())
    by_name = {row.implementation: row for row in rows}
    assert by_name["wrong"].error == pytest.approx(1e-3, rel=0.01)
    assert [row.implementation for row in rows if row.seconds] == ["right", "right too"]
    assert all(len(by_name[name].seconds) == 2 for name in ("right", "right too"))


def test_a_row_carries_what_is_needed_to_compare_it():
    (row,) = measured(PLAIN, "forward", Scripted("right"))
    assert row.key == ("a group", "minilm-l6-encoder-tiny", "forward")
    assert (row.flops, row.bytes, row.dtype) == (PLAIN.flops(), PLAIN.bytes(), "float32")
    sizes = dict(batch=2, q_heads=2, kv_heads=2, q_len=64, kv_len=64, head_dim=32, value_dim=32)
    assert row.sizes == sizes and row.peak_bytes is None
    assert 0 < row.error <= row.allowed_error and 0 < row.torch_error <= row.allowed_error
    (row,) = measured(PLAIN, "backward", Scripted("right"))
    assert (row.flops, row.bytes) == (PLAIN.flops("backward"), 0)
    assert blank(PLAIN, "host forward", "host", Scripted("a")).flops == 0


def test_the_backward_is_timed_alone(monkeypatch):
    forwards, timed = [], {}

    def remember(calls: Any, *arguments: Any, **options: Any) -> Any:
        before = len(forwards)
        for name, call in calls.items():
            gradients = call(), call()
            timed[name] = [[x.shape for x in each] for each in gradients]
        assert len(forwards) == before
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(bench.measure, "sample", remember)

    def seen(out: torch.Tensor) -> torch.Tensor:
        forwards.append(1)
        return out

    case = BY_NAME["feature-sink"]
    (row,) = measured(case, "backward", Scripted("a", spoil=seen))
    assert row.status == "ok" and row.seconds == [1.0]
    q, k = (case.batch, case.q_heads, 64, 128), (case.batch, case.kv_heads, 64, 128)
    assert timed["a"] == [[q, k, k, (case.q_heads,)]] * 2


def test_samples_of_all_are_taken_in_turns():
    order: list[str] = []

    def named(name: str) -> Scripted:
        return Scripted(name, spoil=lambda out: (order.append(name), out)[1])

    measured(PLAIN, "forward", named("a"), named("b"), rounds=8, least=8)
    timed = order[-16:]
    assert all(set(timed[i : i + 2]) == {"a", "b"} for i in range(0, 16, 2))


def test_the_hosts_cost_is_measured_in_every_mode(device):
    names = [each.name for each in for_group("host") if each.name != "tilewise portable"]
    wanted = ("host-plain-training", "host forward and backward")
    case, work = next(pair for pair in comparisons("host") if (pair[0].name, pair[1]) == wanted)
    rows = {row.implementation: row for row in measured(case, work, *select(names), device=device)}
    if rows["tilewise hopper"].status == "unavailable":  # on another GPU
        assert "it needs a Hopper GPU" in rows.pop("tilewise hopper").reason
    if device.type == "cpu":  # there an emulator runs in the place of a launch
        assert rows.pop("tilewise hopper, no launch").status == "unavailable"
    assert {(row.status, row.reason) for row in rows.values()} == {("ok", "")} and len(rows) >= 5
    assert all(min(row.seconds) > 0 for row in rows.values())


def test_what_stays_is_not_collected_again():
    """A collection looks at what comparisons make, not at every object that PyTorch has."""
    there: list[int] = []
    before = len(gc.get_objects())
    try:
        measured(PLAIN, "forward", Scripted("a", prepare=lambda: there.append(len(gc.get_objects()))))
        assert there and before > 10 * there[0]
    finally:
        gc.unfreeze()


def test_peak_memory_is_that_of_one_call():
    log: list[str] = []

    class Cuda:
        def __getattr__(self, name: str) -> Any:
            amounts = {"memory_allocated": 100, "max_memory_allocated": 175}
            return lambda device: (log.append(name), amounts.get(name))[1]

    assert peak_bytes(lambda: log.append("call"), torch.device("cuda"), Cuda()) == 75
    before_and_after = ["synchronize", "reset_peak_memory_stats", "memory_allocated", "call"]
    assert log == [*before_and_after, "synchronize", "max_memory_allocated"]
    assert peak_bytes(lambda: None, CPU) is None


def test_a_cold_start_is_a_process_of_its_own():
    """The one process here takes its time; that its caches are empty is in its environment."""
    row = blank(PLAIN, "cold start", "cold start", IMPLEMENTATIONS["tilewise torch"])
    sample_cold_start(IMPLEMENTATIONS["tilewise torch"], PLAIN, row, CPU, 0.0, 3)
    assert row.status == "ok" and len(row.seconds) == 1 and 0 < row.error <= row.allowed_error


def test_a_cold_start_that_fails_says_so(monkeypatch):
    def run(command: list[str], **options: Any) -> Any:
        caches = [options["env"][name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
        assert not any(Path(cache).exists() for cache in caches)
        return subprocess.CompletedProcess(command, 1, b"", b"Traceback\nValueError: no such thing\n")

    monkeypatch.setattr(subprocess, "run", run)
    (row,) = measured(PLAIN, "cold start", IMPLEMENTATIONS["tilewise torch"])
    assert (row.status, row.reason) == ("failed", "RuntimeError: ValueError: no such thing")


def test_the_machine_is_described():
    found = machine.describe()
    assert found.versions["torch"] == torch.__version__ and found.date.endswith("+00:00")
    assert (found.gpu is None) == (not torch.cuda.is_available())
    if found.gpu is None:
        assert found.clocks == {} and found.arch is None


def test_clocks_and_driver_without_nvidia_ml_py(monkeypatch):
    """The command nvidia-smi is asked about the same GPU; what it does not tell is left out."""
    asked: list[list[str]] = []
    answers = {"clocks.sm,temperature.gpu,power.draw": "1980, 41, [N/A]\n", "driver_version": "580.1.2\n"}

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        said = answers[command[2].removeprefix("--query-gpu=")]
        return subprocess.CompletedProcess(command, 0, said, "")

    gpu = SimpleNamespace(uuid="1b2c")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    for name in ("clock_rate", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, raises(ModuleNotFoundError("pynvml")))
    monkeypatch.setattr(subprocess, "run", run)
    assert machine.clocks_now() == {"sm_mhz": 1980.0, "temperature_c": 41.0}
    assert machine._driver() == "580.1.2"
    assert [command[:2] for command in asked] == [["nvidia-smi", "--id=GPU-1b2c"]] * 2

    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.clocks_now() == {} and machine._driver() is None


def test_the_revision_says_whether_files_differ(tmp_path):
    assert machine.revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = machine.revision(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "other").write_text("not tracked")
    assert machine.revision(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert machine.revision(tmp_path) == clean + "-dirty"


def test_samples_reach_pytest_benchmark(tmp_path):
    """The benchmarks themselves, in a pytest of their own: statistics and JSON show what was measured."""
    pytest.importorskip("pytest_benchmark")
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    words = "short-d64-64 and (torch or math or flash_attn)"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_forward.py",
        "-p",
        "no:cacheprovider",
        "-k",
        words,
    ]
    command += ["--results", str(rows), f"--benchmark-json={report}", "-p", "no:xdist", "-rs"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times say nothing about speed" in done.stdout or torch.cuda.is_available()
    assert "unavailable: needs a GPU" in done.stdout or torch.cuda.is_available()
    by_line, by_report = load(rows), load(report)
    timed = {row.implementation: row for row in by_line.rows if row.status == "ok"}
    assert {"sdpa math", "tilewise torch"} <= timed.keys()
    assert {row.implementation: row for row in by_report.rows} == timed
    assert by_line.machine == by_report.machine and by_line.ceilings == by_report.ceilings
    assert {row.implementation for row in by_line.rows} - timed.keys() >= {"flash_attn 2"}
    for benchmark in json.loads(report.read_text())["benchmarks"]:
        row = benchmark["extra_info"]["row"]
        assert benchmark["stats"]["data"] == row["seconds"]
        assert benchmark["options"]["timer"] == "measured_time"
