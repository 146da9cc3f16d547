"""How does an explanation read? The same sections as plain text and, in the command, with rich."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .findings import Cached, Findings, Packed

WIDTH = 100


@dataclass(frozen=True)
class Section:
    """A title, then sentences, then a table: a heading and rows of cells."""

    title: str
    sentences: tuple[str, ...] = ()
    heading: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def sections(e: Findings) -> list[Section]:
    """What an explanation says, in order."""
    found = [implementation(e)]
    if e.kernels:
        found += [launches(e), tiles(e), work(e), limits(e), memory(e)]
    found.append(advice(e))
    return [section for section in found if section.sentences or section.rows]


def title(e: Findings) -> str:
    """The call in a line."""
    s = e.sizes
    if e.cached is not None:
        return cached_title(e, e.cached)
    if e.packed is not None:
        return packed_title(e, e.packed)
    q = [s["batch"], s["q_heads"], s["q_len"], s["head_dim"]]
    k = [s["batch"], s["kv_heads"], s["kv_len"], s["head_dim"]]
    keys = f"k, v {k}" if s["head_dim"] == s["value_dim"] else f"k {k}, v {[*k[:3], s['value_dim']]}"
    what = "forward" if e.work == "forward" else "forward and backward"
    return f"attention, {what}: q {q}, {keys}, {e.dtype}"


def cached_title(e: Findings, cached: Cached) -> str:
    """The same of a cache; of packed queries q is [tokens, heads, dim]."""
    s = e.sizes
    q = [s["batch"], s["q_heads"], s["q_len"], s["head_dim"]]
    if e.packed is not None:
        q = [s["q_len"], s["q_heads"], s["head_dim"]]
    k = [s["batch"], s["kv_heads"], s["kv_len"], s["head_dim"]]
    if cached.page_size is not None:
        k = [cached.pages or 0, cached.page_size, s["kv_heads"], s["head_dim"]]
    same = s["head_dim"] == s["value_dim"]
    keys = f"cache_k, cache_v {k}" if same else f"cache_k {k}, cache_v {[*k[:3], s['value_dim']]}"
    sequences = counted(cached.sequences, "sequence")
    return f"cached attention, forward: {sequences}, q {q}, {keys}, {e.dtype}"


def packed_title(e: Findings, packed: Packed) -> str:
    """The same of tensors [tokens, heads, dim]."""
    s = e.sizes
    q, k = [s["q_len"], s["q_heads"], s["head_dim"]], [s["kv_len"], s["kv_heads"], s["head_dim"]]
    keys = f"k, v {k}" if s["head_dim"] == s["value_dim"] else f"k {k}, v {[*k[:2], s['value_dim']]}"
    what = "forward" if e.work == "forward" else "forward and backward"
    sequences = counted(packed.sequences, "packed sequence")
    return f"attention, {what}: {sequences}, q {q}, {keys}, {e.dtype}"


def implementation(e: Findings) -> Section:
    on_gpu = f"On an {e.gpu} ({e.gpu_because})"
    is_meta, has_kernels = e.device == "meta" and not e.refused, not e.no_kernels
    if is_meta and has_kernels and e.implementation == e.on_gpu:  # "here" means nothing to a meta tensor
        asked = f": {e.because}" if e.because.startswith("impl=") else ""
        sentences = [f"{on_gpu} the {e.on_gpu} kernels answer{asked}."]
    else:
        sentences = [f"{e.implementation} answers here: {e.because}."]
    if e.refused:
        sentences = [f"attention() raises here: {reason}." for reason in e.refused]
    sentences += [f"{name} does not: {why}." for name, why in e.others.items()]
    sentences += [f"Plain PyTorch holds {x.name} {quantity(x.bytes, 'B')}." for x in e.memory_here]
    if not has_kernels:
        sentences.append(f"No kernel on an {e.gpu}: {e.no_kernels}.")
    elif e.implementation != e.on_gpu or e.refused:
        sentences.append(f"{on_gpu} the {e.on_gpu} kernels would answer, as follows.")
    elif not is_meta:
        sentences.append(f"What follows is for an {e.gpu} ({e.gpu_because}).")
    if e.on_gpu_note and has_kernels:
        sentences.append(f"{e.on_gpu_note}.")
    if is_meta:
        sentences.append("q is a meta tensor: a call gives one too, of the shape of the result.")
    return Section("Implementation", tuple(sentences))


def launches(e: Findings) -> Section:
    origins: dict[str, list[str]] = {}
    for kernel in e.kernels:
        origins.setdefault(kernel.tile_from, []).append(kernel.name)
    # One origin for all is the rule.
    sentences = [
        f"Tiles{'' if len(origins) == 1 else ' of ' + ', '.join(names)}: {origin}."
        for origin, names in origins.items()
    ]
    if e.cached is not None:
        sentences += cache(e, e.cached)
    elif e.packed is not None:
        sentences += sequences(e, e.packed)
    rows = [
        (
            kernel.name,
            f"{kernel.tile.tile_q} × {kernel.tile.tile_kv}" if kernel.tiles else f"{kernel.tile.tile_q} rows",
            str(kernel.tile.num_warps) if kernel.tiles else "",
            str(kernel.tile.num_stages) if kernel.tiles else "",
            f"{kernel.programs:,}",
            f"{kernel.waves:.1f}",
        )
        for kernel in e.kernels
    ]
    heading = ("kernel", "tile", "warps", "stages", "programs", "per multiprocessor")
    return Section("Launches", tuple(sentences), heading, tuple(rows))


def sequences(e: Findings, packed: Packed) -> list[str]:
    """How long packed sequences are, and what their ends cost the forward."""
    queries, keys = zip(packed.shortest, packed.longest, packed.tokens, strict=True)
    what = "queries" if queries != keys else "tokens"
    found = f"{counted(packed.sequences, 'packed sequence')} of {lengths(*queries, what)}"
    if queries != keys:
        found += f", and {lengths(*keys, 'keys')}"
    kernel, *_ = e.kernels
    room = kernel.busy // e.sizes["q_heads"] * kernel.tile.tile_q
    padding = share(room - packed.tokens[0], room)
    sentences = [
        f"{found}.",
        f"No tile holds rows of two sequences: those of {kernel.name} have {room:,} rows a head for "
        f"{packed.tokens[0]:,} {what}, {padding} of them padding.",
    ]
    if spare := kernel.programs - kernel.busy:
        sentences.append(
            f"{spare:,} of {kernel.programs:,} programs of {kernel.name} have no tile: how many there are "
            "does not depend on the lengths, which only the device reads."
        )
    return sentences


def cache(e: Findings, cached: Cached) -> list[str]:
    """How full a cache is, and how programs share rows and keys."""
    kernel, *_ = e.kernels
    group = e.sizes["q_heads"] // e.sizes["kv_heads"]
    span = lengths(cached.shortest, cached.longest, cached.keys, "keys")
    found = [f"{counted(cached.sequences, 'sequence')} of {span}, and room for {cached.capacity:,} each."]
    if cached.page_size is not None:
        found.append(
            f"Pages of {counted(cached.page_size, 'row')}: {cached.pages_in_use:,} in use, of "
            f"{cached.pages:,} that the cache has."
        )
    up_to = "" if e.packed is None else "up to "
    found.append(
        f"A tile has {kernel.tile.tile_q} rows, for {up_to}{cached.rows:,} that a sequence has in the "
        f"{counted(group, 'head')} of a group; what is left of its last tile is padding."
    )
    if cached.splits == 1:
        found.append("A sequence's keys are in one piece.")
    else:
        found.append(
            f"A sequence's keys are split over {cached.splits:,} programs, at most {cached.split_keys:,} "
            "keys each; combine joins what they find."
        )
    if spare := kernel.programs - kernel.busy:
        found.append(
            f"{spare:,} of {kernel.programs:,} programs of {kernel.name} have no rows or no keys: how many "
            "there are does not depend on the lengths, which only the device reads."
        )
    return found


def lengths(shortest: int, longest: int, tokens: int, what: str) -> str:
    span = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return f"{span} {what} each, {tokens:,} in all"


def tiles(e: Findings) -> Section:
    at_most = "" if e.exact else "at most "
    counted = f"{at_most}{e.pairs_that_count:,} of {e.pairs:,} query-key pairs count"
    meaning = "skipped: never visited. masked: visited, and each pair is asked. full: visited, none is asked."
    rows = []
    for kernel in e.kernels:
        if kernel.tiles is not None:
            of = kernel.tiles
            shares = (share(n, of.total) for n in (of.skipped, of.masked, of.full))
            rows.append((kernel.name, f"{of.total:,}", *shares))
    heading = ("kernel", "tiles", "skipped", "masked", "full")
    pairs = f"{counted}, {share(e.pairs_that_count, e.pairs)}"
    return Section("Tiles", (*map(sentence, (pairs, *e.notes)), meaning), heading, tuple(rows))


WALKS = {  # by a kernel of the backward
    "dqkv": "The backward is in one walk, five products a tile: with deterministic=False the static model "
    "finds that faster here than two walks, or tiles.use_walks(1) asks for it. No GPU has timed either.",
    "dkv": "The backward is in two walks, seven products a tile: one walk has five, but by the static model "
    "it is clearly faster only for some calls at head_dim 64, above all with deterministic=False.",
    "dv": "Of rows this wide dk and dv are summed by programs of their own, which leaves room for larger "
    "tiles: Q Kᵀ is computed for each.",
}


def work(e: Findings) -> Section:
    heading = ("kernel", "FLOPs", "executed", "exponentials", "bytes", "FLOP/byte")
    rows = [
        (
            kernel.name,
            quantity(kernel.flops, "FLOP"),
            quantity(kernel.executed_flops, "FLOP"),
            quantity(kernel.exponentials),
            quantity(kernel.bytes, "B"),
            f"{kernel.intensity:.1f}",
        )
        for kernel in e.kernels
    ]
    meaning = (
        f"{quantity(e.flops, 'FLOP')} as papers count them. FLOPs: of the pairs that count. executed: on "
        "whole tiles, with dimensions rounded up to their columns. bytes: the least traffic with memory."
    )
    names = {kernel.name for kernel in e.kernels}
    said = [words for name, words in WALKS.items() if name in names]
    return Section("Work", (meaning, *said), heading, tuple(rows))


def limits(e: Findings) -> Section:
    heading = ("kernel", "matmul", "exponentials", "memory", "at least", "in turns", "limit")
    rows = [
        (
            kernel.name,
            *(duration(x) for x in kernel.limits.seconds().values()),
            duration(kernel.limits.overlapped),
            duration(kernel.limits.in_turns),
            kernel.limits.limit,
        )
        for kernel in e.kernels
    ]
    if len(rows) > 1:
        all_of = [duration(x) for x in e.limits.seconds().values()]
        rows.append(("all", *all_of, duration(e.seconds), duration(e.seconds_in_turns), e.limit))
    rate = quantity(e.flops / e.seconds, "FLOP/s") if e.seconds else "0"
    verdict = f"The limit is {reason(e)}: no faster than {duration(e.seconds)}, {rate} of what counts."
    meaning = (
        "By the datasheet's rates. at least: all three pipes work at once. in turns: exponentials and "
        "matmuls wait for one another."
    )
    return Section(f"Limits on an {e.gpu}", (verdict, meaning), heading, tuple(rows))


def reason(e: Findings) -> str:
    """The limit in words: a pipe, or how few programs there are and what keeps those busy."""
    if e.limit != "programs":
        return e.limit
    kernel = max(e.kernels, key=lambda kernel: kernel.limits.overlapped * kernel.limits.few_programs)
    of, programs = round(kernel.busy / kernel.waves), kernel.busy
    rows, padded = e.sizes["q_len"] if e.packed is None else e.packed.longest[0], ""
    if e.cached is not None:
        rows = e.cached.rows
    if kernel.tiles is not None and rows < kernel.tile.tile_q:
        at_most = "" if e.packed is None else "at most "
        padded = f", on tiles of {kernel.tile.tile_q} rows that hold {at_most}{rows}"
    return (
        f"how few programs there are: the {programs} of {kernel.name} leave {of - programs} of {of} "
        f"multiprocessors idle (the others are busiest with {kernel.limits.largest}{padded})"
    )


def memory(e: Findings) -> Section:
    rows = tuple((x.name, quantity(x.bytes, "B"), x.kept) for x in e.memory)
    return Section("Memory that a call allocates", (), ("tensor", "size", "kept as"), rows)


def advice(e: Findings) -> Section:
    if not e.kernels:
        return Section("What would make it faster")
    found = [
        f"{f'{s.factor:.1f}× by the model' if s.factor else 'no figure'}: {s.text}." for s in e.suggestions
    ]
    return Section("What would make it faster", tuple(found) or ("Nothing that is known here.",))


# ---- Numbers


def quantity(value: float, unit: str = "") -> str:
    """A count with three digits and a prefix: 1.23 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return (
                f"{value / size:.3g} {prefix}{unit}"
                if value < 999.5 * size
                else f"{value / size:.0f} {prefix}{unit}"
            )
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} µs"


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# ---- Plain text


def plain_text(e: Findings) -> str:
    """The explanation for a terminal, a log or a file, `WIDTH` wide unless a table needs more."""
    return wrapped(title(e), sections(e))


def wrapped(heading: str, found: Iterable[Section]) -> str:
    """The same of any sections."""
    lines = [heading]
    for section in found:
        lines += ["", section.title]
        for text in section.sentences:
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        lines += [f"  {line}".rstrip() for line in table(section.heading, section.rows)]
    return "\n".join(lines)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be; the first and whatever is not a number to the left."""
    cells = [list(heading), *(list(row) for row in rows)] if heading else []
    if not cells:
        return []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if is_number(i, cells) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(padded))
    return lines


def is_number(column: int, cells: Sequence[Sequence[str]]) -> bool:
    """Whether a column holds numbers: every cell below the heading begins with a digit, or is empty."""
    return all(not row[column] or row[column][0].isdigit() for row in cells[1:])
