"""What does a GPU that is lent for minutes do first, what next? The two runs of `.ci/gpu`, in order.

The weights are seconds: a stage that needs fewer leaves them to those after it, and one that needs more
takes as much from all of these. Everything of Hopper's forward waits for its canary (gate.py).
docs/gpu_run.md says how to read what comes of it.

    FIRST   420 s    a kernel that works at all → the first ratios → every feature → packed → the rest
    AGAIN   200 s    what failed there or was not reached → tuning → FlexAttention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tilewise_reference.cases import Case

from .again import is_due
from .jobs import (
    PORTABLE,
    SUSPECT,
    Jobs,
    canary_jobs,
    ceiling_jobs,
    check_jobs,
    compile_jobs,
    measure_jobs,
    most_telling,
    one_after_the_other,
    one_of_each,
)
from .lent import compile_for_tuning, jobs_of_tests, sanitizer_jobs, tuning_jobs
from .results import Results
from .stages import Plan

RIVALS = ("sdpa cudnn", "sdpa flash")  # the fastest there are without another package; nobody else at first


def grid(*dims: int, lengths: tuple[int, ...], backward_lengths: tuple[int, ...] | None = None) -> Jobs:
    """The papers' grid at these dimensions and lengths, forward and backward in turns. The backward after
    Hopper's forward is the portable one."""

    def at(lengths: tuple[int, ...]) -> Callable[[Case], bool]:
        return lambda case: case.head_dim in dims and (case.q_len in lengths or case.name.endswith("-tiny"))

    forward = measure_jobs(
        "forward grid", order=most_telling, names=(PORTABLE, SUSPECT, *RIVALS), only=at(lengths)
    )
    backward = measure_jobs(
        "backward grid", order=most_telling, names=(PORTABLE, *RIVALS), only=at(backward_lengths or lengths)
    )
    return one_of_each(forward, backward)


def compiled(*dims: int, lengths: tuple[int, ...]) -> Jobs:
    """The kernels of that grid. All lengths have the same backward; Hopper's schedule may tell them apart."""
    return compile_jobs(grid(*dims, lengths=lengths, backward_lengths=lengths[:1]))


def some(jobs: Jobs, count: int) -> Jobs:
    """All of the jobs on a GPU; in the interpreter, where they show that the run works, the first of them."""
    return lambda setting: jobs(setting)[: None if setting.on_gpu else count]


FEWER, ALL = (4096, 16384), (4096, 8192, 16384)
WIDTH_128, OTHER_WIDTHS = grid(128, lengths=ALL), grid(64, 256, lengths=FEWER)
PACKED = measure_jobs(
    "packed forward", "packed backward", order=lambda pair: "mixed" not in pair[0].name,
    names=(PORTABLE, *RIVALS, "varlen_attn"),
    only=lambda case: "llama3-8b" in case.name or "llama2-7b-mixed" in case.name,
)  # fmt: skip
HOST = measure_jobs("host", names=(PORTABLE, SUSPECT, "sdpa"))
TESTS = one_after_the_other(
    # The second file asks whether sums depend on their place, which machine code does not show; the third
    # whether PyTorch reaches the kernels through its own registry.
    jobs_of_tests(
        "tests/test_cuda.py",
        "tests/test_numerics.py",
        "tests/test_flash_impl_cuda.py",
        without_gpu="tests/reference/test_yardstick.py",
    ),
    jobs_of_tests("tests/test_hopper_cuda.py", without_gpu="tests/reference/test_masks.py", hopper=True),
)

FIRST: tuple[Plan, ...] = (
    # Limits are long enough for a job that compiles everything itself: what only seems to hang costs more.
    Plan("canary", 50, canary_jobs, limit=45, beside=14),
    Plan(
        "hopper", 25, one_after_the_other(compiled(128, lengths=ALL), some(check_jobs("hopper"), 4)),
        limit=75, beside=14,
    ),
    Plan("first ratios", 90, some(WIDTH_128, 3), most=4.0, limit=50),
    Plan(
        "correctness", 90,
        one_after_the_other(
            compiled(64, 256, lengths=FEWER), compile_jobs(PACKED), some(check_jobs("correctness"), 4)
        ),
        limit=90, beside=10,
    ),
    Plan("other widths and the host", 60, one_after_the_other(some(OTHER_WIDTHS, 4), some(HOST, 1)), most=2.0,
         limit=50),
    Plan("packed sequences", 20, some(PACKED, 2), most=1.0, limit=50),
    Plan("tests", 70, TESTS, most=70.0, limit=90, beside=2, measuring=1.0),
    Plan("ceilings", 15, ceiling_jobs, most=6.0),
)  # fmt: skip


def again(earlier: Results) -> tuple[Plan, ...]:
    """The second run: of the first what was not right there or not reached, then what it had no time for."""

    def due(jobs: Jobs) -> Jobs:
        return lambda setting: [job for job in jobs(setting) if is_due(job, earlier)]

    def rest(name: str, weight: float, change: Callable[[Jobs], Jobs] = due) -> Plan:
        plan = next(plan for plan in FIRST if plan.name == name)
        return replace(plan, weight=weight, jobs=change(plan.jobs))

    def and_compilation(jobs: Jobs) -> Jobs:
        return one_after_the_other(compile_for_tuning, compile_jobs(flex), due(jobs))

    def fresh_canary(jobs: Jobs) -> Jobs:
        # Hopper's must pass on this machine, with the kernels as they are now.
        return lambda setting: [job for job in jobs(setting) if job.hopper or is_due(job, earlier)]

    flex = measure_jobs(
        "forward grid", "backward grid", order=most_telling, names=(PORTABLE, SUSPECT, "flex"),
        only=lambda case: case.head_dim == 128 and case.q_len in (64, 4096, 16384),
    )  # fmt: skip
    return (
        rest("canary", 35, fresh_canary),
        rest("hopper", 45, and_compilation),
        rest("first ratios", 20),
        rest("correctness", 12),
        rest("other widths and the host", 8),
        rest("packed sequences", 6),
        rest("tests", 12),
        Plan("tuning", 40, tuning_jobs, most=10.0, limit=60, measuring=1.0),
        Plan("FlexAttention", 15, some(flex, 1), most=1.5, limit=60),
        Plan("compute-sanitizer", 5, sanitizer_jobs, limit=45),
        rest("ceilings", 5),
    )
