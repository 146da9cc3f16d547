"""The README's table of what is supported, printed from the features that the tests run.

python -m harness.support_table            write the table into README.md, between its two markers
python -m harness.support_table --check    exit with 1 if the table there is out of date
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

from .features import FEATURES, KINDS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
TESTED = "tested: interpreter"  # not yet on a GPU


def table() -> str:
    """One line a kind of feature. Every name in it is an entry of FEATURES, which has a test of its own."""
    lines = ["| | feature | forward | backward |", "|---|---|---|---|"]
    in_order = sorted(FEATURES.values(), key=lambda entry: list(KINDS).index(entry.kind))
    for kind, entries in groupby(in_order, key=lambda entry: entry.kind):
        texts = "<br>".join(entry.text for entry in entries)
        lines.append(f"| {KINDS[kind]} | {texts} | {TESTED} | {TESTED} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README's text with the table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have each of the lines {BEGIN} and {END} once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The README's table of what is supported.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    if check:
        print(f"the table is {'up to date' if filled(text) == text else 'out of date'}")
        return int(filled(text) != text)
    README.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
