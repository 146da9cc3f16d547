"""Keys and values in a cache, for rivals that know dense tensors: a contiguous one is a dense call over all
of it, under a mask of lengths where sequences differ in them. Nobody has a gradient of a cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import is_backward, kept_pairs

Tensor = torch.Tensor


def is_even(case: Case) -> bool:
    """Whether every sequence fills the cache, or there is none."""
    return case.cache is None or min(case.cache) == case.kv_len


def as_dense(case: Case) -> Case:
    """The case without a word of the cache."""
    asks = case.features.copy()
    asks.pop("cache", None)
    asks.pop("page_size", None)
    return replace(case, features=asks)


def filled(case: Case, inputs: Inputs) -> Tensor:
    """The pairs that each sequence's masks keep, bool [batch, 1, q_len, kv_len]: none beyond its own rows."""
    assert case.cache is not None
    keep = torch.zeros(case.batch, 1, case.q_len, case.kv_len, dtype=torch.bool, device=inputs.q.device)
    for rows, length in zip(keep, case.cache, strict=True):
        own = kept_pairs(case.sequence(length), inputs)
        rows[..., :length] = True if own is None else own
    return keep


def why_no_cache(case: Case, work: Work, name: str, pages: str = "", lengths: str = "") -> str | None:
    """Why this is not for a rival that takes caches; None if it is, or where there is none. pages, lengths:
    what it says to pages and to lengths that differ, where it takes none."""
    if case.cache is None:
        return None
    if is_backward(work):
        return f"{name}: a cache has no gradient"
    if pages and case.page_size is not None:
        return pages
    return lengths if lengths and not is_even(case) else None
