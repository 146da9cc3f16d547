"""Evidence runs: the order of the stages, the time that each gets, and what becomes of what goes wrong."""

import operator
import os
import signal
from contextlib import nullcontext

import pytest
import typer
from typer.testing import CliRunner

from bench import conduct, jobs, stages
from bench import evidence as command
from bench.groups import comparisons
from bench.jobs import Job, Setting, in_turns, most_telling
from bench.results import Ceilings, Check, Machine, Stage, append, load, mend
from bench.run import CannotBegin, Deadline, compare, done_before
from bench.stages import Plan

from .runs import MACHINE, SETTING, Clock, Hands, make_run, passing, printed, row

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
            return [Check(name, "right", seconds)], ""

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
    assert [(s.name, s.jobs, s.seed) for s in results.stages] == [
        ("first", ["quick"], 7), ("second", [job.name for job in slow], 7), ("third", ["last"], 7)
    ]  # fmt: skip
    assert [check.name for check in results.checks] == ["quick", "slow 0", "last"]


def test_the_order_of_the_stages_and_of_the_grid():
    assert [plan.name for plan in stages.STAGES] == [
        "canary", "hopper", "correctness", "correctness at size", "compilation", "forward grid",
        "backward grid", "ceilings", "models and features", "overheads",
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
    monkeypatch.setattr(jobs, "measure", lambda case, work, given, **options: asked.append((given, options)))
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
    return jobs.measure_job(SETTING, "g", case, work, ("tilewise portable", "sdpa cudnn", "flex"))


# ---- Going on where another run stopped


def test_resume_does_what_is_missing_and_nothing_twice(tmp_path, comparison):
    path = tmp_path / "results.jsonl"
    append(
        path, MACHINE, Stage("s", ["a", "b"], 1.0, 7, "date"), Ceilings(None, {}), Check("fine", "right", 0.1)
    )
    append(path, Check("s: hung", "wrong", 0.1), row(comparison.key[1]))
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
    append(path, MACHINE, Stage("s", ["a", "b"], 1.0, 7, "date"))
    compare(load(path), MACHINE, 7)
    other = Machine("NVIDIA H200", "sm_90", "580", MACHINE.versions, MACHINE.revision, MACHINE.date)
    with pytest.raises(CannotBegin, match="gpu was None and is 'NVIDIA H200'; arch was"):
        compare(load(path), other, 7)
    with pytest.raises(CannotBegin, match="seed was 7 and is 8; choose another --out"):
        compare(load(path), MACHINE, 8)


@pytest.mark.parametrize("length", [0, 10, -10])
def test_a_file_cut_anywhere_is_mended(tmp_path, length):
    path = tmp_path / "results.jsonl"
    append(path, MACHINE, Check("one", "right", 0.1), Check("two", "right", 0.1))
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

    def hands(log, grace, preloaded, inside, is_forked) -> Hands:
        assert inside is nullcontext and not is_forked  # what is timed is Triton's, and CUDA survives no fork
        return Hands()

    def invoke(jobs: list[Job], *options: str) -> tuple[int, str]:
        monkeypatch.setattr(conduct, "Workers", hands)
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
        ([Check("a", "right", 0.1), row("c"), row("c", "flex", "wrong"), row("c", "sdpa", "failed")], 0),
        ([Check("a", "wrong", 0.1, "off by one")], 1),
        ([Check("a", "hung", 0.1, "not done after 20 s")], 1),
        ([Check("a", "left out", 0.1, "left out"), Check("b", "not applicable", 0.1)], 0),
        ([row("c", status="wrong", reason="too far")], 1),
        ([row("c", status="failed", reason="raised")], 1),
        ([row("c", status="unsupported", reason="cannot")], 0),
        ([row("c", status="left out", reason="its canary was not reached")], 0),
    ],
    ids=[
        "right",
        "failed check",
        "hung check",
        "nothing bad",
        "wrong answer",
        "failed row",
        "unsupported",
        "left out",
    ],
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


def test_a_process_that_does_not_end_holds_nobody_back(invoke, monkeypatch):
    """Python itself would wait for it, for ever."""
    ended = []
    monkeypatch.setattr(conduct.os, "_exit", ended.append)
    assert invoke([passing("a")])[0] == 0 and ended == []
    monkeypatch.setattr(Hands, "stuck", 1)
    assert invoke([passing("b")], "--resume")[0] == 0 and ended == [0]


def test_only_names_a_stage(invoke):
    code, output = invoke([], "--only", "nothing")
    assert code == 2 and "only one" in output
    assert invoke([passing("a")], "--only", "only one")[0] == 0


def test_only_gives_the_order_and_the_canary_comes_first():
    names = [plan.name for plan in command.chosen(["overheads", "forward grid"])]
    assert names == ["canary", "overheads", "forward grid"]
    assert [plan.name for plan in command.chosen(["hopper", "canary"])] == ["hopper", "canary"]
    assert command.chosen([]) == [*stages.STAGES]


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
    assert code == conduct.INTERRUPTED and "1 of 1 check passed" in output
    assert [check.name for check in load(tmp_path / "out" / "results.jsonl").checks] == ["a"]
    assert signal.getsignal(signal.SIGTERM) == before
