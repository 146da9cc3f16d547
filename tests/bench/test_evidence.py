"""Evidence runs: the order of the stages, the time that each gets, and what becomes of what goes wrong."""

import ctypes
import io
import operator
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench import evidence as command
from bench import stages, workers
from bench.groups import comparisons
from bench.machine import describe
from bench.progress import Progress
from bench.results import Ceilings, Check, Machine, Row, Stage, append, load, mend
from bench.run import CannotBegin, Deadline, Run, compare, done_before
from bench.stages import Job, Plan, Setting, in_turns, most_telling, salvage
from bench.workers import Outcome, Task, Workers

MACHINE = Machine(None, None, None, {"torch": "2.13.0"}, "abc", "2026-11-24T00:00:00+00:00")
SETTING = Setting("cuda" if torch.cuda.is_available() else "cpu", 7)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Hands:
    """Does the tasks in this process, and calls a task that raises what Workers calls it."""

    def __init__(self, clock=time.monotonic, broken: tuple[str, ...] = ()) -> None:
        self.clock, self.broken, self.asked = clock, broken, []

    def run(self, tasks: Iterator[Task], until: float, count: int = 1) -> Iterator[Outcome]:
        while self.clock() < until:
            task = next(tasks, None)
            if task is None:
                return
            self.asked.append(task)
            if task.name in self.broken:
                first = self.broken.index(task.name)
                self.broken = self.broken[:first] + self.broken[first + 1 :]
                yield Outcome(task, 1.0, error="its process ended with exit code 3", broken=True)
                continue
            try:
                value = MACHINE if task.function is describe else task.function(*task.arguments)
            except Exception as raised:
                yield Outcome(task, 1.0, error=workers.last_lines(raised))
            else:
                yield Outcome(task, 1.0, value)

    def close(self) -> None:
        pass


def row(case: str, implementation: str = "tilewise portable", status: str = "ok", **also) -> Row:
    return Row("g", case, "forward", implementation, status, seconds=[1e-3] * (status == "ok"), **also)


def passing(name: str) -> Job:
    return Job(("check", name), name, lambda: ([Check(name, True, 0.1)], ""), ())


def make_run(path: Path, hands: Hands, seconds: float = 60.0) -> Run:
    console = Console(file=io.StringIO(), width=200)
    deadline = Deadline(seconds, hands.clock(), hands.clock)
    return Run(path, SETTING, hands, Progress(console, time.monotonic(), seconds, SETTING.on_gpu), deadline)


def printed(run: Run) -> str:
    return run.progress.console.file.getvalue()


# ---- Time


def test_what_a_stage_leaves_over_is_shared_out_among_the_later_ones():
    clock = Clock()
    deadline = Deadline(100.0, clock.now, clock)
    assert deadline.share(1, 3) == 25.0
    clock.now += 5  # it took 5 of its 25
    assert deadline.share(1, 2) == pytest.approx(95 / 3)
    clock.now += 80
    assert deadline.share(5, 0) == 15.0
    clock.now += 20
    assert deadline.left == 0 and deadline.share(1, 1) == 0


def test_stages_in_order_each_within_its_share(tmp_path):
    clock, seen = Clock(), []

    def job(name: str, seconds: float) -> Job:
        def work(given: float) -> tuple[list, str]:
            seen.append((name, given))
            clock.now += seconds
            return [Check(name, True, seconds)], ""

        return Job(("check", name), name, work, (), timed=True)

    slow = [job(f"slow {i}", 30.0) for i in range(4)]
    plans = [
        Plan("first", 1, lambda setting: [job("quick", 2.0)], most=4.0),
        Plan("second", 1, lambda setting: slow, most=1000.0),
        Plan("third", 2, lambda setting: [job("last", 1.0)], most=1000.0),
    ]
    run = make_run(tmp_path / "results.jsonl", Hands(clock), seconds=80.0)
    run.begin(None)
    run.stages(plans)
    # 20 s of 80 for the first, whose job measures for 4 at most; 26 of 78 for the second; then 78 - 30.
    # A job measures for half of its part.
    assert seen == [("quick", 4.0), ("slow 0", pytest.approx(26 / 8)), ("last", pytest.approx(24.0))]
    assert run.shortfall == ["second: there was time for 1 of 4"]
    results = load(run.path)
    assert [(s.name, s.planned, s.seed) for s in results.stages] == [
        ("first", 1, 7), ("second", 4, 7), ("third", 1, 7)
    ]  # fmt: skip
    assert [check.name for check in results.checks] == ["quick", "slow 0", "last"]


def test_the_order_of_the_stages_and_of_the_grid():
    assert [plan.name for plan in stages.STAGES] == [
        "ceilings", "hopper", "correctness", "correctness at size", "compilation", "forward grid",
        "backward grid", "models and features", "overheads",
    ]  # fmt: skip
    pairs = sorted(comparisons("forward grid", tiny=False), key=most_telling)
    assert len(pairs) == 36
    assert {case.name for case, _ in pairs[:2]} == {"paper-d128-full-4096", "paper-d128-causal-4096"}
    early = {case.name for case, _ in pairs[:12]}
    assert {"paper-d128-causal-16384", "paper-d64-full-4096", "paper-d256-causal-4096"} <= early
    assert in_turns([[1, 2, 3], [], [4]]) == [1, 4, 2, 3]


def test_what_is_compiled_ahead_is_measured_later_and_leaves_no_row(monkeypatch):
    plans = {plan.name: plan for plan in stages.STAGES}
    assert plans["compilation"].jobs(SETTING) == []  # the interpreter compiles nothing
    ahead = plans["compilation"].jobs(Setting("cuda", 3))
    later = [
        job for name in ("forward grid", "backward grid") for job in plans[name].jobs(Setting("cuda", 3))
    ]
    assert [job.key for job in ahead[:2]] == [
        ("compiled", later[0].key),
        ("compiled", later[len(later) // 2].key),
    ]
    assert {job.key for job in ahead} == {("compiled", job.key) for job in later}
    assert not any(job.timed or job.implementations for job in ahead)

    asked = []
    monkeypatch.setattr(
        stages, "measure", lambda case, work, given, **options: asked.append((given, options))
    )
    assert ahead[0].function(*ahead[0].arguments) == ([], "")
    ((given, options),) = asked
    assert {each.name for each in given} == {"tilewise portable", "tilewise hopper", "flex"}
    assert options["seconds"] == 0 and options["rounds"] == 1


# ---- What goes wrong


def test_a_job_that_raises_is_a_failed_check_and_the_next_goes_on(tmp_path):
    def work() -> None:
        raise RuntimeError("no such luck")

    def no_jobs(setting: Setting) -> list[Job]:
        raise KeyError("a stage that cannot begin")

    plans = [
        Plan("a", 1, lambda setting: [Job("x", "the job", work, ()), passing("fine")]),
        Plan("b", 1, no_jobs),
        Plan("c", 1, lambda setting: [passing("also fine")]),
    ]
    run = make_run(tmp_path / "results.jsonl", Hands())
    run.begin(None)
    run.stages(plans)
    checks = load(run.path).checks
    assert [(check.name, check.passed) for check in checks] == [
        ("a: the job", False), ("fine", True), ("b: its jobs", False), ("also fine", True)
    ]  # fmt: skip
    assert "RuntimeError: no such luck" in checks[0].detail and "cannot begin" in checks[2].detail
    assert "FAILED a: the job" in printed(run) and run.shortfall == []


@pytest.fixture
def comparison() -> Job:
    case, work = comparisons("forward grid", tiny=True)[0]
    return stages.measure_job(SETTING, "g", case, work, ("tilewise portable", "sdpa cudnn", "flex"))


def test_a_comparison_that_lost_the_gpu_is_made_again_without_the_culprit(comparison):
    rows = [
        row("c"),
        row(
            "c", "sdpa cudnn", "failed", reason="RuntimeError: Triton Error [CUDA]: an illegal memory access"
        ),
        row("c", "flex", "failed", reason="RuntimeError: CUDA error: an illegal memory access"),
    ]
    kept, again = salvage(comparison, rows)
    assert kept == [rows[1]]
    assert again.implementations == again.arguments[3] == ("tilewise portable", "flex")
    assert again.key == comparison.key
    memory = row("c", "flex", "failed", reason="out of memory: CUDA out of memory")
    assert salvage(comparison, [rows[0], memory]) == ([rows[0], memory], None)


def test_a_comparison_whose_process_died_is_made_again_by_tilewise_alone(comparison, tmp_path):
    kept, again = salvage(comparison, [])
    assert kept == [] and again.implementations == ("tilewise portable",)
    assert salvage(again, []) == ([], None)

    hands = Hands(broken=(comparison.name,))
    run = make_run(tmp_path / "results.jsonl", hands)
    run.begin(None)
    run.stage(Plan("grid", 1, lambda setting: [comparison], most=0.0), 60.0)
    assert [task.arguments[3] for task in hands.asked[1:]] == [
        comparison.implementations,
        again.implementations,
    ]
    results = load(run.path)
    assert [(check.name, check.passed) for check in results.checks] == [(f"grid: {comparison.name}", False)]
    assert [(r.implementation, r.status) for r in results.rows] == [("tilewise portable", "ok")]
    assert run.shortfall == []


# ---- Hopper's forward, of which nobody knows yet whether it ends


@pytest.fixture
def with_hopper() -> list[Job]:
    """Two comparisons of which Hopper's forward is a part, and one that is compiled ahead."""
    names = ("tilewise portable", "tilewise hopper", "sdpa cudnn")
    jobs = [
        stages.measure_job(SETTING, "g", case, work, names)
        for case, work in comparisons("forward grid", tiny=True)[:2]
    ]
    ahead = replace(
        jobs[0], key="ahead", name="ahead", function=stages.compile_ahead, timed=False, implementations=()
    )
    return [*jobs, ahead]


def names_asked(hands: Hands) -> list[tuple[str, ...]]:
    return [task.arguments[3] for task in hands.asked if task.function is not describe]


ALL_THREE = ("tilewise portable", "tilewise hopper", "sdpa cudnn")
OTHERS = ("tilewise portable", "sdpa cudnn")


def test_where_a_process_hung_hoppers_forward_is_left_out_from_then_on(with_hopper, tmp_path):
    first, second, ahead = with_hopper
    hands = Hands(broken=(first.name,))
    run = make_run(tmp_path / "results.jsonl", hands)
    run.begin(None)
    run.stage(Plan("grid", 1, lambda setting: [first, second, ahead], most=0.0), 60.0)
    assert names_asked(hands) == [ALL_THREE, OTHERS, OTHERS, OTHERS]
    results = load(run.path)
    rows = {(r.case, r.implementation): (r.status, r.reason) for r in results.rows}
    for job in (first, second):
        status, reason = rows[job.arguments[1].name, "tilewise hopper"]
        assert status == "failed" and reason.startswith("left out: a process of this run hung")
        assert rows[job.arguments[1].name, "tilewise portable"][0] == "ok"
    assert [check.name for check in results.checks] == [f"grid: {first.name}"] and len(results.rows) == 6


def test_what_breaks_without_it_too_was_not_hoppers_doing(with_hopper, tmp_path):
    first, second, _ = with_hopper
    hands = Hands(broken=(first.name, first.name))
    run = make_run(tmp_path / "results.jsonl", hands)
    run.begin(None)
    run.stage(Plan("grid", 1, lambda setting: [first, second], most=0.0), 60.0)
    assert names_asked(hands) == [ALL_THREE, OTHERS, ("tilewise portable",), ALL_THREE]


def test_a_check_of_hoppers_forward_that_hangs_keeps_it_out_of_what_is_timed(with_hopper, tmp_path):
    name = stages.checks.HOPPER[0].name
    checks = [job for job in stages.check_jobs("hopper")(SETTING) if job.name == name]
    hands = Hands(broken=(name,))
    run = make_run(tmp_path / "results.jsonl", hands)
    run.begin(None)
    run.stage(Plan("hopper", 1, lambda setting: checks), 60.0)
    assert run.suspected == ("check", name)
    run.stage(Plan("grid", 1, lambda setting: with_hopper[:1], most=0.0), 60.0)
    assert hands.asked[-1].arguments[3] == OTHERS
    # Another check that breaks says nothing about it.
    run = make_run(tmp_path / "other.jsonl", Hands(broken=("feature causal",)))
    run.begin(None)
    causal = [job for job in stages.check_jobs("correctness")(SETTING) if job.name == "feature causal"]
    run.stage(Plan("correctness", 1, lambda setting: causal), 60.0)
    assert run.suspected is None and not load(run.path).checks[0].passed


# ---- Processes


@pytest.fixture
def hired(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "STARTING", 0.0)
    hired = Workers(tmp_path / "workers.log", grace=0.2)
    yield hired
    hired.close()


def test_workers_outlive_what_their_processes_do(hired):
    ends = {
        "adds": (operator.add, (1, 2)),
        "raises": (operator.add, (1, "2")),
        "exits": (os._exit, (3,)),
        "crashes": (ctypes.string_at, (0,)),
        "hangs": (time.sleep, (60,)),
        "goes on": (operator.mul, (2, 3)),
    }
    tasks = [Task(name, *work, seconds=1.0) for name, work in ends.items()]
    found = {done.task.name: done for done in hired.run(tasks, time.monotonic() + 30.0)}
    assert list(found) == list(ends)
    assert (found["adds"].value, found["goes on"].value) == (3, 6)
    assert "TypeError" in found["raises"].error and not found["raises"].broken
    assert "exit code 3" in found["exits"].error and "SIGSEGV" in found["crashes"].error
    assert "not done after 1 s" in found["hangs"].error
    assert [name for name, done in found.items() if done.broken] == ["exits", "crashes", "hangs"]
    log = hired.log.read_text()
    assert "Segmentation fault" in log and "serve" in log


def test_workers_stop_when_the_time_is_up(hired):
    tasks = [Task(f"sleeps {i}", time.sleep, (60,), 60.0) for i in range(3)]
    began = time.monotonic()
    found = list(hired.run(tasks, began + 0.5, count=2))
    assert time.monotonic() - began < 10
    assert [(done.task.name, done.cut, done.broken) for done in found] == [
        ("sleeps 0", True, True), ("sleeps 1", True, True)
    ]  # fmt: skip


# ---- Going on where another run stopped


def test_resume_does_what_is_missing_and_nothing_twice(tmp_path, comparison):
    path = tmp_path / "results.jsonl"
    append(path, MACHINE, Stage("s", 2, 1.0, 7, "date"), Ceilings(None, {}), Check("fine", True, 0.1))
    append(path, Check("s: hung", False, 0.1), row(comparison.key[1]))
    with path.open("a") as file:
        file.write('{"kind": "row", "group": "g", "ca')
    mend(path)
    earlier = load(path)
    known = done_before(earlier)
    assert known[comparison.key] == {"tilewise portable"} and "ceilings" in known

    hands = Hands()
    run = make_run(path, hands)
    run.begin(earlier)
    jobs = [
        passing("fine"),
        passing("new"),
        Job("other", "hung", operator.add, (1, "2")),
        Job("ceilings", "ceilings", operator.add, (1, "2")),
        comparison,
    ]
    run.stage(Plan("s", 1, lambda setting: jobs), 60.0)
    assert [task.name for task in hands.asked] == ["machine", "new", comparison.name]
    results = load(path)
    assert [check.name for check in results.checks] == ["fine", "s: hung", "new"]
    assert len(path.read_text().splitlines()) == 6 + 2 + 3  # a stage, a check and three rows more


def test_resume_on_another_machine_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, MACHINE, Stage("s", 2, 1.0, 7, "date"))
    compare(load(path), MACHINE, 7)
    other = Machine("NVIDIA H200", "sm_90", "580", MACHINE.versions, MACHINE.revision, MACHINE.date)
    with pytest.raises(CannotBegin, match="gpu was None and is 'NVIDIA H200'; arch was"):
        compare(load(path), other, 7)
    with pytest.raises(CannotBegin, match="seed was 7 and is 8; choose another --out"):
        compare(load(path), MACHINE, 8)


@pytest.mark.parametrize("length", [0, 10, -10])
def test_a_file_cut_anywhere_is_mended(tmp_path, length):
    path = tmp_path / "results.jsonl"
    append(path, MACHINE, Check("one", True, 0.1), Check("two", True, 0.1))
    whole = path.read_bytes()
    path.write_bytes(whole[:length] if length else whole)
    mend(path)
    mended = path.read_bytes()
    assert whole.startswith(mended) and (mended == b"" or mended.endswith(b"\n"))
    assert len(mended.splitlines()) == {0: 3, 10: 0, -10: 2}[length]


# ---- The command


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run the command with these stages, in this process; its exit code and what it printed."""

    def invoke(jobs: list[Job], *options: str) -> tuple[int, str]:
        monkeypatch.setattr(command, "Workers", lambda log, grace: Hands())
        monkeypatch.setattr(command, "STAGES", (Plan("only one", 1, lambda setting: jobs),))
        app = typer.Typer()
        app.command()(command.evidence)
        out = str(tmp_path / "out")
        done = CliRunner().invoke(app, ["--out", out, "--seed", "7", "--minutes", "0.2", *options])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    return invoke


def bringing(*entries) -> Job:
    return Job("k", "it", lambda: (list(entries), ""), ())


@pytest.mark.parametrize(
    "entries, code",
    [
        ([Check("a", True, 0.1), row("c"), row("c", "flex", "wrong"), row("c", "sdpa", "failed")], 0),
        ([Check("a", False, 0.1, "off by one")], 1),
        ([row("c", status="wrong", reason="too far")], 1),
        ([row("c", status="failed", reason="raised")], 1),
        ([row("c", status="unsupported", reason="cannot")], 0),
    ],
    ids=["right", "failed check", "wrong answer", "failed row", "unsupported"],
)
def test_exit_code(invoke, tmp_path, entries, code):
    found, output = invoke([bringing(*entries)])
    assert found == code, output
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2 + len(entries)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert all(getattr(entry, "detail", "") in summary for entry in entries)


def test_results_are_not_mixed_unasked(invoke, tmp_path):
    assert invoke([bringing(row("c"))])[0] == 0
    code, output = invoke([bringing(row("c"))])
    assert code == 2 and "--resume" in output
    assert invoke([passing("more")], "--resume")[0] == 0
    results = load(tmp_path / "out" / "results.jsonl")
    assert (len(results.rows), len(results.checks)) == (1, 1)


def test_only_names_a_stage(invoke):
    code, output = invoke([], "--only", "nothing")
    assert code == 2 and "only one" in output
    assert invoke([passing("a")], "--only", "only one")[0] == 0


@pytest.fixture
def heeds_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and so does what that starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_the_summary(invoke, tmp_path, heeds_ctrl_c, number):
    before = signal.getsignal(signal.SIGTERM)
    stop = Job("k", "stop", lambda: os.kill(os.getpid(), number), ())
    code, output = invoke([passing("a"), stop, passing("b")])
    assert code == command.INTERRUPTED and "1 of 1 check passed" in output
    assert [check.name for check in load(tmp_path / "out" / "results.jsonl").checks] == ["a"]
    assert signal.getsignal(signal.SIGTERM) == before
