"""The first call in a new process with empty caches: what is compiled before the first result is there."""

from .results import Row

GROUPS = ("cold start",)


def test_cold_start(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
