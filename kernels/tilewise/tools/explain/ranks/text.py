"""How does a plan for several GPUs read? Sections, as those of an explanation."""

from __future__ import annotations

from collections.abc import Iterator

from ..text import Section, counted, duration, quantity, sentence, share, wrapped
from .advice import compared, named
from .findings import Method, Pass, RanksFindings, Steps


def title(e: RanksFindings) -> str:
    s = e.sizes
    q = [s["batch"], s["q_heads"], s["q_len"], s["head_dim"]]
    k = [s["batch"], s["kv_heads"], s["kv_len"], s["head_dim"]]
    keys = f"k, v {k}" if s["head_dim"] == s["value_dim"] else f"k {k}, v {[*k[:3], s['value_dim']]}"
    what = "forward" if e.work == "forward" else "forward and backward"
    return f"attention, {what}, shared by {counted(e.ranks, 'rank')}: q {q}, {keys}, {e.dtype}"


def sections(e: RanksFindings) -> list[Section]:
    """What a plan says, in order."""
    return [method(e), work(e), *passes(e), memory(e)]


def method(e: RanksFindings) -> Section:
    able = [m for m in e.methods if not m.why_not]
    found = [f"Take {e.because}."]
    found += [f"{compared(m, e[e.best])}." for m in able if m.name != e.best]
    found += [f"{named(m)} cannot be: {m.why_not}." for m in e.methods if m.why_not]
    if e[e.best].seconds >= sum(e.one_device):
        found.append(f"No faster than one {e.gpu} alone, which would take {alone(e)} at least.")
    found.append(
        "Counted, not measured: times are floors by the datasheet and the rate of the link, without latency."
    )
    return Section("Which method", tuple(found))


def work(e: RanksFindings) -> Section:
    at_most = "" if e.exact else "at most "
    pairs = f"{at_most}{e.pairs_that_count:,} of {e.pairs:,} query-key pairs count"
    held = "chunks r and 2R - 1 - r of 2R" if e.order == "zigzag" else "chunk r of R"
    sentences = (
        sentence(f"{pairs}, {share(e.pairs_that_count, e.pairs)}"),
        *map(sentence, e.notes),
        f"Rank r of R has {held}. Alone, an {e.gpu} ({e.gpu_because}) would take {alone(e)} at least.",
    )
    heading = ("method", "pairs of the busiest rank", "most / mean")
    rows = tuple((named(m), f"{max(m.pairs):,}", f"{m.balance:.3f}") for m in e.methods if m.pairs)
    return Section("Balance", sentences, heading, rows)


def alone(e: RanksFindings) -> str:
    return " and ".join(map(duration, e.one_device))


def passes(e: RanksFindings) -> Iterator[Section]:
    rates = " across and ".join(quantity(rate, "B/s") for rate in e.link) + " within" * (len(e.link) > 1)
    meaning = (
        "Each is the most of any rank. link: the time that its bytes take there. kernels: their least time, "
        "with what joins their results. exposed: what waiting for bytes and for other ranks adds to that."
    )
    heading = ("method", "sends", "receives", "link", "kernels", "exposed", "at least")
    for name in ("forward", "backward"):
        rows = tuple((named(m), *cells(x)) for m, x in passes_of(e, name))
        if rows:
            said = [meaning] if name == "forward" else []
            said += [f"{named(m)}, {step(x.steps)}." for m, x in passes_of(e, name) if x.steps is not None]
            yield Section(
                f"{name.capitalize()} on an {e.gpu}, with links of {rates}", tuple(said), heading, rows
            )


def passes_of(e: RanksFindings, name: str) -> list[tuple[Method, Pass]]:
    return [(m, getattr(m, name)) for m in e.methods if getattr(m, name) is not None]


def step(steps: Steps) -> str:
    kernels = duration(steps.shortest)
    if steps.longest > 1.005 * steps.shortest:
        kernels += f" to {duration(steps.longest)}"
    return f"a step: kernels of {kernels}, and messages of up to {duration(steps.message)} to hide under them"


def cells(x: Pass) -> tuple[str, ...]:
    moved = (quantity(max(x.sent), "B"), quantity(max(x.received), "B"))
    return *moved, *map(duration, (x.on_link, x.busiest, x.exposed, x.seconds))


def memory(e: RanksFindings) -> Section:
    able = [m for m in e.methods if m.memory]
    names = {x.name: x.kept for m in able for x in m.memory}
    of = [{x.name: quantity(x.bytes, "B") for x in m.memory} for m in able]
    rows = [(name, kept, *(each.get(name, "") for each in of)) for name, kept in names.items()]
    most = ("at most at one time", "", *(quantity(m.bytes, "B") for m in able))
    meaning = "forward, backward: in that pass alone. kept: from one to the other."
    return Section("Memory of a rank", (meaning,), ("tensors", "kept as", *map(named, able)), (*rows, most))


def plain_text(e: RanksFindings) -> str:
    return wrapped(title(e), sections(e))
