"""Few queries on keys and values in a cache, contiguous and in pages, beside every rival."""

from .results import Row

GROUPS = ("decode",)


def test_decode(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
