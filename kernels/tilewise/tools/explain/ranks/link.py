"""How fast is a link? "450GB/s", in bytes a second."""

from __future__ import annotations

import math
import re

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES = {"B/s": 1.0, "bit/s": 0.125}
WANTED = "must be a number and a unit, as in 450GB/s or 400Gbit/s (8 bits are a byte)"


def link_rate(given: str | float, name: str = "link") -> float:
    """Bytes a second that a rank can send and, at the same time, receive: a number of them, or words such as
    "450GB/s". Raises ValueError for others, with `name`."""
    if isinstance(given, str):
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kMGT]?)(B/s|bit/s)", given.strip())
        try:
            number, prefix, unit = found.groups() if found is not None else ("", "", "")
            rate = float(number) * UNITS[prefix] * BYTES[unit]
        except (ValueError, KeyError):
            raise ValueError(f"{name}={given!r} {WANTED}") from None
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        rate = float(given)
    else:
        raise ValueError(f"{name}={given!r} {WANTED}, or bytes a second")
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{name}={given!r} must be more than 0 bytes a second, and finite")
    return rate
