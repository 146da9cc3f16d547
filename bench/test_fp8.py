"""The forward on numbers of 8 bits, and making them, on some of the FlashAttention papers' grid."""

from .results import Row

GROUPS = ("fp8", "quantize")


def test_fp8(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
