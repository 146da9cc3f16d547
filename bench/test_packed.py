"""Sequences packed one behind the other, beside every rival, and equal ones beside a dense batch."""

from .results import Row

GROUPS = ("packed forward", "packed backward")


def test_packed(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
