"""How do samples taken in turns become pytest's benchmarks? One test for each implementation of a comparison.

When the first test of a comparison runs, all implementations that were selected are measured together. Each
test then plays its own samples to pytest-benchmark on a clock that shows what was measured, so that they
reach its statistics, JSON, --benchmark-compare and histograms.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .ceilings import measure_ceilings
from .groups import Comparison, comparisons
from .implementations import IMPLEMENTATIONS, for_group
from .machine import describe
from .measure import measure
from .results import Ceilings, Machine, Row, append

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Clock:
    """The clock that pytest-benchmark reads: it shows the sample that was just played."""

    def __init__(self) -> None:
        self.now = 0.0

    def play(self, benchmark: Any, samples: list[float]) -> None:
        """One round a sample."""
        left = iter(samples)

        def back() -> None:
            self.now = 0.0

        def forth() -> None:
            self.now = next(left)

        benchmark.pedantic(forth, setup=back, rounds=len(samples))


CLOCK = Clock()


def measured_time() -> float:
    """The timer of every benchmark here, under this name in its JSON."""
    return CLOCK.now


class Session:
    """What one run of pytest has measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.results: Path | None = config.getoption("results")
        self.seconds: float = config.getoption("seconds")
        self.known: dict[str, tuple[str, Comparison]] = {}
        self.rows: dict[str, dict[str, Row]] = {}
        self.machine: Machine | None = None
        self.ceilings: Ceilings | None = None

    def pairs(self, groups: tuple[str, ...], quick: bool) -> list[tuple[str, str]]:
        """(comparison, implementation), by name, of these groups."""
        found = []
        for group in groups:
            for case, work in comparisons(group, quick=quick):
                name = f"{case.name}, {work}"
                self.known[name] = group, (case, work)
                found += [(name, each.name) for each in for_group(group)]
        return found

    def row(self, comparison: str, implementation: str, items: list[pytest.Item]) -> Row:
        """What was measured; the first time, with every implementation that `items` ask of the comparison."""
        if comparison not in self.rows:
            self.begin()
            group, (case, work) = self.known[comparison]
            asked = [_asked(item) for item in items]
            names = [name for theirs, name in asked if theirs == comparison]
            rows = measure(
                case,
                work,
                [IMPLEMENTATIONS[name] for name in dict.fromkeys(names)],
                group=group,
                seconds=self.seconds,
                device=DEVICE,
                rounds=200 if ON_GPU else 1,
                least=3 if ON_GPU else 1,
            )
            self.write(*rows)
            self.rows[comparison] = {row.implementation: row for row in rows}
        return self.rows[comparison][implementation]

    def begin(self) -> None:
        """Say once on what machine this is, and what it can do."""
        if self.machine is None:
            self.machine = describe()
            self.ceilings = measure_ceilings(DEVICE, 3.0 if ON_GPU else 0.0)
            self.write(self.machine, self.ceilings)

    def write(self, *entries: Machine | Ceilings | Row) -> None:
        if self.results is not None:
            append(self.results, *entries)


SESSION = pytest.StashKey[Session]()


def _asked(item: pytest.Item) -> tuple[str, str]:
    found = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(found.get("comparison")), str(found.get("implementation"))


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("tilewise benchmarks")
    options.addoption(
        "--results", type=Path, metavar="FILE", help="append every row to this file as it comes"
    )
    options.addoption(
        "--seconds",
        type=float,
        default=2.0 if ON_GPU else 0.0,
        help="for the samples of one comparison, all implementations together (default: %(default)s)",
    )
    options.addoption("--quick", action="store_true", default=not ON_GPU, help="fewer lengths and models")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)


def pytest_report_header() -> str:
    if ON_GPU:
        return f"benchmarks on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return "no GPU: benchmarks run tiny, in Triton's interpreter; their times say nothing about speed"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `timed` runs for every comparison of the groups that its module names."""
    if "timed" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        pairs = session.pairs(metafunc.module.GROUPS, metafunc.config.getoption("quick"))
        clock = pytest.mark.benchmark(timer=measured_time)
        metafunc.parametrize(
            ("comparison", "implementation"),
            [pytest.param(*pair, marks=clock, id="-".join(pair)) for pair in pairs],
        )


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any, comparison: str, implementation: str) -> Row:
    """The row of one implementation, its samples handed to pytest-benchmark. Skips where it cannot run."""
    session = request.config.stash[SESSION]
    row = session.row(comparison, implementation, request.session.items)
    benchmark.skipped = row.status != "ok"  # else it warns that nobody used it
    if row.status in ("unavailable", "unsupported"):
        pytest.skip(f"{row.status}: {row.reason}")
    if row.status == "failed" and not implementation.startswith("tilewise"):
        pytest.xfail(f"failed: {row.reason}")
    benchmark.group = f"{row.group}: {comparison}"
    benchmark.extra_info["row"] = asdict(row)
    if row.status == "ok":
        CLOCK.play(benchmark, row.seconds)
    return row


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """The machine and its ceilings, where `results.load` looks for them."""
    session = config.stash[SESSION]
    parts = dict(machine=session.machine, ceilings=session.ceilings)
    found = {name: asdict(part) for name, part in parts.items() if part is not None}
    output_json["machine_info"]["tilewise"] = found


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(compared_benchmark: dict[str, Any]) -> None:
    """Dates, clocks and ceilings differ each time: with them, every machine would pass for another one."""
    compared_benchmark["machine_info"].pop("tilewise", None)
