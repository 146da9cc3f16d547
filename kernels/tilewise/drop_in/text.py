"""The report as a table in plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .entry import PYTORCH, Entry, Sizes

HEADER = ("calls", "answered by", "q", "k", "v", "dtype", "mask", "module")


def as_text(entries: Sequence[Entry]) -> str:
    if not entries:
        return "no call of attention yet"
    answered = sum([entry.calls for entry in entries if entry.answered_by != PYTORCH])
    calls = sum([entry.calls for entry in entries])
    head = f"calls: {calls}, of which tilewise answered {answered} and PyTorch {calls - answered}"
    if any([entry.compiled for entry in entries]):
        head += "; a compiled one is counted when it is traced, not when it runs"
    lines = folded(entries)
    table = [HEADER, *[cells(entry, modules) for entry, modules in lines]]
    widths = [max([len(row[column]) for row in table]) for column in range(len(HEADER))]
    drawn = [
        "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=True)]).rstrip()
        for row in table
    ]
    text = [head, "", drawn[0]]
    for line, (entry, _) in zip(drawn[1:], lines, strict=True):
        text += [line, *[f"       because {reason}" for reason in entry.reasons]]
    return "\n".join(text)


def folded(entries: Sequence[Entry]) -> list[tuple[Entry, int]]:
    """Entries, each with the number of its modules: those that differ in the numbers of a path alone are one,
    with "*" for the numbers that differ."""
    alike: dict[Entry, list[Entry]] = {}
    for entry in entries:
        module = None if entry.module is None else re.sub(r"\d+", "#", entry.module)
        alike.setdefault(entry._replace(module=module, calls=0), []).append(entry)
    return [
        (one._replace(module=common_path(group), calls=sum([entry.calls for entry in group])), len(group))
        for one, group in alike.items()
    ]


def common_path(entries: Sequence[Entry]) -> str | None:
    """One path for several that differ in numbers alone."""
    pieces = zip(*[re.split(r"(\d+)", entry.module or "") for entry in entries], strict=True)
    return "".join([piece[0] if len(set(piece)) == 1 else "*" for piece in pieces]) or None


def cells(entry: Entry, modules: int) -> tuple[str, ...]:
    who = f"{entry.answered_by}, compiled" if entry.compiled else entry.answered_by
    mask = ", ".join([words for words in (entry.mask, entry.options) if words])
    where = entry.module or "-"
    if modules > 1:
        where += f" ({modules} modules)"
    sizes = [in_words(sizes) for sizes in (entry.q, entry.k, entry.v)]
    return (str(entry.calls), who, *sizes, entry.dtype, mask, where)


def in_words(sizes: Sizes | None) -> str:
    return "any" if sizes is None else "×".join([str(size) for size in sizes])
