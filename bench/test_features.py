"""One feature at a time that many fast paths leave out: masks, biases with gradients, documents, dropout."""

from .results import Row

GROUPS = ("features forward", "features backward")


def test_features(timed: Row) -> None:
    assert timed.status == "ok", timed.reason
