"""What is called a change between two results, and how it is said."""

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.__main__ import build_app
from bench.report.compare import change, compare_sections, interval
from bench.results import append

from .synthetic import machine, row, section

STEADY = [1.00e-3, 1.01e-3, 0.99e-3, 1.00e-3, 1.00e-3, 1.01e-3, 0.99e-3]  # median 1 ms, within 1 %


def scaled(factor: float) -> list[float]:
    return [factor * seconds for seconds in STEADY]


def test_faster_and_slower_beyond_noise():
    faster = change(row("flex", STEADY), row("flex", scaled(0.5)))
    assert faster.verdict == "faster" and faster.ratio == pytest.approx(2.0)
    # Every median lies between 0.99 and 1.01 times the middle.
    assert 2 * 0.99 / 1.01 - 1e-9 <= faster.low <= 2 <= faster.high <= 2 * 1.01 / 0.99 + 1e-9
    assert faster.text.startswith("faster 2.00× (")
    slower = change(row("flex", STEADY), row("flex", scaled(2.0)))
    assert slower.verdict == "slower" and slower.ratio == pytest.approx(0.5)
    assert slower.text.startswith("slower 2.00× (1.9") and slower.text.endswith("to 2.04×)")


def test_a_difference_within_the_samples_is_none():
    noisy = [1.0, 1.2, 0.8, 1.3, 0.9, 1.1, 0.7]
    moved = change(row("flex", noisy), row("flex", [1.05 * s for s in noisy]))
    assert moved.verdict == "no change beyond noise" and moved.low < 1 < moved.high


def test_less_than_a_percent_is_no_change_however_steady():
    moved = change(row("flex", [1.0] * 50), row("flex", [0.995] * 50))
    assert moved.low > 1 and moved.verdict == "no change beyond noise"


def test_same_samples_rarely_differ():
    """Two draws from one distribution: with 99 % confidence few of 100 pairs may be called a change."""
    generator = np.random.default_rng(1)
    pairs = generator.lognormal(0, 0.05, (100, 2, 30))
    called = [change(row("flex", list(a)), row("flex", list(b))).verdict for a, b in pairs]
    assert called.count("no change beyond noise") >= 94


def test_interval_is_the_same_each_time():
    assert interval(STEADY, scaled(0.9)) == interval(STEADY, scaled(0.9))


def test_few_samples_say_so():
    cold = change(row("flex", [3.0]), row("flex", [1.5]))
    assert (cold.verdict, cold.text) == ("too few samples", "too few samples: faster 2.00×")


def test_status_that_changed_comes_first():
    old = section([row("tilewise portable", STEADY, "a"), row("tilewise portable", STEADY, "b")])
    new = section(
        [
            row("tilewise portable", scaled(2.0), "a"),
            row("tilewise portable", STEADY, "b", status="wrong", reason="error 1"),
        ]
    )
    table = compare_sections(old, new).table()
    assert [line[-1].split(" (")[0] for line in table.lines] == ["was ok, is wrong: error 1", "slower 2.00×"]


def test_comparison_of_two_runs():
    old = section([row("flex", STEADY), row("sdpa cudnn", STEADY), row("tilewise portable", STEADY)])
    new = section(
        [row("flex", STEADY), row("tilewise portable", scaled(0.8)), row("tilewise hopper", STEADY)]
    )
    new.machine.versions["torch"] = "1.3.0"
    found = compare_sections(old, new)
    assert not found.warnings
    assert "torch: 1.2.3, then 1.3.0" in found.remarks
    assert "tilewise: 1.25× faster, geometric mean of 1" in found.remarks
    assert any(line.startswith("the rivals, to which nobody did anything: 1.00×") for line in found.remarks)
    table = found.table()
    assert [line[2:5] for line in table.lines] == [("tilewise portable", "1.00 ms", "800 µs")]
    assert table.notes == (
        "1 row of 2: no change beyond noise",
        "only in the first file: 1 row: sdpa cudnn in models forward",
        "only in the second file: 1 row: tilewise hopper in models forward",
    )


def test_different_machines_only_under_a_warning(tmp_path):
    first, second, page = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "page.md"))
    append(first, machine(), row("flex", STEADY))
    append(second, machine("NVIDIA A100"), row("flex", scaled(3.0)))
    ran = CliRunner().invoke(build_app("compare"), ["compare", str(first), str(second), "--out", str(page)])
    assert ran.exit_code == 0, ran.output
    assert ran.output.startswith("Warning: two machines, NVIDIA H200 and NVIDIA A100")
    assert "slower 3.00×" in ran.output
    assert "**Warning: two machines" in page.read_text() and "slower 3.00×" in page.read_text()


def test_times_without_a_gpu_are_warned_of():
    cpu = section([row("flex", STEADY)], gpu=None)
    assert "without a GPU" in compare_sections(cpu, cpu).warnings[0]
