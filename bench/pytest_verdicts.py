"""How do tests become checks of a run? A pytest plugin: each verdict is in the results as it is known.

python -m pytest -p bench.pytest_verdicts --checks FILE ...
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .results import Check, CheckStatus, append

PHASES = ("setup", "call", "teardown")
STATUS: dict[str, CheckStatus] = {"passed": "right", "failed": "wrong", "skipped": "not applicable"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checks", type=Path, metavar="FILE", help="append every verdict to this file")


class Recorder:
    """Told of every test's phases by the process that the others report to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return  # set up, torn down
        status, words = STATUS[report.outcome], ""
        if report.skipped:
            words = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed:
            words = last_words(report)
            if report.when not in PHASES:  # what xdist says where the process that ran it is gone
                status = "crashed"
        append(self.path, Check(report.nodeid, status, report.duration, words))


def last_words(report: pytest.TestReport, most: int = 6) -> str:
    """The end of what pytest would print of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return "\n".join([line for line in text.splitlines() if line.strip()][:most])


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("checks")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "verdicts")
