"""`python -m tilewise.tools.overlap`: the table in docs/hopper.md, or its pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .order import table as order_table
from .picture import draw
from .simulation import backward_table, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.tools.overlap")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="draw the timelines there instead")
    folder = parser.parse_args().svg
    if folder is None:
        print("\n\n".join("\n".join(lines) for lines in (table(), backward_table(), order_table())))
    else:
        draw(folder)


if __name__ == "__main__":
    main()
