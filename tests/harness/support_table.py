"""The table of what is supported in docs/support.md, printed from the features that the tests run.

python -m harness.support_table            write the table into the page, between its two markers
python -m harness.support_table --check    exit with 1 if the table there is out of date
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from .features import FEATURES, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def table() -> str:
    """One line a kind of feature. Every name in it is an entry of FEATURES, which has a test of its own."""
    lines = ["| | forward and backward |", "|---|---|"]
    in_order = sorted(FEATURES.values(), key=lambda entry: list(KINDS).index(entry.kind))
    for kind, entries in groupby(in_order, key=lambda entry: entry.kind):
        lines.append(f"| {KINDS[kind]} | {'<br>'.join(entry.text for entry in entries)} |")
    return "\n".join(lines)


def filled(text: str, name: str, lines: str) -> str:
    """The text of a page with these lines between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have each of the lines {begin} and {end} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{lines}\n{end}{rest.split(end)[1]}"


def keep(page: Path, name: str, table: Callable[[], str]) -> int:
    """The command: write the table into the page, or with --check say whether it is there. The exit code."""
    parser = argparse.ArgumentParser(description=f"The table of {name} in docs/{page.name}.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check = parser.parse_args().check
    text = page.read_text(encoding="utf-8")
    now = filled(text, name, table())
    if check:
        print(f"the table is {'up to date' if now == text else 'out of date'}")
        return int(now != text)
    page.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(keep(PAGE, "support", table))
