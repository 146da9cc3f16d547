"""How does an exception read in one line?"""

from __future__ import annotations


def in_a_line(error: BaseException, most: int = 200) -> str:
    """Its kind and the start of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:most]}" if lines else type(error).__name__
