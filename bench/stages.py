"""What is a stage of a run, and which does an evidence run have, in which order?

The run for a GPU that is lent for minutes has an order of its own: first_light.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from . import checks
from .jobs import (
    Job,
    Jobs,
    Setting,
    canary_jobs,
    ceiling_jobs,
    check_jobs,
    compile_jobs,
    measure_jobs,
    most_telling,
    one_of_each,
)
from .results import Check, CheckStatus
from .workers import Outcome


@dataclass(frozen=True)
class Plan:
    """A stage. weight: of its time beside that of the stages that follow. most: seconds of measuring that one
    job gets. limit: seconds after which a job counts as hung: compiling is most of them. beside: how many
    jobs may run beside one another. measuring: which part of a timed job's time goes into measuring, and not
    into compiling and checking."""

    name: str
    weight: float
    jobs: Jobs
    most: float = 0.0
    limit: float = 150.0
    beside: int = 1
    measuring: float = 0.5

    def processes(self, setting: Setting) -> int:
        """How many processes work on it: most of a check's time on a GPU is compiling, on one core."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.beside, max(1, cores - 2 * setting.on_gpu))


FORWARD = measure_jobs("forward grid", order=most_telling)
BACKWARD = measure_jobs("backward grid", order=most_telling)
MODELS = measure_jobs(
    "features forward",
    "features backward",
    "models forward",
    "models backward",
    "packed forward",
    "packed backward",
    "decode",
    "short forward",
)

STAGES: tuple[Plan, ...] = (
    Plan("canary", 8, canary_jobs, limit=60, beside=14),
    Plan("hopper", 10, check_jobs("hopper"), limit=90, beside=14),
    Plan("correctness", 20, check_jobs("correctness"), beside=10),
    Plan("correctness at size", 7, check_jobs("correctness at size")),
    Plan("compilation", 15, compile_jobs(one_of_each(FORWARD, BACKWARD)), beside=10),
    Plan("forward grid", 19, FORWARD, most=2.5),
    Plan("backward grid", 17, BACKWARD, most=2.5),
    Plan("ceilings", 3, ceiling_jobs, most=10),
    Plan("models and features", 18, MODELS, most=2),
    Plan("overheads", 5, measure_jobs("host", "cold start"), most=2),
)


def not_for(setting: Setting) -> list[str]:
    """The checks that this device cannot run."""
    return checks.left_out(torch.device(setting.device))


def broken(plan: Plan, job: Job, outcome: Outcome) -> Check:
    """The record of a job that gave no result."""
    status: CheckStatus = "hung" if outcome.hung else "crashed" if outcome.broken else "failed"
    return Check(check_name(plan, job), status, outcome.seconds, outcome.error)


def check_name(plan: Plan, job: Job) -> str:
    """What a check of this job is called, where it gives none itself."""
    return job.name if isinstance(job.key, tuple) and job.key[0] == "check" else f"{plan.name}: {job.name}"
