"""Problems for Hopper's kernels: which features they take, and calls that ask for them."""

from __future__ import annotations

import random

import tilewise

from .features import build
from .problem import keeps_pairs

HOPPER = dict(impl="hopper")
# Features that its rules refuse, whatever else a call asks for: those below say which, and why not more.
REFUSED = {
    "float32", "fp8_of_heads", "fp8_of_rows", "no_key", "dropout", "user_score",
    "documents", "scattered_documents", "intervals", "bool_mask", "user_mask", "user_interval",
    "blocks", "block_causal", "neighborhood", "either", "opposite",
    "sliced_layout", "expanded_layout", "inner_strided_layout",
    "packed_rows", "packed_apart", "cached_rows", "paged_rows",
}  # fmt: skip
# Refused or not: it depends on which numbers are drawn.
DRAWN = {"mixed_layout", "odd_dims", "value_dim_differs"}


def problem(device, *features, seed=0, **sizes):
    """A problem with these features that asks for the Hopper kernel, in bf16 if they leave the dtype open."""
    dtype = "float16" if seed % 2 else "bfloat16"
    names = (
        [*features]
        if {"float16", "float32", "fp8_of_heads", "fp8_of_rows"} & {*features}
        else [*features, dtype]
    )
    for attempt in range(100):
        p = build(device, random.Random(str((features, seed, attempt))), names, **sizes)
        if 0 in (p.batch, p.q_len, p.kv_len) or keeps_pairs(p):
            p.tile = None  # Hopper's own
            p.arguments |= HOPPER
            return p
    raise AssertionError(f"no pair counts under {features} in 100 draws")


def taken(p) -> bool:
    q, k, v = p.tensors()
    return tilewise.why_not(q, k, v, **p.keywords()) == []
