"""How does a case become smaller and still ask for the same? For smoke runs, checks of gradients, a page."""

from __future__ import annotations

from dataclasses import replace

from tilewise_reference.cases import Case, Features

FEW = 4  # queries on a cache that are not made fewer: several are another call than one


def shrunk(case: Case, *, batch: int, kv_heads: int, group: int, length: int, suffix: str) -> Case:
    """The case with at most this many sequences, key heads, query heads a key head and rows. Of packed
    sequences, and of those in a cache, one more stays: the shortest, the longest and those between.

    Lengths, window and documents shrink in proportion, so that what was masked stays masked; head_dim, dtype
    and features stay. A case that fits already comes back as it is, else `suffix` is added to its name.
    """
    kv = min(case.kv_heads, kv_heads)
    heads = kv * min(case.q_heads // case.kv_heads, group)
    longest = max(case.q_len, case.kv_len)
    share = min(1.0, length / longest)
    q_len, kv_len = (max(1, round(size * share)) for size in (case.q_len, case.kv_len))
    if case.cache is not None:
        q_len = max(q_len, min(case.q_len, FEW))
    sequences = min(case.batch, batch + (case.sequences is not None))
    sizes = (sequences, heads, kv, q_len, kv_len)
    if sizes == (case.batch, case.q_heads, case.kv_heads, case.q_len, case.kv_len):
        return case
    asks: Features = case.features.copy()
    if "window" in asks:
        left, right = (None if x is None else min(x, max(1, round(x * share))) for x in asks["window"])
        asks["window"] = (left, right)
    if "bias" in asks:
        full = (sequences, heads, q_len, kv_len)
        b, h, i, j = (min(given, size) for given, size in zip(asks["bias"], full, strict=True))
        asks["bias"] = (b, h, i, j)
    if "documents" in asks:
        asks["documents"] = min(asks["documents"], max(1, q_len // 4))
    if case.lengths is not None:
        asks["lengths"] = tuple(max(1, round(size * share)) for size in some(case.lengths, sequences))
    if case.cache is not None:
        asks["cache"] = tuple(max(q_len, round(size * share)) for size in some(case.cache, sequences))
    return replace(
        case, name=case.name + suffix, batch=sequences, q_heads=heads, kv_heads=kv, q_len=q_len,
        kv_len=kv_len, features=asks,
    )  # fmt: skip


def some(lengths: tuple[int, ...], count: int) -> tuple[int, ...]:
    """So many of the lengths, in their order: spread from the shortest to the longest."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    last = len(lengths) - 1
    return tuple(
        lengths[i] for i in sorted(by_length[last - last * n // max(1, count - 1)] for n in range(count))
    )


def smoke(case: Case) -> Case:
    """Small enough for Triton's interpreter; its name ends in "-tiny"."""
    return shrunk(case, batch=2, kv_heads=2, group=2, length=64, suffix="-tiny")


def shortened(case: Case) -> Case:
    """Small enough for all gradients in float64, yet of several tiles: up to 1024 rows of 8 heads."""
    return shrunk(case, batch=2, kv_heads=2, group=4, length=1024, suffix="-shortened")
