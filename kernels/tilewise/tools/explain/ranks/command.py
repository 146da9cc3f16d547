"""What the options of `tilewise explain` say about ranks."""

from __future__ import annotations

import re
from typing import Any

from ..text import Section
from .explain import explain_ranks
from .link import link_rate
from .text import sections, title


def planned(
    call: dict[str, Any], ranks: str, link: str | None, order: str | None
) -> tuple[dict[str, Any], str, list[Section]]:
    """What `explain_ranks` finds of a call: for JSON, its title and its sections."""
    found = explain_ranks(**call, **as_asked(ranks, link, order))
    return found.to_dict(), title(found), sections(found)


def as_asked(ranks: str, link: str | None, order: str | None) -> dict[str, Any]:
    """The arguments of `explain_ranks` that --ranks, --link and --order mean. ValueError for others."""
    found = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", ranks.strip())
    if found is None:
        raise ValueError(f"--ranks {ranks} must be a number, or two of a mesh, as in 4x8")
    if link is None:
        raise ValueError("--ranks needs --link, what a GPU can send and receive at once, as in 450GB/s")
    mesh = tuple(int(size) for size in found.groups() if size is not None)
    rates = tuple(link_rate(word, "--link") for word in link.split(","))
    return dict(
        ranks=mesh[0] if len(mesh) == 1 else mesh,
        link=rates[0] if len(rates) == 1 else rates,
        order="zigzag" if order is None else order,
    )
