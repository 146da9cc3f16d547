"""Does the GPU run work, before a GPU sees it? Both of its runs on a CPU, with faults planted in the first.

Everything is tiny and interpreted, as in the tests; no job measures for long, processes are forked, and the
planted hang is ended early. The stages, their order, what shares a process and all other limits are the real
ones. A hang, a crash, a wrong answer and a lack of memory are planted: each must cost what it was planted in
and nothing else, and the second run must find all of it mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.rule import Rule

from . import first_light
from .conduct import Orders, conduct, console_here
from .faults import Fault
from .jobs import PORTABLE, SUSPECT, Job, Setting
from .report.screen import gpu_screen, reached
from .results import CheckStatus, Results, load
from .stages import Plan

SECONDS = 900.0  # each run; far more than it takes, so that a slow machine reaches everything too
MEASURING = 0.5  # seconds of one job, at most: the times say nothing
HUNG = 5.0  # after so many seconds the planted hang counts as one
# By check: the fault planted in it, and what the check must then say.
PLANTED: dict[str, tuple[Fault, CheckStatus]] = {
    "canary: hopper forward, width 64, full": (Fault("hang", "hopper"), "hung"),
    "canary: hopper forward, width 64, causal": (Fault("crash", "hopper"), "crashed"),
    "canary: hopper forward, width 256, causal": (Fault("wrong", "hopper"), "wrong"),
    "canary: portable forward, width 256, full": (Fault("crash", "portable"), "crashed"),
}
MEMORY = Fault("memory", "hopper")  # in the first comparison at width 128, where Hopper's canary passes


def rehearse(folder: Path) -> int:
    """Both runs; 0 if they went as they must."""
    if torch.cuda.is_available():
        raise ValueError("--rehearse is for a machine without a GPU: on this one, run it for good")
    console = console_here()
    problems: list[str] = []
    setting = Setting("cpu", 0)
    short_of_memory = first_light.WIDTH_128(setting)[0].name
    planted = {name: fault for name, (fault, _) in PLANTED.items()} | {short_of_memory: MEMORY}
    console.print(Rule(f"the first run, with {len(planted)} faults planted"))
    first = carried_out(with_faults(first_light.FIRST, planted), folder / "first")
    problems += [f"first run: {line}" for line in differences(first, short_of_memory)]
    console.print(Rule("the second run, without them"))
    second = carried_out(first_light.again(first), folder / "again")
    problems += [f"second run: {line}" for line in anything_bad(second)]
    problems += [f"second run: {line}" for line in not_mended(second, short_of_memory)]
    console.print(Rule("the rehearsal"))
    for line in problems or ["each fault cost what it was planted in, and nothing else; then all was mended"]:
        console.print(line, markup=False, soft_wrap=True)
    return 1 if problems else 0


def carried_out(plans: Sequence[Plan], folder: Path) -> Results:
    from harness.quick import quick_interpreter  # where `checks` has put the tests on the path

    briefly = [measured_briefly(plan) for plan in plans]
    orders = Orders(briefly, folder, SECONDS, grace=8.0, screen=gpu_screen, kept="screen.txt")
    conduct(replace(orders, inside=quick_interpreter, is_forked=True))
    return load(folder / "results.jsonl")


def with_faults(plans: Sequence[Plan], faults: dict[str, Fault]) -> list[Plan]:
    """The same stages, with these faults in the jobs of these names."""

    def planted(plan: Plan) -> Plan:
        def jobs(setting: Setting) -> list[Job]:
            return [with_fault(job, faults.get(job.name)) for job in plan.jobs(setting)]

        return replace(plan, jobs=jobs)

    return [planted(plan) for plan in plans]


def with_fault(job: Job, fault: Fault | None) -> Job:
    hangs = fault is not None and fault.kind == "hang"
    return replace(job, fault=fault, limit=HUNG if hangs else job.limit)


def measured_briefly(plan: Plan) -> Plan:
    """The same stage; what it measures, it measures for a moment. Tests and tuning end by themselves."""
    return plan if plan.name in ("tests", "tuning") else replace(plan, most=min(plan.most, MEASURING))


def differences(first: Results, short_of_memory: str) -> list[str]:
    """What the first run should have made of the faults and did not, or of anything else and should not."""
    found = {check.name: check.status for check in first.checks}
    lines = [
        f"{name} is {found.get(name)}, not {status}"
        for name, (_, status) in PLANTED.items()
        if found.get(name) != status
    ]
    others = [check for check in first.checks if check.is_bad and check.name not in PLANTED]
    lines += [f"{check.name} is {check.status}: {check.detail}" for check in others]
    lines += [
        f"{row.implementation} was left out of {row.case}"
        for row in first.rows
        if row.status == "left out" and (row.implementation != SUSPECT or 64 < row.sizes["head_dim"] <= 128)
    ]
    bad = [row for row in first.rows if row.status in ("wrong", "failed")]
    where = [(f"{row.case}, {row.work}", row.implementation, row.reason.split(":")[0]) for row in bad]
    if where != [(short_of_memory, SUSPECT, "out of memory")]:
        lines.append(f"rows that are wrong or failed: {where}")
    if not right_rows(first, SUSPECT):
        lines.append("no row of Hopper's forward is right, though its canary passed at width 128")
    if left := {row.key for row in first.rows} - right_rows(first, PORTABLE):
        lines.append(f"the portable kernels have no right row in {left}")
    return lines + missing(first)


def anything_bad(results: Results) -> list[str]:
    bad = [check for check in results.checks if check.is_bad or check.status == "left out"]
    lines = [f"{check.name} is {check.status}: {check.detail}" for check in bad]
    lines += [
        f"{row.implementation}, {row.case}, {row.work} is {row.status}: {row.reason}"
        for row in results.rows
        if row.status in ("wrong", "failed", "left out")
    ]
    return lines + missing(results)


def not_mended(second: Results, short_of_memory: str) -> list[str]:
    """What was bad in the first run and has no good answer in the second."""
    right = {check.name for check in second.checks if check.passed}
    right |= {f"{case}, {work}" for _, case, work in right_rows(second, SUSPECT)}
    lines = [f"{name} was not done again" for name in (*PLANTED, short_of_memory) if name not in right]
    if not any(name.startswith("tuning: ") for name in right):
        lines.append("nothing was tuned")
    return lines


def right_rows(results: Results, implementation: str) -> set[tuple[str, str, str]]:
    return {row.key for row in results.rows if (row.implementation, row.status) == (implementation, "ok")}


def missing(results: Results) -> list[str]:
    return [f"{each.stage}: not reached: {name}" for each in reached(results) for name in each.missing]
