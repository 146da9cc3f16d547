"""The table of what is supported in docs/support.md, printed from the features that the tests run.

python -m harness.support_table            write the table into the page, between its two markers
python -m harness.support_table --check    exit with 1 if the table there is out of date
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

from .features import FEATURES, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


def table() -> str:
    """One line a kind of feature. Every name in it is an entry of FEATURES, which has a test of its own."""
    lines = ["| | forward and backward |", "|---|---|"]
    in_order = sorted(FEATURES.values(), key=lambda entry: list(KINDS).index(entry.kind))
    for kind, entries in groupby(in_order, key=lambda entry: entry.kind):
        lines.append(f"| {KINDS[kind]} | {'<br>'.join(entry.text for entry in entries)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page's text with the table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name} must have each of the lines {BEGIN} and {END} once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The table of what is supported, in docs/support.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    if check:
        print(f"the table is {'up to date' if filled(text) == text else 'out of date'}")
        return int(filled(text) != text)
    PAGE.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
