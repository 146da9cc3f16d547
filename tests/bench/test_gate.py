"""What is kept of a comparison whose process broke, and when Hopper's forward may run."""

from dataclasses import replace

import pytest

from bench import jobs
from bench.gate import salvage
from bench.groups import comparisons
from bench.jobs import Job, Setting
from bench.results import Check, Results, load
from bench.run import Run
from bench.stages import Plan
from bench.workers import Outcome, Task
from tilewise.tools.shrink import shortened

from .runs import SETTING, Hands, make_run, row


@pytest.fixture
def comparison() -> Job:
    case, work = comparisons("forward grid", tiny=True)[0]
    return jobs.measure_job(SETTING, "g", case, work, ("tilewise portable", "sdpa cudnn", "flex"))


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
    cases = comparisons("forward grid", tiny=True)[:2]
    first, second = (jobs.measure_job(SETTING, "g", case, work, ALL_THREE) for case, work in cases)
    ahead = replace(
        first, key="ahead", name="ahead", function=jobs.compile_ahead, timed=False, implementations=()
    )
    return [first, second, ahead]


def named(name: str, stage: str) -> Job:
    return next(job for job in jobs.check_jobs(stage)(SETTING) if job.name == name)


def opened(run: Run) -> Run:
    """As after canaries that have all passed."""
    run.begin(None)
    run.gate.see([Check(job.name, "right", 0.1) for job in jobs.canary_jobs(SETTING)])
    return run


def do(run: Run, name: str, *some: Job) -> Results:
    run.stage(Plan(name, 1, lambda setting: [*some], most=0.0), 60.0)
    return load(run.path)


def names_asked(hands: Hands) -> list[tuple[str, ...]]:
    return [task.arguments[3] for task in hands.asked if len(task.arguments) > 3]


ALL_THREE = ("tilewise portable", "tilewise hopper", "sdpa cudnn")
OTHERS = ("tilewise portable", "sdpa cudnn")


def test_nothing_of_hopper_runs_at_a_width_whose_canary_has_not_passed(with_hopper, tmp_path):
    first, _, ahead = with_hopper
    assert first.hopper == (128,)
    wide = named("hopper: bfloat16, width 128, full", "hopper")
    narrow = named("hopper: float16, width 64, full", "hopper")
    portable = named("feature causal", "correctness")
    hands = Hands()
    run = make_run(tmp_path / "results.jsonl", hands)
    run.begin(None)
    # One of the two at 128 is wrong; one at 256 does not apply.
    statuses = {64: ["right", "right"], 128: ["right", "wrong"], 256: ["not applicable", "right"]}
    for job in jobs.canary_jobs(SETTING):
        assert not run.gate.against(job)
        for width in job.hopper:
            run.gate.see([Check(job.name, statuses[width].pop(), 0.1)])
    run.stage(Plan("checks", 1, lambda setting: [wide, narrow, portable]), 60.0)
    results = do(run, "grid", first, ahead)
    assert [(check.name, check.status) for check in results.checks] == [
        (wide.name, "left out"), (narrow.name, "right"), (portable.name, "right")
    ]  # fmt: skip
    assert "the canary of Hopper's forward has not passed at width 128" in results.checks[0].detail
    assert names_asked(hands) == [OTHERS, OTHERS]
    left_out = next(r for r in results.rows if r.implementation == "tilewise hopper")
    assert left_out.status == "left out" and left_out.reason == results.checks[0].detail
    assert run.shortfall == []
    # Its tests run every width.
    assert run.gate.against(replace(portable, hopper=(64, 128, 256))) and not run.gate.against(narrow)


def test_where_a_process_hung_hoppers_forward_is_left_out_from_then_on(with_hopper, tmp_path):
    first, second, ahead = with_hopper
    hands = Hands(broken=(first.name,))
    run = opened(make_run(tmp_path / "results.jsonl", hands))
    results = do(run, "grid", first, second, ahead)
    assert names_asked(hands) == [ALL_THREE, OTHERS, OTHERS, OTHERS]
    rows = {(r.case, r.implementation): (r.status, r.reason) for r in results.rows}
    for job in (first, second):
        status, reason = rows[job.arguments[1].name, "tilewise hopper"]
        assert status == "left out" and reason.startswith("a process hung or ended with it aboard")
        assert rows[job.arguments[1].name, "tilewise portable"][0] == "ok"
    assert [(check.name, check.status) for check in results.checks] == [(f"grid: {first.name}", "crashed")]
    assert len(results.rows) == 6


def test_what_breaks_without_it_too_was_not_hoppers_doing(with_hopper, tmp_path):
    first, second, _ = with_hopper
    hands = Hands(broken=(first.name, first.name))
    do(opened(make_run(tmp_path / "results.jsonl", hands)), "grid", first, second)
    assert names_asked(hands) == [ALL_THREE, OTHERS, ("tilewise portable",), ALL_THREE]


def test_hopper_that_took_the_gpu_away_is_left_out_from_then_on(with_hopper, tmp_path):
    first, second, _ = with_hopper
    run = opened(make_run(tmp_path / "results.jsonl", Hands()))
    plan = Plan("grid", 1, lambda setting: [])
    bad = row("c", "tilewise hopper", "failed", reason="RuntimeError: CUDA error: an illegal memory access")
    again = run.take(plan, first, Outcome(Task(first.name, print, (), 1.0), 1.0, ([bad], ""), broken=True))
    assert again is not None and again.implementations == OTHERS
    assert "at " + first.name in run.gate.against(second) and not run.gate.against(again)


@pytest.mark.parametrize("seconds, left_out", [(16.0, True), (4.0, False)])
def test_a_check_of_hopper_that_is_cut_after_long_is_held_to_have_hung(tmp_path, seconds, left_out):
    run = opened(make_run(tmp_path / "results.jsonl", Hands()))
    job = named("hopper: three warpgroups", "hopper")
    cut = Outcome(Task(job.name, print, (), 30.0), seconds, error="the time was up", broken=True, cut=True)
    assert run.take(Plan("hopper", 1, lambda setting: [], limit=30.0), job, cut) is None
    assert bool(run.gate.against(job)) == left_out and load(run.path).checks == []


def test_a_check_of_hoppers_forward_that_hangs_keeps_it_out_of_what_is_timed(with_hopper, tmp_path):
    hanging = named("hopper: NaN beyond the lengths", "hopper")
    hands = Hands(broken=(hanging.name,))
    run = opened(make_run(tmp_path / "results.jsonl", hands))
    do(run, "hopper", hanging)
    do(run, "grid", with_hopper[0])
    assert hands.asked[-1].arguments[3] == OTHERS
    # Another check that breaks says nothing about it.
    run = opened(make_run(tmp_path / "other.jsonl", Hands(broken=("feature causal",))))
    results = do(run, "correctness", named("feature causal", "correctness"))
    assert not run.gate.against(hanging) and results.checks[0].status == "crashed"


def test_a_resumed_run_knows_which_canaries_passed(with_hopper, tmp_path):
    run = opened(make_run(tmp_path / "results.jsonl", Hands()))
    run.add(*(Check(job.name, "right", 0.1) for job in jobs.canary_jobs(SETTING)))
    later = make_run(tmp_path / "results.jsonl", Hands())
    assert later.gate.against(with_hopper[0])
    later.begin(load(run.path))
    assert not later.gate.against(with_hopper[0])


def test_every_canary_is_alike_to_the_compiler_when_its_gradients_are_judged():
    """So that nothing is compiled twice: heads and whole sixteens stay what they are."""
    for dim in jobs.CANARY_DIMS:
        for causal in (False, True):
            case = jobs.canary_case(dim, causal)
            short = shortened(case)
            assert (short.q_heads, short.kv_heads) == (case.q_heads, case.kv_heads)
            assert short.q_len % 16 == case.q_len % 16 == 0 and case.q_heads // case.kv_heads == 4
    canaries = jobs.canary_jobs(Setting("cuda", 0))
    assert len(canaries) == 18 and {job.lane for job in canaries if job.hopper} == {"hopper"}
    assert {job.lane for job in canaries if not job.hopper} == {""}


def test_a_job_that_hung_says_so(tmp_path):
    run = opened(make_run(tmp_path / "results.jsonl", Hands()))
    job = named("hopper: three warpgroups", "hopper")
    plan = Plan("hopper", 1, lambda setting: [], limit=30.0)
    hung = Outcome(Task(job.name, print, (), 30.0), 30.0, error="not done", broken=True, hung=True)
    assert run.take(plan, job, hung) is None
    (check,) = load(run.path).checks
    assert (check.name, check.status, check.detail) == (job.name, "hung", "not done")
    assert run.gate.against(job)
