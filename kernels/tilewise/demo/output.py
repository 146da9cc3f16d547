"""Writing results so that a failure half-way leaves what was there before."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .text import DemoError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write into. Its files move to `out`, in place of those with the same names, once the block
    has ended without an error; until then `out` is as it was. Raises DemoError where `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside `out`, so that moving is a rename within one file system, which is all or nothing.
        with tempfile.TemporaryDirectory(dir=out, prefix=".tilewise-") as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise DemoError(f"cannot write to --out {out}: {error.strerror or error}") from error


def check_writable(out: Path) -> None:
    """Raise DemoError now rather than after the work, where `out` cannot be written."""
    with staged(out):
        pass


def write_pairs(path: Path, similarities: dict[str, Tensor], sentences: list[str]) -> None:
    """A CSV file with a row a pair of sentences: their numbers, their similarities and their text."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [name.replace(" ", "_") for name in similarities]
        writer.writerow(["first", "second", *names, "first_sentence", "second_sentence"])
        rows = {name: matrix.tolist() for name, matrix in similarities.items()}
        for i, first in enumerate(sentences):
            for j, second in enumerate(sentences[i + 1 :], i + 1):
                values = [matrix[i][j] for matrix in rows.values()]
                writer.writerow([i + 1, j + 1, *values, first, second])
