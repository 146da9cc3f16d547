"""The derivative of the backward alone, and forward mode, on some of the FlashAttention papers' grid."""

from .results import Row

GROUPS = ("second derivatives",)


def test_second_derivatives(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
