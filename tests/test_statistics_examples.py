"""The examples of `return_stats`, as a reader runs them, do what they say."""

import re

import pytest

from harness.examples import EXAMPLES
from harness.scripts import run_script


@pytest.mark.parametrize(
    ("name", "pattern", "holds"),
    [
        ("qk_clip", r"\[([\d.]+), [^]]*\]\n", lambda found: found[0] > 10 and max(found[1:]) < 8),
        ("token_pruning", r"have (\d+)%.*off by (\d+)%", lambda found: found[0] > 80 and found[1] < 25),
        ("entropy_regularisation", r"entropy ([\d.]+)", lambda found: found[-1] > found[0] + 0.5),
    ],
)
def test_an_example_runs(name, pattern, holds, tmp_path):
    log = tmp_path / "log"
    assert run_script(EXAMPLES / f"{name}.py", log) == 0, log.read_text()
    matches = re.findall(pattern, log.read_text())
    numbers = [float(x) for match in matches for x in (match if isinstance(match, tuple) else (match,))]
    assert holds(numbers), log.read_text()
