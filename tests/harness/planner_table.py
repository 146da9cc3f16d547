"""The figures of docs/distributed.md, as the planner counts them.

python -m harness.planner_table            write the tables into the page, between their markers
python -m harness.planner_table --check    exit with 1 if they are out of date
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tilewise
from tilewise.tools.explain.command import call_of
from tilewise.tools.explain.ranks.advice import named
from tilewise.tools.explain.text import duration, quantity
from tilewise_reference.cases import find_case

from .support_table import filled

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
CASE = "llama3-70b-prefill-128k"
NODES = ((4, 8), ("50GB/s", "450GB/s"))
WITHIN = ((8, "450GB/s"), (64, "450GB/s"), (512, "450GB/s"))


def planned(ranks: Any, link: Any, training: bool = True, **changed: Any) -> Any:
    arguments = call_of(find_case(CASE), training) | changed
    return tilewise.explain_ranks(**arguments, ranks=ranks, link=link, gpu="H200")


def table(heading: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def methods() -> str:
    """Forward and backward by each method; the one to take stands out."""

    def rows() -> Iterator[tuple[str, ...]]:
        for ranks, link in (*WITHIN, NODES):
            found = planned(ranks, link)
            where = str(ranks) if isinstance(ranks, int) else f"{ranks[0]} × {ranks[1]}, {link[0]} across"
            for method in found.methods:
                name = f"**{named(method)}**" if method.name == found.best else named(method)
                if method.why_not:
                    yield where, f"{name}: {method.why_not}", *["–"] * 6
                    continue
                sent, on_link, busiest, exposed = (
                    sum(get(x) for x in method.passes)
                    for get in (lambda x: max(x.sent), *map(field, ("on_link", "busiest", "exposed")))
                )
                times = map(duration, (on_link, busiest, exposed, method.seconds))
                yield where, name, quantity(sent, "B"), *times, quantity(method.bytes, "B")

    heading = ("GPUs", "method", "sends", "link", "kernels", "exposed", "at least", "memory")
    return table(heading, rows())


def field(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(x, name)


def orders() -> str:
    """What the ring sends, and how even the work is, by mask and order."""
    causal = tilewise.Causal()
    window = causal & tilewise.Window(4095, 0)

    def rows() -> Iterator[tuple[str, ...]]:
        for name, mask in (("causal", causal), ("causal, window of 4096", window)):
            for order in ("zigzag", "contiguous"):
                ring = planned(8, "450GB/s", training=False, mask=mask, order=order)["ring"]
                yield (
                    name, order, quantity(sum(ring.forward.sent), "B"), f"{ring.balance:.3f}",
                    duration(ring.forward.seconds),
                )  # fmt: skip

    return table(("mask", "order", "sent by all", "most / mean", "forward at least"), rows())


TABLES: dict[str, Callable[[], str]] = {"planner-methods": methods, "planner-orders": orders}


def page() -> str:
    """The page with the tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        text = filled(text, name, lines())
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The planner's tables in docs/distributed.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check, now = parser.parse_args().check, page()
    if check:
        raise SystemExit(int(now != PAGE.read_text(encoding="utf-8")))
    PAGE.write_text(now, encoding="utf-8")
