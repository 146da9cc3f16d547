"""`examples/gradient_penalty.py`: a penalty is trained, in memory that is linear in length."""

import itertools
import re
import runpy

from harness.examples import EXAMPLES


def test_it_learns_in_memory_linear_in_length(capsys):
    runpy.run_path(str(EXAMPLES / "gradient_penalty.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "plain PyTorch answers" not in printed
    losses, penalties = zip(*re.findall(r"loss (\S+), penalty (\S+)", printed), strict=True)
    assert float(losses[-1]) < 0.5 * float(losses[0]) and float(penalties[-1]) < 0.5 * float(penalties[0])
    rows = [[int(x) for x in row] for row in re.findall(r"^ *(\d+) +(\d+) +(\d+) +(\d+)$", printed, re.M)]
    for shorter, longer in itertools.pairwise(rows):
        assert longer[0] == 2 * shorter[0]
        assert longer[1] <= 2.2 * shorter[1] and longer[3] >= 3 * shorter[3]
    # The prediction takes all of a step to be held at once.
    assert len(rows) >= 2 and all(predicted / 2 <= held <= 1.2 * predicted for _, held, predicted, _ in rows)
