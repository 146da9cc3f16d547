"""Attention as real models call it, forward, and backward where they are trained."""

from .results import Row

GROUPS = ("models forward", "models backward")


def test_models(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
