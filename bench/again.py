"""What does a second run do again? What was not right in the first, and what that did not come to."""

from __future__ import annotations

from .jobs import Job
from .report.ranking import is_tilewise
from .results import Results


def is_due(job: Job, earlier: Results) -> bool:
    """Whether the earlier run has no good answer to this job: none at all, or one of tilewise's is bad. What
    became of rivals stays as it was. What was compiled ahead is compiled anew, on a machine without it."""
    if job.key == "ceilings":
        return earlier.ceilings is None
    if isinstance(job.key, tuple) and job.key[0] == "compiled":
        return is_due_comparison(job.key[1], job.arguments[3], earlier)
    if job.implementations:
        return is_due_comparison(job.key, job.implementations, earlier)
    name = job.name if isinstance(job.key, tuple) and job.key[0] == "check" else f"all of {job.name}"
    return not any(
        check.name == name and check.status in ("right", "not applicable") for check in earlier.checks
    )


def is_due_comparison(key: object, names: tuple[str, ...], earlier: Results) -> bool:
    found = {row.implementation: row.status for row in earlier.rows if row.key == key}
    if not found.keys() >= {*names}:
        return True
    return any(
        status in ("wrong", "failed", "left out") for name, status in found.items() if is_tilewise(name)
    )
