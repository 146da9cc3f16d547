"""`python -m tilewise.tools.rank`: rank tiles without a GPU, and write what came of it."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...plan.tile_table import write_whole
from ..compiled.variants import MASKS
from .rank import RANKED, SHIPPED_DIMS, WORKS, best, near, say, shipped_row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tilewise.tools.rank", description="Rank tiles without a GPU."
    )
    parser.add_argument("--out", type=Path, help="write the five best tiles of each row of sm_90 there")
    parser.add_argument("--shipped", type=Path, help="write what the model says of the shipped tiles there")
    options = parser.parse_args()
    if options.out is None and options.shipped is None:
        parser.error("--out FILE or --shipped FILE, or both")
    if options.shipped is not None:
        shipped: list[dict[str, Any]] = []
        for work, dim, mask in itertools.product(WORKS, SHIPPED_DIMS, MASKS):
            say(f"{work} {dim} {mask}")
            shipped.append(shipped_row(work, dim, mask))
        write_rows(options.shipped, shipped)
    if options.out is not None:
        found: list[dict[str, Any]] = []
        for work, dim in RANKED:
            say(f"{work} {dim}: {len(near(work, dim))} tiles")
            found += best(work, dim)
        write_rows(options.out, found)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """An array, a row a line, so that a difference reads well."""
    write_whole(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
