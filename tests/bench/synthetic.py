"""Rows and machines that nobody measured, for tests of what a report makes of them."""

from __future__ import annotations

from bench.report.sections import Section
from bench.results import Ceilings, Machine, Row

# So round that shares can be worked out by hand.
CEILINGS = Ceilings(1e12, {"bfloat16": 100e12})


def machine(gpu: str | None = "NVIDIA H200", **changes) -> Machine:
    versions = {"torch": "1.2.3", "triton": "4.5.6"}
    values = dict(
        gpu=gpu, arch="sm_90", driver="580", versions=versions, revision="0123456789abcdef",
        date="2001-02-03T04:05:06",
    )  # fmt: skip
    return Machine(**values | changes)


def row(implementation: str, seconds: float | list[float] | None = None, case: str = "one", **changes) -> Row:
    """A right forward row of this time or these times; without, one that was not timed."""
    times = seconds if isinstance(seconds, list) else [] if seconds is None else [seconds]
    values = dict(group="models forward", work="forward", status="ok", dtype="bfloat16")
    return Row(case=case, implementation=implementation, seconds=times, **values | changes)


def section(
    rows: list[Row], gpu: str | None = "NVIDIA H200", ceilings: Ceilings | None = CEILINGS
) -> Section:
    return Section(machine(gpu), ceilings, rows, files=["run"], dates=["2001-02-03T04:05:06"])
