"""The run for a GPU that is lent for minutes: its order, what it does again, what its screen says."""

import io
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import faults, first_light, gpu, lent, machine, rehearsal
from bench.__main__ import build_app
from bench.again import is_due
from bench.faults import Fault
from bench.jobs import PORTABLE, SUSPECT, Setting, measure_job
from bench.report import screen
from bench.results import Ceilings, Check, Machine, Results, Row, Stage, append, load
from harness.quick import quick_interpreter
from tilewise_reference import paper_grid

ON_GPU, HERE = Setting("cuda", 0), Setting("cpu", 0)
MACHINE = Machine("NVIDIA H200", "sm_90", "580", {"torch": "2.11.0"}, "abc", "2026-11-29T00:00:00+00:00")
PLANS = {plan.name: plan for plan in first_light.FIRST}


def results(*entries) -> Results:
    found = Results(MACHINE, name="results")
    for entry in entries:
        kind = {Check: found.checks, Row: found.rows, Stage: found.stages}.get(type(entry))
        if kind is None:
            found.ceilings = entry
        else:
            kind.append(entry)
    return found


def row(case: str, implementation: str, status: str = "ok", seconds: float = 1e-3, **also) -> Row:
    group = "backward grid" if also.get("work") == "backward" else "forward grid"
    return Row(group, case, also.pop("work", "forward"), implementation, status,
               seconds=[seconds] * (status == "ok"), flops=10**12, dtype="bfloat16",
               sizes=dict(head_dim=128, kv_len=4096, q_len=4096), **also)  # fmt: skip


# ---- Order


def test_the_first_run_takes_420_seconds_and_asks_the_most_telling_first():
    assert sum(plan.weight for plan in first_light.FIRST) == 420
    assert sum(plan.weight for plan in first_light.again(results())) <= 205
    assert [*PLANS] == ["canary", "hopper", "first ratios", "correctness", "other widths and the host",
                        "packed sequences", "tests", "ceilings"]  # fmt: skip
    canary = PLANS["canary"].jobs(ON_GPU)
    assert len(canary) == 18 and {job.limit for job in canary if job.hopper} == {25.0}
    ratios = PLANS["first ratios"].jobs(ON_GPU)
    assert [job.name for job in ratios[:4]] == [
        "paper-d128-full-4096, forward", "paper-d128-full-4096, backward",
        "paper-d128-causal-4096, forward", "paper-d128-causal-4096, backward",
    ]  # fmt: skip
    assert len(ratios) == 12 and all(job.arguments[1].head_dim == 128 for job in ratios)
    rivals = ("sdpa flash", "sdpa cudnn")
    for job in ratios:
        assert job.implementations == (
            (PORTABLE, SUSPECT, *rivals) if job.name.endswith("forward") else (PORTABLE, *rivals)
        )
    assert PLANS["first ratios"].processes(ON_GPU) == 1
    others = PLANS["other widths and the host"].jobs(ON_GPU)
    grid = [job for job in others if job.name.startswith("paper-")]
    assert {(job.arguments[1].head_dim, job.arguments[1].q_len) for job in grid} == {
        (dim, length) for dim in (64, 256) for length in (4096, 16384)
    }
    assert any(job.arguments[0] == "host" for job in others)
    packed = PLANS["packed sequences"].jobs(ON_GPU)
    assert {job.arguments[2] for job in packed} == {"forward", "backward"}
    assert {job.arguments[1].name for job in packed} == {
        f"packed-{name}"
        for name in ("llama3-8b-equal", "llama3-8b-dense", "llama3-8b-mixed", "llama2-7b-mixed")
    }
    assert all(job.implementations == (PORTABLE, *rivals, "varlen_attn") for job in packed)
    ahead = {job.key[1] for job in PLANS["correctness"].jobs(ON_GPU) if job.key[0] == "compiled"}
    assert {job.key for job in packed} <= ahead


def test_what_is_timed_was_compiled_beside_something_that_is_not():
    def kinds(*stages: str) -> set[tuple]:
        """What the compilers tell apart: Hopper's forward, in its schedule, the lengths too."""
        jobs = [job for name in stages for job in PLANS[name].jobs(ON_GPU) if "paper-" in job.name]
        return {
            (work, case.head_dim, "causal" in case.features, case.q_len if work == "forward" else None)
            for _, case, work, *_ in (job.arguments for job in jobs)
        }

    assert kinds("first ratios") == kinds("hopper") and kinds("correctness") == kinds(
        "other widths and the host"
    )
    assert all(job.key[0] == "compiled" for job in PLANS["hopper"].jobs(ON_GPU) if "paper-" in job.name)


def test_the_order_of_the_run_is_read_in_one_short_file():
    with open(first_light.__file__) as file:
        assert len(file.readlines()) < 150


# ---- Again


CASE = next(paper_grid((128,), (4096,), "bfloat16"))
COMPARISON = measure_job(ON_GPU, "forward grid", CASE, "forward", (PORTABLE, SUSPECT, "sdpa cudnn"))


@pytest.mark.parametrize(
    "rows, due",
    [
        ([], True),
        ([(PORTABLE, "ok"), (SUSPECT, "ok"), ("sdpa cudnn", "ok")], False),
        ([(PORTABLE, "ok"), (SUSPECT, "ok"), ("sdpa cudnn", "failed")], False),
        ([(PORTABLE, "ok"), (SUSPECT, "unsupported"), ("sdpa cudnn", "ok")], False),
        ([(PORTABLE, "ok"), (SUSPECT, "left out"), ("sdpa cudnn", "ok")], True),
        ([(PORTABLE, "wrong"), (SUSPECT, "ok"), ("sdpa cudnn", "ok")], True),
        ([(PORTABLE, "ok"), (SUSPECT, "ok")], True),
    ],
    ids=["nothing", "all", "a rival failed", "not for it", "hopper left out", "wrong", "a rival is missing"],
)
def test_a_comparison_is_made_again_where_an_answer_of_tilewise_is_missing_or_bad(rows, due):
    earlier = results(*(row(CASE.name, *each) for each in rows))
    assert is_due(COMPARISON, earlier) == due
    ahead = first_light.compile_jobs(lambda setting: [COMPARISON])(ON_GPU)
    assert is_due(ahead[0], earlier) == due


@pytest.mark.parametrize(
    "status, due",
    [("right", False), ("not applicable", False), ("hung", True), ("left out", True), ("wrong", True)],
)
def test_a_check_is_made_again_unless_it_was_right(status, due):
    job = PLANS["correctness"].jobs(HERE)[0]
    assert is_due(job, results(Check(job.name, status, 1.0))) == due and is_due(job, results())
    tests = PLANS["tests"].jobs(ON_GPU)[0]
    assert is_due(tests, results(Check(f"all of {tests.name}", status, 1.0))) == due


def test_the_second_run_begins_with_hoppers_canary_and_ends_with_what_there_was_no_time_for():
    earlier = [job for plan in first_light.FIRST for job in plan.jobs(ON_GPU)]
    done = results(
        Ceilings(1.0, {}),
        *(Check(job.name, "right", 1.0) for job in earlier if job.key[0] == "check"),
        *(Check(f"all of {job.name}", "right", 1.0) for job in earlier if job.key[0] == "tests"),
        *(
            replace(row(job.key[1], name, work=job.key[2]), group=job.key[0])
            for job in earlier
            for name in job.implementations
        ),
    )
    plans = {plan.name: plan for plan in first_light.again(done)}
    canary = plans["canary"].jobs(ON_GPU)
    assert len(canary) == 6 and all(job.hopper for job in canary)
    for name in PLANS.keys() - {"canary", "hopper"}:
        assert plans[name].jobs(ON_GPU) == [], name
    tuned = [job.name for job in plans["tuning"].jobs(ON_GPU)]
    assert len(tuned) == 9 and tuned[0] == "tuning: forward 16-bit 128"
    flex = plans["FlexAttention"].jobs(ON_GPU)
    assert {job.arguments[1].q_len for job in flex} == {4096, 16384}
    assert all(job.implementations[-1] == "flex" for job in flex)


# ---- Faults and what a process makes of them


def call(impl: str) -> torch.Tensor:
    import tilewise

    q = torch.zeros(1, 1, 2, 16)
    return tilewise.attention(q, q, q, impl=impl)


def test_planted_faults_are_in_the_calls_of_one_implementation_only():
    assert faults.perform(Fault("wrong", "torch"), call, "torch").eq(1).all()
    assert faults.perform(Fault("wrong", "portable"), call, "torch").eq(0).all()
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        faults.perform(Fault("memory", "torch"), call, "torch")
    assert call("torch").eq(0).all()


def test_the_rehearsal_notices_a_fault_that_cost_more_or_less_than_it_should():
    """Its verdict upon results as they must be, and upon such as must not."""
    short = first_light.WIDTH_128(HERE)[0]
    good = [
        *(Check(name, status, 0.1) for name, (_, status) in rehearsal.PLANTED.items()),
        replace(row(short.key[1], SUSPECT, "failed"), reason="out of memory: planted"),
        row("another", SUSPECT),
        row("another", PORTABLE),
        row(short.key[1], PORTABLE),
    ]
    stage = Stage("first ratios", [short.name], 1.0, 0, "")
    assert rehearsal.differences(results(*good, stage), short.name) == []
    for change in (
        [*good, Check("feature causal", "wrong", 0.1, "off")],
        [*good, row("third", PORTABLE, "failed", reason="CUDA error")],
        [*good, row("third", PORTABLE), row("third", SUSPECT, "left out", reason="its canary")],
        [*good, Stage("tests", ["never done"], 1.0, 0, "")],
        *([each for each in good if each is not left] for left in good),
    ):
        assert rehearsal.differences(results(*change, stage), short.name), change
    mended = [Check(name, "right", 0.1) for name in (*rehearsal.PLANTED, "tuning: forward 16-bit 128")]
    mended.append(row(short.key[1], SUSPECT))
    assert rehearsal.not_mended(results(*mended), short.name) == []
    for left in range(len(mended)):
        assert rehearsal.not_mended(results(*mended[:left], *mended[left + 1 :]), short.name)


def test_the_rehearsal_is_quick_where_nothing_is_learned_from_time(tmp_path, monkeypatch):
    """The interpreter, samples, the planted hang; no other limit, and neither tests nor tuning are cut."""
    asked = []
    monkeypatch.setattr(rehearsal, "conduct", asked.append)
    monkeypatch.setattr(rehearsal, "load", lambda path: None)
    rehearsal.carried_out(first_light.again(results()), tmp_path)
    (orders,) = asked
    assert orders.inside is quick_interpreter and orders.is_forked
    assert {plan.name: plan.most for plan in orders.plans if plan.most > 0.5} == {
        "tests": 70.0,
        "tuning": 10.0,
    }
    planted = {name: fault for name, (fault, _) in rehearsal.PLANTED.items()}
    before, after = (
        {job.name: job.limit for plan in plans for job in plan.jobs(HERE)}
        for plans in (first_light.FIRST, rehearsal.with_faults(first_light.FIRST, planted))
    )
    assert {name for name in before if before[name] != after[name]} == {
        name for name, fault in planted.items() if fault.kind == "hang"
    }


# ---- Tests as checks


TESTS = """
import os, time, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_lacks(): pytest.skip("no such GPU")
def test_dies(): os._exit(3)
def test_hangs(): time.sleep(60)
"""


def test_every_test_is_a_check_of_its_own(tmp_path):
    (tmp_path / "test_them.py").write_text(TESTS)
    file = tmp_path / "results.jsonl"
    append(file, MACHINE)
    command = [
        sys.executable, "-m", "pytest", str(tmp_path / "test_them.py"), "-q", "-n", "1", "-p",
        "bench.pytest_verdicts", "-p", "no:cacheprovider", "--timeout", "2", "--timeout-method", "thread",
        "--checks", str(file), "--rootdir", str(tmp_path), "-c", "/dev/null",
    ]  # fmt: skip
    subprocess.run(command, cwd=lent.ROOT, capture_output=True, timeout=120)
    found = {check.name.split("::")[-1]: check for check in load(file).checks}
    assert {name: check.status for name, check in found.items()} == {
        "test_right": "right", "test_wrong": "wrong", "test_lacks": "not applicable",
        "test_dies": "crashed", "test_hangs": "crashed",
    }  # fmt: skip
    assert "one is not two" in found["test_wrong"].detail and "no such GPU" in found["test_lacks"].detail


def test_tests_that_are_cut_leave_no_verdict_on_all_of_them(tmp_path):
    append(tmp_path / "results.jsonl", MACHINE)
    here = ("tests/reference/test_masks.py",)
    assert lent.do_tests("tests/test_cuda.py", here, str(tmp_path), False, 0.2) == ([], "")


def test_compute_sanitizer_is_asked_only_about_what_looked_wrong(tmp_path):
    setting = replace(ON_GPU, folder=tmp_path)
    file = tmp_path / lent.RESULTS
    append(file, MACHINE, Check("feature causal", "right", 0.1))
    assert lent.sanitizer_jobs(setting) == []
    append(file, Check("hopper: 1 x 1000, full", "hung", 20.0))
    assert {job.arguments[:2] for job in lent.sanitizer_jobs(setting)} == {
        ("memcheck", "hopper"), ("synccheck", "hopper")
    }  # fmt: skip
    append(file, Check("feature window", "wrong", 20.0))
    assert {job.arguments[1] for job in lent.sanitizer_jobs(setting)} == {"hopper", "portable"}


# ---- The screen


def shown(found: Results, *shortfall: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(screen.gpu_screen(found, [*shortfall]))
    return console.file.getvalue()


def test_the_screen_says_what_was_right_wrong_hung_and_not_reached():
    found = results(
        Stage("canary", ["a", "b", "c"], 40.0, 0, ""),
        Check("a", "right", 1.0),
        Check("b", "hung", 20.0, "not done after 20 s"),
        Stage(
            "first ratios", ["paper-d128-full-4096, forward", "paper-d128-causal-4096, forward"], 9.0, 0, ""
        ),
        row("paper-d128-full-4096", PORTABLE, seconds=2e-3),
        row("paper-d128-full-4096", SUSPECT, "left out", reason="its canary"),
        row("paper-d128-full-4096", "sdpa cudnn", seconds=1e-3),
    )
    stages = {each.stage: each for each in screen.reached(found)}
    assert stages["canary"].counts["right"] == stages["canary"].counts["hung"] == 1
    assert stages["canary"].missing == ("c",)
    assert stages["first ratios"].counts["left out"] == 1
    assert stages["first ratios"].missing == ("paper-d128-causal-4096, forward",)
    text = shown(found, "first ratios: there was time for 1 of 2")
    assert "HUNG b: not done after 20 s" in text and "there was time for 1 of 2" in text
    assert "2.00 ms" in text and "0.50×" in text and "sdpa cudnn 1.00 ms" in text
    assert "The largest gaps" in text and "0.50× paper-d128-full-4096, forward" in text
    assert "forward, head_dim 128, full, from 4k" in text and "left out: its canary" in text


CUDA_TESTS = "tests/test_cuda.py tests/test_numerics.py"


def test_tests_count_for_the_file_that_they_are_in():
    found = results(
        Stage("tests", [CUDA_TESTS, "tests/test_hopper_cuda.py"], 40.0, 0, ""),
        Check("tests/test_cuda.py::test_one", "right", 1.0),
        Check("tests/test_numerics.py::test_two", "crashed", 1.0),
        Check(f"all of {CUDA_TESTS}", "failed", 0.0, "pytest ended with 1: tests.log"),
    )
    (stage,) = screen.reached(found)
    assert stage.missing == ("tests/test_hopper_cuda.py",)
    assert {name: n for name, n in stage.counts.items() if n} == {
        "right": 1, "crashed": 1, "failed": 1, "not reached": 1
    }  # fmt: skip


def test_the_gaps_are_the_three_cases_furthest_behind():
    cases = [f"paper-d128-full-{length}" for length in (1024, 2048, 4096, 8192)]
    rows = [row(case, PORTABLE, seconds=s * 1e-3) for case, s in zip(cases, (2, 5, 3, 4), strict=True)]
    rows += [row(case, "sdpa flash", seconds=1e-3) for case in cases]
    lines = screen.gap_lines(screen.gather([results(*rows)])[0])
    assert [line.split(",")[0] for line in lines] == [
        "0.20× paper-d128-full-2048", "0.25× paper-d128-full-8192", "0.33× paper-d128-full-4096"
    ]  # fmt: skip


# ---- The command


def invoke(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(build_app("gpu"), ["gpu", *words])
    return done.exit_code, done.output


def test_the_screen_of_a_run_that_was_cut_can_be_shown_again(tmp_path):
    append(
        tmp_path / "results.jsonl",
        MACHINE,
        Stage("canary", ["a"], 40.0, 0, ""),
        Check("a", "wrong", 1.0, "x"),
    )
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"kind": "check", "na')
    code, output = invoke(str(tmp_path), "--screen")
    assert code == 0 and "WRONG a: x" in output and "NVIDIA H200" in output


def test_what_cannot_begin_says_why(tmp_path):
    code, output = invoke(str(tmp_path / "new"), "--again", str(tmp_path / "no such"))
    assert code == 2 and "no such" in output
    append(tmp_path / "results.jsonl", MACHINE)
    code, output = invoke(str(tmp_path))
    assert code == 2 and "is there already: choose another folder" in output


def test_everything_is_in_one_archive_and_logs_stay_short(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LARGEST_LOG", 100)
    (tmp_path / "results.jsonl").write_text("{}\n")
    (tmp_path / "workers.log").write_text("first" + "x" * 500 + "last")
    gpu.pack(tmp_path)
    log = (tmp_path / "workers.log").read_text()
    assert log.startswith("first") and log.endswith("last") and len(log) < 120
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        assert archive.getnames() == ["results.jsonl", "workers.log"]


def test_the_revision_travels_as_a_file(tmp_path):
    with pytest.raises(ValueError, match="is no git checkout"):
        machine.write_stamp(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = machine.revision(tmp_path)
    stamp = machine.write_stamp(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    assert len(commit) == 40
    (copy / stamp.name).write_text(stamp.read_text())
    subprocess.run(["rm", "-rf", str(tmp_path / ".git")], check=True)
    assert machine.revision(copy) == commit
    (copy / stamp.name).write_text(f"{commit} {'0' * 16}\n")  # other kernels than those that were stamped
    assert machine.revision(copy) == f"{commit}-dirty"
