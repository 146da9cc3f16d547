"""What does each method ask of every rank? Bytes, time, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ....distributed.order import Order
from ....parts.shape import ceil_div
from .chunks import Chunks, chunks_of, held
from .findings import Method, Pass, Steps
from .memory import memory_of_all_gather, memory_of_both, memory_of_heads, memory_of_ring
from .pieces import Times, joined
from .traffic import Sizes, by_ring, heads_of_rank, why_not_heads
from .waiting import ring_seconds
from .whole import Whole

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a call, and where its rows are. mesh: how many there are, or of a mesh with two
    dimensions how many across and within; link: bytes a second, of each dimension of the mesh."""

    mesh: tuple[int, ...]
    link: tuple[float, ...]
    order: str
    q_order: Order
    kv_order: Order

    @property
    def count(self) -> int:
        return self.q_order.ranks

    @property
    def slowest(self) -> float:
        """The link that whoever talks to all ranks waits for."""
        return min(self.link)


@dataclass(frozen=True)
class Share:
    """What each rank does in one pass, [ranks]: bytes, seconds of its kernels, and when it is done; of a ring
    also its steps."""

    sent: Tensor
    received: Tensor
    compute: Tensor
    done: Tensor
    steps: Steps | None = None


def why_not_parts(whole: Whole, ranks: Ranks) -> str:
    """Why the call cannot be cut along its keys; empty if it can."""
    if whole.request.dropout is None or ranks.kv_order.chunk % 4 == 0:
        return ""
    return f"dropout is drawn for four keys at once, and a chunk has {ranks.kv_order.chunk}"


def ring(whole: Whole, ranks: Ranks, chunks: Chunks) -> Method:
    """Keys travel to the queries that see them, while others are computed."""
    if why := why_not_parts(whole, ranks):
        return Method("ring", (ranks.count,), why)
    forward, backward = ring_shares(whole, chunks, ranks.slowest, whole.shape.kv_heads)
    return Method(
        "ring", (ranks.count,), "",
        tuple(chunks.pairs().tolist()),
        pass_of(forward, ranks.slowest),
        pass_of(backward, ranks.slowest) if whole.work.training else None,
        memory_of_ring(whole, ranks.q_order, ranks.kv_order, chunks.needed()),
    )  # fmt: skip


def ring_shares(whole: Whole, chunks: Chunks, link: float, kv_heads: int) -> tuple[Share, Share]:
    """Forward and backward of a ring over the ranks of `chunks`, with so many heads of keys."""
    sizes = Sizes.of(whole)
    rows, needed = chunks.kv_order.chunk, chunks.needed()
    keys = by_ring(needed, sizes.keys(rows, sizes.element, kv_heads))
    sums = by_ring(needed, sizes.keys(rows, sizes.sums, kv_heads))
    found = []
    for compute, back in zip(chunks.seconds(), (torch.zeros_like(sums), sums), strict=True):
        sent, received = keys.sum(0) + back.sum(1), keys.sum(1) + back.sum(0)
        done = ring_seconds(compute, keys, back, link)
        found.append(Share(sent, received, compute.sum(1), done, steps_of(compute, keys, back, link)))
    return found[0], found[1]


def steps_of(compute: Tensor, keys: Tensor, back: Tensor, link: float) -> Steps | None:
    came = compute[keys > 0]
    if len(came) == 0:
        return None
    return Steps(int(torch.maximum(keys, back).max()) / link, float(came.min()), float(came.max()))


def pass_of(share: Share, link: float, besides: int = 0, outer: float = 1.0) -> Pass:
    """The pass of these shares. besides: bytes that every rank sends and receives while nothing is computed,
    on the link `outer`."""
    on_link = float(torch.maximum(share.sent, share.received).max()) / link
    return Pass(
        tuple((share.sent + besides).tolist()),
        tuple((share.received + besides).tolist()),
        tuple(share.compute.tolist()),
        on_link + besides / outer,
        float(share.done.max()) + besides / outer,
        share.steps,
    )


def all_gather(whole: Whole, ranks: Ranks, chunks: Chunks) -> Method:
    """Every rank first gets all keys that its queries see, and then computes."""
    if why := why_not_parts(whole, ranks):
        return Method("all_gather", (ranks.count,), why)
    sizes, needed = Sizes.of(whole), chunks.needed()
    rows = ranks.kv_order.chunk
    keys = by_ring(needed, sizes.keys(rows, sizes.element))
    sums = by_ring(needed, sizes.keys(rows, sizes.sums))
    times = gathered(whole, chunks)

    def made(seconds: Tensor, back: Tensor) -> Pass:
        compute = seconds[held(ranks.q_order)].sum(1)
        sent, received = keys.sum(0) + back.sum(1), keys.sum(1) + back.sum(0)
        # All keys have come before the first is read, and gradients go when the last one is computed.
        before, after = (float(torch.maximum(x.sum(0), x.sum(1)).max()) / ranks.slowest for x in (keys, back))
        return pass_of(Share(sent, received, compute, compute + before + after), ranks.slowest)

    return Method(
        "all_gather", (ranks.count,), "",
        tuple(times.pairs[held(ranks.q_order)].sum(1).tolist()),
        made(times.forward, torch.zeros_like(sums)),
        made(times.backward, sums) if whole.work.training else None,
        memory_of_all_gather(whole, ranks.q_order, ranks.kv_order, needed),
    )  # fmt: skip


LENGTHS = 64  # of runs that are told apart; of more, each is counted as the next longer one


def gathered(whole: Whole, chunks: Chunks) -> Times:
    """Of each chunk of queries, [q_chunks], one call for each run of chunks of keys that it sees."""
    q_order, kv_order, seen = chunks.q_order, chunks.kv_order, chunks.seen
    edge = torch.zeros(len(seen), 1, dtype=torch.bool, device="cpu")
    begins = (seen & ~torch.cat([edge, seen[:, :-1]], 1)).nonzero()
    ends = (seen & ~torch.cat([seen[:, 1:], edge], 1)).nonzero()
    count = ends[:, 1] - begins[:, 1] + 1
    coarse = ceil_div(int(count.max()), LENGTHS) if len(count) else 1
    count = (-(-count // coarse) * coarse).clamp(max=kv_order.chunks)
    first = torch.minimum(begins[:, 1], kv_order.chunks - count)
    found = [
        torch.zeros(len(seen), dtype=x, device="cpu") for x in (torch.float64, torch.float64, torch.int64)
    ]
    for length in count.unique().tolist():
        of_length = count == length
        rows = begins[of_length, 0]
        shape = whole.shape._replace(q_len=q_order.chunk, kv_len=length * kv_order.chunk)
        times = whole.times(shape, rows * q_order.chunk, first[of_length] * kv_order.chunk)
        for total, each in zip(found, (times.forward, times.backward, times.pairs), strict=True):
            total.index_add_(0, rows, each)
    return Times(*found)


def heads(whole: Whole, ranks: Ranks) -> Method:
    """Every rank gets the whole sequence, of some heads."""
    count = ranks.count
    if why := why_not_heads(whole.shape, count):
        return Method("heads", (count,), why)
    q_heads, kv_heads = heads_of_rank(whole.shape, count)
    part = whole.shape._replace(q_heads=q_heads, kv_heads=kv_heads)
    first = torch.zeros(1, dtype=torch.int64, device="cpu")
    times = joined([each.times(part, first, first, joined_to=False) for each in by_heads(whole, count)])
    moved = exchanged(whole, ranks, count)

    def made(seconds: Tensor, name: str) -> Pass:
        compute, nothing = seconds.expand(count), torch.zeros(count, dtype=torch.int64, device="cpu")
        return pass_of(Share(nothing, nothing, compute, compute), ranks.slowest, moved[name], ranks.slowest)

    return Method(
        "heads", (count,), "",
        tuple(times.pairs.expand(count).tolist()),
        made(times.forward, "forward"),
        made(times.backward, "backward") if whole.work.training else None,
        memory_of_heads(whole, ranks.q_order, ranks.kv_order, count),
    )  # fmt: skip


def by_heads(whole: Whole, ranks: int) -> list[Whole]:
    """The call with the heads of each rank; one that stands for all where masks do not tell heads apart."""
    if whole.rows.repeats[1] == 1:
        return [whole]
    each = whole.shape.q_heads // ranks
    return [replace(whole, heads=(rank * each, (rank + 1) * each)) for rank in range(ranks)]


def exchanged(whole: Whole, ranks: Ranks, within: int) -> dict[str, int]:
    """Bytes that every rank sends, and receives, in each pass where `within` ranks divide the heads, before
    and after what is computed: each rank gets some heads of the rows of every other one."""
    shape, sizes = whole.shape, Sizes.of(whole)
    q_rows, kv_rows = ranks.q_order.rows_each, ranks.kv_order.rows_each
    q_heads, kv_heads = heads_of_rank(shape, within)
    q, out = (sizes.queries(q_rows, dim, q_heads) for dim in (shape.head_dim, shape.value_dim))
    keys = sizes.keys(kv_rows, sizes.element, kv_heads)
    lse = sizes.statistics(q_rows, q_heads) if whole.work.return_lse else 0
    # The gradients of all of these go the other way, in the dtypes of what they are gradients of.
    return dict.fromkeys(("forward", "backward"), (within - 1) * (q + keys + out + lse))


def ring_of_heads(whole: Whole, ranks: Ranks, across: int, within: int) -> Method:
    """Heads are divided within a group of ranks, and groups are a ring."""
    name, mesh = "ring, heads", (across, within)
    if why := why_not_heads(whole.shape, within) or why_not_parts(whole, ranks):
        return Method(name, mesh, why)
    groups = [range(group * within, (group + 1) * within) for group in range(across)]
    q_order, kv_order = (order.together(groups) for order in (ranks.q_order, ranks.kv_order))
    part = heads_of_rank(whole.shape, within)
    of_heads = [chunks_of(each, q_order, kv_order, part) for each in by_heads(whole, within)]
    shares = [ring_shares(whole, chunks, ranks.link[0], part[1]) for chunks in of_heads]
    moved = exchanged(whole, ranks, within)

    def made(which: int, name: str) -> Pass:
        every = [share[which] for share in shares]
        sent, received, compute, done = (flat([getattr(x, it) for x in every], within) for it in FIELDS)
        of_ranks = Share(sent, received, compute, done, every[0].steps)
        return pass_of(of_ranks, ranks.link[0], moved[name], ranks.link[-1])

    needed, orders = of_heads[0].needed(), (ranks.q_order, ranks.kv_order)
    return Method(
        name, mesh, "",
        tuple(flat([chunks.pairs() for chunks in of_heads], within).tolist()),
        made(0, "forward"),
        made(1, "backward") if whole.work.training else None,
        memory_of_both(whole, orders, within, needed, kv_order.chunk),
    )  # fmt: skip


FIELDS = ("sent", "received", "compute", "done")


def flat(of_heads: list[Tensor], within: int) -> Tensor:
    """A number of each group, for each share of the heads or one for all, as one of each rank: those of a
    group stand one behind the other."""
    return torch.stack(of_heads, 1).expand(-1, within).flatten()
