"""What the softmax knows beside its result, on some of the FlashAttention papers' grid."""

from .results import Row

GROUPS = ("statistics",)


def test_statistics(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
