"""A planted bug: what is changed, and which tests notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in `file`, both paths from the root; `tests` are pytest node ids that notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def tests(file: str, *names: str) -> tuple[str, ...]:
    """The node ids of tests in tests/test_<file>.py."""
    return tuple(f"tests/test_{file}.py::test_{name}" for name in names)
