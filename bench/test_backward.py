"""The backward alone on the FlashAttention papers' grid, beside every rival."""

from .results import Row

GROUPS = ("backward grid",)


def test_backward(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
