"""The forward on the FlashAttention papers' grid and on short sequences, beside every rival.

python -m pytest bench/test_forward.py --results results.jsonl --benchmark-json=results.json
"""

from .results import Row

GROUPS = ("forward grid", "short forward")


def test_forward(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
