"""How are times, rates and sizes written, so that a reader sees three digits and never a row of zeros?"""

from __future__ import annotations

import textwrap

DURATIONS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def unit_of(seconds: float) -> tuple[str, float]:
    """The unit that suits a time, and its length in seconds: ("ms", 1e-3)."""
    # 999.6 µs would be written as 1000.
    return next((unit for unit in DURATIONS if seconds >= 0.9995 * unit[1]), DURATIONS[-1])


def digits(value: float) -> str:
    """Three significant digits: "0.120", "1.23", "12.3", "123", "1234"."""
    if value == 0:
        return "0"
    for decimals, below in ((2, 9.995), (1, 99.95)):
        if abs(value) < below:
            return f"{value:.{decimals}f}" if abs(value) >= 0.9995 else f"{value:#.3g}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    name, size = unit_of(seconds)
    return f"{digits(seconds / size)} {name}"


def teraflops(rate: float) -> str:
    """FLOPs a second: "612 TFLOP/s"."""
    return f"{digits(rate / 1e12)} TFLOP/s"


def span(low: float, high: float, like: float) -> str:
    """Two times without their unit, which is that of the time `like`."""
    _, size = unit_of(like)
    return f"{digits(low / size)} to {digits(high / size)}"


def memory(size: int) -> str:
    """Bytes: "0", "512 B", "1.50 MiB"."""
    if size == 0:
        return "0"
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= unit:
            return f"{digits(size / unit)} {name}"
    return f"{size} B"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def times(ratio: float) -> str:
    """A ratio: "1.08×"."""
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{digits(ratio)}×"


def one_line(text: str, most: int = 240) -> str:
    """A message of several lines in one, and not too long a one."""
    return textwrap.shorten(text, most, placeholder=" ...")


def count(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
