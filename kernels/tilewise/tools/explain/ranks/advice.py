"""Which method should a call take, and why?"""

from __future__ import annotations

from ..text import duration, quantity
from .findings import Method

ALIKE = 1.02  # methods that take no longer than this many times the least are alike: memory decides


def advised(methods: tuple[Method, ...]) -> tuple[str, str]:
    """The name of the method to take, and why, in a sentence a method."""
    able = [method for method in methods if not method.why_not]
    least = min(method.seconds for method in able)
    alike = [method for method in able if method.seconds <= ALIKE * least]
    best = min(alike, key=lambda method: method.bytes)
    found = [f"{named(best)} is done after {duration(best.seconds)} at least: {spent(best)}"]
    for other in able:
        if other is not best:
            found.append(f"{named(other)} takes {compared(other, best)}")
    return best.name, "; ".join(found)


def named(method: Method) -> str:
    mesh = f" on {' × '.join(map(str, method.mesh))} ranks" if len(method.mesh) > 1 else ""
    return method.name + mesh


def spent(method: Method) -> str:
    """Where the time goes."""
    busiest, exposed = (sum(getattr(x, name) for x in method.passes) for name in ("busiest", "exposed"))
    link = sum(x.on_link for x in method.passes)
    if link == 0:
        return f"kernels take {duration(busiest)}, and nothing travels"
    return (
        f"kernels take {duration(busiest)} on the busiest rank, and {duration(exposed)} are added by "
        f"{duration(link)} on its link"
    )


def compared(other: Method, best: Method) -> str:
    ratio, memory = other.seconds / best.seconds, other.bytes / best.bytes
    time = "as long" if ratio < ALIKE else f"{ratio:.2f}× as long"
    more = (
        f"{quantity(other.bytes, 'B')} a rank, {memory:.2f}× as much" if memory >= 1.01 else "no more memory"
    )
    return f"{time} ({spent(other)}) and {more}"
