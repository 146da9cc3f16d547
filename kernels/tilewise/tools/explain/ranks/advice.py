"""Which method should a call take, and why?"""

from __future__ import annotations

from ..text import duration, quantity
from .findings import Method

ALIKE = 1.02  # methods that take no longer than this many times the least are alike: memory decides


def advised(methods: tuple[Method, ...]) -> tuple[str, str]:
    """The name of the method to take, and why."""
    able = [method for method in methods if not method.why_not]
    least = min(method.seconds for method in able)
    alike = [method for method in able if method.seconds <= ALIKE * least]
    best = min(alike, key=lambda method: method.bytes)
    reason = f"{named(best)}: {duration(best.seconds)} at least, {spent(best)}"
    if best.seconds > least:
        reason += f"; what is faster by less than {ALIKE - 1:.0%} needs more memory"
    return best.name, reason


def named(method: Method) -> str:
    return f"{method.name} ({' × '.join(map(str, method.mesh))})" if len(method.mesh) > 1 else method.name


def spent(method: Method) -> str:
    """Where the time goes."""
    busiest, exposed, link = (
        sum(getattr(x, name) for x in method.passes) for name in ("busiest", "exposed", "on_link")
    )
    kernels = f"of which kernels take {duration(busiest)} on the busiest rank"
    if link == 0:
        return f"{kernels}, and nothing travels"
    if exposed < 0.01 * busiest:
        return f"{kernels}, and hide nearly all of the {duration(link)} that its link needs"
    return f"{kernels}; its link needs {duration(link)}, and {duration(exposed)} of waiting are left"


def compared(other: Method, best: Method) -> str:
    """What another method than the best costs."""
    memory = other.bytes / best.bytes
    return (
        f"{named(other)}: {duration(other.seconds)}, {other.seconds / best.seconds:.2f}× as long, "
        f"{spent(other)}; {quantity(other.bytes, 'B')} of memory a rank, {memory:.2f}× as much"
    )
