"""`tilewise doctor`: what it finds on a machine that works, and on machines where something is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import typer
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

from harness.interpreted import set_interpreted
from tilewise.tools.doctor import command as doctor_command
from tilewise.tools.doctor import doctor
from tilewise.tools.doctor.doctor import Diagnosis, Finding, examine


def only(found: Diagnosis | list[Finding], subject: str) -> Finding:
    findings = found.findings if isinstance(found, Diagnosis) else found
    (finding,) = (f for f in findings if f.subject == subject)
    return finding


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(doctor_command.doctor)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_a_machine_that_works(device):
    found = examine()
    assert found.problems == ()
    topics = list(dict.fromkeys(f.topic for f in found.findings))
    assert topics == [topic for topic, _ in doctor.PROBES]
    assert only(found, "torch").found == torch.__version__
    assert only(found, "triton").found == triton.__version__
    assert only(found, f"impl='portable' on {device.type}").found == "available"
    assert only(found, "ptxas").found.split(", ")[0] == triton.knobs.nvidia.ptxas.path
    test = only(found, "attention")
    assert test.found.startswith(f"portable on {device.type}, fp32") and test.verdict == "ok"


def test_hoppers_kernels_have_their_lines_and_their_tests(device):
    """In the interpreter they run in an emulator; on a GPU that is no Hopper, it says what the GPU is."""
    found = examine()
    for work, line, test in (("hopper", "", "attention"), ("hopper_backward", ", gradients", "gradients")):
        line = only(found, f"impl='hopper' on {device.type}{line}")
        tests = [f for f in found.findings if f.subject == f"{test}, impl='hopper'"]
        if device.type == "cpu":
            assert (line.found, line.verdict) == ("available, in an emulator", "ok")
            assert tests[0].found.startswith("hopper on cpu, fp16") and tests[0].verdict == "ok"
        else:
            assert (line.verdict == "ok" and doctor.has_proven(work)) == bool(tests)


@pytest.mark.parametrize(
    "arch, name, verdict, said",
    [
        ("sm_90", "NVIDIA H200", "ok", "available where it is asked for: no GPU has shown yet"),
        ("sm_80", "NVIDIA A100", "note", "it needs a Hopper GPU (sm_90), and cuda:0 is NVIDIA A100 (sm_80)"),
    ],
)
def test_hoppers_kernels_on_gpus_that_are_not_here(arch, name, verdict, said, monkeypatch):
    """The probe asks for tensors on the GPU; fake ones have no memory, and need none. A torch that is built
    for CUDA would still start the GPU for them."""
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr("tilewise.plan.tiles.architecture", lambda device: arch)
    with FakeTensorMode():
        lines = [f for f in doctor.implementations() if f.subject.startswith("impl='hopper' on cuda")]
    # Without Hopper's forward there is nothing for its backward to follow.
    assert [f.subject.partition(", ")[2] for f in lines] == ["", "gradients"][: 2 if verdict == "ok" else 1]
    assert all(line.verdict == verdict and said in line.found for line in lines)


def test_what_a_gpu_has_proven_of_hoppers_forward_says_nothing_of_its_backward(monkeypatch):
    unproven = doctor.hopper_here("cuda", "hopper_backward")
    monkeypatch.setattr(doctor, "PROVEN", {("hopper", "sm_90", 2, 128)})
    assert doctor.hopper_here("cuda", "hopper") == "available"
    assert doctor.hopper_here("cuda", "hopper_backward") == unproven
    monkeypatch.setattr(doctor, "PROVEN", {("hopper_backward", "sm_90", 2, 128)})
    assert doctor.hopper_here("cuda", "hopper_backward") == "available where it is asked for"


def test_the_command_prints_every_finding(command):
    ran = command()
    assert ran.exit_code == 0, ran.output
    for words in ("versions", "self test", "✓ torch: ", "tilewise doctor: nothing wrong"):
        assert words in ran.output
    read = json.loads(command("--json").output)
    assert read["healthy"] and {f["verdict"] for f in read["findings"]} <= {"ok", "note"}


def test_a_problem_ends_with_status_1(command, monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 1))
    ran = command()
    assert ran.exit_code == 1 and "1 problem, marked ✗" in ran.output
    assert f"✗ torch: {torch.__version__}" in ran.output and "needs torch 99.1 or newer" in ran.output
    ran = command("--json")
    assert ran.exit_code == 1 and not json.loads(ran.output)["healthy"]


def test_a_broken_probe_stops_no_other(monkeypatch):
    def broken():
        yield Finding("GPU", "first", "found before it broke")
        raise RuntimeError("the driver is on holiday")

    probes = [(topic, broken if topic == "GPU" else probe) for topic, probe in doctor.PROBES]
    monkeypatch.setattr(doctor, "PROBES", tuple(probes))
    found = examine()
    assert only(found, "first").verdict == "ok"
    (problem,) = found.problems
    assert problem.topic == "GPU" and "RuntimeError: the driver is on holiday" in problem.found
    assert only(found, "attention").verdict == "ok"


def test_a_wrong_result_is_a_problem(device, monkeypatch):
    right = doctor.attention
    of_hopper = "hopper", torch.float16, device.type
    for given, factor in (
        ((None, torch.float32, device.type), 1.001),
        (of_hopper, 1.01),
        ((*of_hopper, True), 1.01),
    ):
        for by in (factor, torch.nan):
            monkeypatch.setattr(doctor, "attention", lambda *a, by=by, **b: right(*a, **b) * by)
            finding = doctor.tested(*given)
            assert finding.verdict == "problem" and "wrong" in finding.advice


def test_without_the_interpreter_a_cpu_runs_plain_pytorch():
    """A process of its own: TRITON_INTERPRET is read at import."""
    program = "import json; from tilewise.tools.doctor.doctor import examine; "
    program += "print(json.dumps(examine().to_dict()))"
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    read = json.loads(ran.stdout)
    assert read["healthy"], ran.stderr
    found = {f["subject"]: f for f in read["findings"]}
    runs = [f for f in read["findings"] if f["topic"] == "runs"]
    assert [f["subject"] for f in runs] == ["here"], "one line on what runs"
    assert "plain PyTorch on the CPU (impl=None is 'torch')" in runs[0]["found"]
    assert runs[0]["advice"].startswith("TRITON_INTERPRET=1 in the environment, before Python starts")
    assert "interpreter" not in " ".join(f["found"] + f["advice"] for f in read["findings"])
    assert "attention, impl='hopper'" not in found
    assert found["attention"]["found"].startswith("torch on cpu")
    assert found["GPU"]["verdict"] == "note" and found["GPU"]["advice"] == ""
    assert "TRITON_INTERPRET=0" in found["environment"]["found"]


@pytest.mark.parametrize(
    "interpreted, has_gpu, asked, found, advice",
    [
        (False, False, None, "plain PyTorch on the CPU", "TRITON_INTERPRET=1 in the environment"),
        (False, False, "1", "plain PyTorch on the CPU", "it was set after triton was imported"),
        (True, False, "1", "the kernels, in Triton's interpreter", ""),
        (True, True, "1", "the kernels, in Triton's interpreter", "unset TRITON_INTERPRET to use the GPU"),
        (False, True, "1", "the kernels on the GPU", "it was set after triton was imported"),
        (False, True, "0", "the kernels on the GPU", ""),
    ],
)
def test_what_runs_here_is_one_line(interpreted, has_gpu, asked, found, advice, monkeypatch):
    set_interpreted(monkeypatch, interpreted)
    monkeypatch.setattr(doctor, "INTERPRETED", interpreted)
    monkeypatch.setenv("TRITON_INTERPRET", asked or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    first = next(doctor.implementations())
    assert first.subject == "here" and found in first.found and advice in first.advice
    assert first.verdict == ("note" if advice else "ok") and bool(first.advice) == bool(advice)


@pytest.mark.parametrize("has_gpu, verdict", [(True, "problem"), (False, "note")])
def test_what_triton_needs_is_a_problem_where_there_is_a_gpu(has_gpu, verdict, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)

    class NoTool:
        @property
        def ptxas(self):
            raise RuntimeError("Cannot find ptxas")

    knobs = SimpleNamespace(nvidia=NoTool(), cache=SimpleNamespace(dir=tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "triton", SimpleNamespace(knobs=knobs))
    found = [*doctor.compilers(), *doctor.caches()]
    assert only(found, "C compiler").verdict == verdict and "gcc" in only(found, "C compiler").advice
    assert only(found, "ptxas").verdict == verdict and "Cannot find ptxas" in only(found, "ptxas").found
    compiled = only(found, "Triton's compiled kernels")
    assert compiled.verdict == verdict and "TRITON_CACHE_DIR" in compiled.advice


def test_a_folder_that_is_not_there_yet_can_be_made(tmp_path, monkeypatch):
    assert doctor.is_writable(tmp_path / "a" / "b") and not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.touch()
    assert not doctor.is_writable(file) and not doctor.is_writable(file / "below")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert not doctor.is_writable(tmp_path)


def test_missing_extras_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in ("tokenizers", "jax") else find(name)
    )
    found = list(doctor.extras())
    assert only(found, "demo").found == "lacks tokenizers"
    assert only(found, "demo").advice.startswith("pip install 'tilewise[demo]'")
    assert only(found, "tools").found == "complete"


@pytest.mark.parametrize(
    "given, numbers",
    [
        ("2.13.0+cpu", (2, 13)),
        ("3.6.0", (3, 6)),
        ("2.11.0a0+git1", (2, 11)),
        ("3.7rc1", (3, 7)),
        ("3", (3,)),
    ],
)
def test_versions_are_read(given, numbers):
    assert doctor.as_numbers(given) == numbers


def test_an_old_interpreter_and_a_new_numpy_do_not_go_together(monkeypatch):
    monkeypatch.setattr(doctor, "INTERPRETED", True)
    monkeypatch.setattr(doctor, "triton", SimpleNamespace(__version__="3.6.0"))
    for numpy, verdicts in (("2.4.1", ["problem"]), ("2.3.5", []), (None, [])):
        monkeypatch.setattr(doctor, "installed_version", lambda name, numpy=numpy: numpy)
        found = [f for f in doctor.versions() if f.subject == "numpy"]
        assert [f.verdict for f in found] == verdicts


# ---- GPUs that this machine does not have


def pretend(monkeypatch, name: str, arch: str, multiprocessors: int) -> None:
    properties = SimpleNamespace(
        name=name, total_memory=80 << 30, multi_processor_count=multiprocessors, gcnArchName=arch
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(doctor, "architecture", lambda device: arch)
    monkeypatch.setattr(doctor, "driver", lambda: "580.95")


@pytest.mark.parametrize(
    "name, arch, multiprocessors, said",
    [
        ("NVIDIA H200", "sm_90", 132, "H200 (NVIDIA H100 and H200"),
        ("NVIDIA H100 PCIe", "sm_90", 114, "132 multiprocessors, and this chip 114"),
        ("NVIDIA T1000", "sm_75", 14, "not in the list"),
    ],
)
def test_gpus_and_their_datasheets(name, arch, multiprocessors, said, monkeypatch):
    pretend(monkeypatch, name, arch, multiprocessors)
    found = list(doctor.gpus())
    assert only(found, "driver").found == "580.95"
    assert only(found, "cuda:0").found == f"{name}, {arch}, {multiprocessors} multiprocessors, 80 GiB"
    assert said in only(found, "datasheet").found


def test_the_table_of_tiles_in_force(monkeypatch):
    pretend(monkeypatch, "NVIDIA T1000", "sm_75", 14)
    row = SimpleNamespace(key=("dq", "sm_75", 2, 64))
    table = SimpleNamespace(
        path="/tiles/t1000.json", applied={1: row}, refused=[(row, "too large for sm_75")]
    )
    monkeypatch.setattr(doctor, "user_table", lambda device: table)
    found = list(doctor.tile_tables())
    assert "yours (/tiles/t1000.json), 1 of its rows" in only(found, "table for cuda:0").found
    assert "sm_80" in only(found, "shipped table").found
    assert only(found, f"row {row.key} of yours").found == "not used: too large for sm_75"

    def broken(device):
        raise ValueError("the tiles tuned for it cannot be read")

    monkeypatch.setattr(doctor, "user_table", broken)
    (finding,) = doctor.tile_tables()
    assert finding.verdict == "problem" and "cannot be read" in finding.found


def test_the_driver_is_asked_where_it_can_be(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.driver().startswith("unknown")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answers = [SimpleNamespace(returncode=0, stdout="580.95\n", stderr="")]
    answers += [SimpleNamespace(returncode=9, stdout="", stderr="no devices\n")]
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answers.pop(0))
    assert doctor.driver() == "580.95"
    assert doctor.driver() == "unknown: no devices"
