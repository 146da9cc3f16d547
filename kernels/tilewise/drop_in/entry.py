"""What the report counts together."""

from __future__ import annotations

from typing import NamedTuple

Sizes = tuple["int | str", ...]

PYTORCH = "PyTorch"
# By the names of `tilewise.plan.implementation`.
ANSWERED_BY = {
    "portable": "tilewise portable",
    "hopper": "tilewise hopper",
    "torch": "tilewise plain PyTorch",
}


class Entry(NamedTuple):
    """Calls that have all this in common, and how many."""

    module: str | None  # "BertModel: encoder.layer.0.attention.self"; None outside of modules
    q: Sizes | None  # "*": a length that a graph leaves open, or that differs within a nested tensor
    k: Sizes | None  # None, all three: of any sizes, where more are met than the report keeps apart
    v: Sizes | None
    dtype: str
    mask: str  # in words: "no mask", "causal", "bool (1, 1, 5, 7)"
    options: str  # "dropout_p=0.1, scale=0.5"; "" if there are none
    answered_by: str  # PYTORCH, or one of ANSWERED_BY
    reasons: tuple[str, ...]  # why it was passed on to PyTorch
    compiled: bool  # counted when it was traced, not when the graph runs
    calls: int = 0
