"""What will a call do that several GPUs share, by each method, and which one should it take?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ....distributed.order import order_of
from ....plan.names import ARGUMENTS, CACHED_ARGUMENTS, refuse_unknown
from ....plan.request import Request, make_request, without_drawing
from ....pytorch.nested import is_nested
from ..as_workload import as_workload, notes
from ..coverage import pairs_that_count
from ..explain import chip_for, on_meta, reasons, refuse_malformed
from ..findings import Work
from ..text import counted
from .advice import advised
from .chunks import chunks_of
from .findings import Method, RanksFindings
from .link import link_rate
from .methods import Ranks, all_gather, heads, ring, ring_of_heads
from .pieces import seconds_of
from .text import plain_text
from .traffic import why_not_heads
from .whole import Whole

Tensor = torch.Tensor
MOST_RANKS = 4096  # a plan looks at what each rank has to do with each other


class RanksExplanation(RanksFindings):
    """What `explain_ranks` found: print it to read it; `to_dict` is for JSON."""

    def __str__(self) -> str:
        return plain_text(self)


def explain_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ranks: int | tuple[int, int],
    link: str | float | tuple[str | float, str | float],
    order: str = "zigzag",
    gpu: str | None = None,
    work: Work = "forward",
    **arguments: Any,
) -> RanksExplanation:
    """What `tilewise.distributed.context_parallel_attention` would cost with each of its methods, and which
    to take. Counted on the host: nothing runs, nothing is sent, and no GPU is needed.

    q, k, v:   those of the whole call, as for `attention`: meta and fake tensors will do, as in `explain`.
    ranks:     how many GPUs share the sequence, up to 4096; or (across, within) of a mesh with two
               dimensions, where ranks are groups of `within`. Of a number, a mesh of two dimensions is looked
               at too: the best that divides it.
    link:      bytes a second that a GPU can send and, at the same time, receive: "450GB/s", "400Gbit/s", or a
               number; with a mesh one for each dimension, or one for both.
    order:     "zigzag" or "contiguous": which rows each rank holds.
    gpu, work: as in `explain`; work="training" adds the backward.
    arguments: those of `attention`.

    Raises what `attention` raises for arguments that no implementation takes or knows, and ValueError for
    ranks, a link or an order that are none, and for a sequence that does not divide.
    """
    if work not in ("forward", "training"):
        raise ValueError(f"{work=} must be 'forward' or 'training'")
    refuse_sequences([name for name, value in arguments.items() if value is not None])
    refuse_unknown("explain_ranks", arguments, [*ARGUMENTS, "ranks", "link", "order", "gpu", "work"])
    if is_nested(q, k, v):
        raise ValueError(f"q, k, v as nested tensors {PACKED_TOGETHER}")
    return_lse = bool(arguments.pop("return_lse", False))
    mesh = mesh_of(ranks)
    links = links_of(link, mesh)
    if work == "training" and isinstance(q, Tensor) and q.is_floating_point():
        q = q.detach().requires_grad_()
    with torch.set_grad_enabled(work == "training"):
        request = make_request(q, k, v, **without_drawing(q, arguments))
        with unset_fake_temporarily():
            return plan_request(request, mesh, links, order, gpu, work, return_lse)


def plan_request(
    request: Request, mesh: tuple[int, ...], links: tuple[float, ...], order: str, gpu: str | None,
    work: Work, return_lse: bool,
) -> RanksExplanation:  # fmt: skip
    """`explain_ranks` of a request. The mode of gradients is that of `work`."""
    refuse_what_no_kernel_takes(request)
    chip, gpu_because, on_its_gpu = chip_for(request.q, gpu)
    model = as_workload(request, chip, work == "training", return_lse, on_its_gpu)
    whole, shape = Whole(request, model, chip, on_its_gpu), model.shape
    shared = shared_by(whole, mesh, links, order)
    methods = tuple(methods_of(whole, shared))
    best, because = advised(methods)
    return RanksExplanation(
        work=work,
        ranks=shared.count,
        order=order,
        link=links,
        gpu=chip.name,
        gpu_because=gpu_because,
        sizes={name: size for name, size in shape._asdict().items() if isinstance(size, int)},
        dtype=str(request.q.dtype).removeprefix("torch."),
        pairs=model.parts.pairs,
        pairs_that_count=model.parts.counted(pairs_that_count),
        exact=not model.parts.unknown,
        notes=tuple(notes(request, model)),
        one_device=seconds_of(model, model.parts)[: 2 if model.training else 1],
        methods=methods,
        best=best,
        because=because,
    )


# ---- What was asked for

PACKED_TOGETHER = (
    "are no sequence that ranks can share: give dense ones of all documents, one behind the other, and "
    "mask=tilewise.Documents(ids)"
)


def refuse_sequences(given: list[str]) -> None:
    """Raise ValueError for what says that sequences are packed or in a cache."""
    if named := [name for name in ("q_offsets", "kv_offsets") if name in given]:
        raise ValueError(f"{', '.join(named)}: packed sequences {PACKED_TOGETHER}")
    cached = [name for name in CACHED_ARGUMENTS if name not in ARGUMENTS and name in given]
    if cached:
        raise ValueError(
            f"{', '.join(cached)}: ranks do not share a cache; explain a decoding call without ranks"
        )


def mesh_of(ranks: Any) -> tuple[int, ...]:
    """The sizes of a mesh: one, or (across, within)."""
    sizes = ranks if isinstance(ranks, tuple) else (ranks,)
    wanted = f"a number from 1 to {MOST_RANKS}, or (across, within) of a mesh with no more ranks than that"
    if len(sizes) not in (1, 2) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{ranks=} must be {wanted}")
    if math.prod(sizes) > MOST_RANKS:
        raise ValueError(f"{ranks=} must be {wanted}")
    return sizes


def links_of(link: Any, mesh: tuple[int, ...]) -> tuple[float, ...]:
    """The rate of the links of each dimension of a mesh."""
    given = link if isinstance(link, tuple) else (link,) * len(mesh)
    if len(given) != len(mesh):
        sizes = " x ".join(map(str, mesh))
        raise ValueError(f"{link=} must be one rate, or one for each dimension of the mesh: ranks={sizes}")
    return tuple(map(link_rate, given))


def refuse_what_no_kernel_takes(request: Request) -> None:
    """Raise ValueError where the fused kernels do not answer on a GPU: then no time is known."""
    refuse_malformed(request)
    if request.scales is not None:
        raise ValueError(
            "scales: sharing fp8 numbers over ranks is not built; explain q, k and v in 16 bits, or the part "
            "of one rank without ranks"
        )
    if request.impl not in (None, "portable"):
        raise ValueError(
            f"impl={request.impl!r} must be None or 'portable': parts of a larger call are answered by the "
            "portable kernels, whose times these are"
        )
    given = on_meta(request) if request.q.is_meta else request
    if broken := reasons(replace(on_meta(given), impl="portable", strict=False)):
        raise ValueError(broken[0])
    if 0 in request.shape.scores:
        shapes = f"q.shape={tuple(request.q.shape)} and k.shape={tuple(request.k.shape)}"
        raise ValueError(f"{shapes} have no pair of query and key: there is nothing to share")


def shared_by(whole: Whole, mesh: tuple[int, ...], links: tuple[float, ...], order: str) -> Ranks:
    count, shape = math.prod(mesh), whole.shape
    q_order, kv_order = (
        order_of(length, count, order, name=name)
        for name, length in (("q_len", shape.q_len), ("kv_len", shape.kv_len))
    )
    return Ranks(mesh, links, order, q_order, kv_order)


def methods_of(whole: Whole, ranks: Ranks) -> Iterator[Method]:
    heads_of = whole.shape.q_heads, whole.shape.kv_heads
    chunks = chunks_of(whole, ranks.q_order, ranks.kv_order, heads_of)
    yield ring(whole, ranks, chunks)
    yield all_gather(whole, ranks, chunks)
    yield heads(whole, ranks)
    yield two_levels(whole, ranks)


def two_levels(whole: Whole, ranks: Ranks) -> Method:
    """Heads within, a ring across: on the mesh that was asked for, or the best that the ranks divide into."""
    if len(ranks.mesh) == 2:
        return ring_of_heads(whole, ranks, *ranks.mesh)
    sizes = [n for n in range(2, ranks.count // 2 + 1) if ranks.count % n == 0]
    fitting = [n for n in sizes if not why_not_heads(whole.shape, n)]
    if not fitting:
        why = f"ranks={ranks.count} does not divide into groups of several"
        if sizes:
            why += f" that could share {counted(whole.shape.q_heads, 'head')} of q evenly"
        return Method("ring, heads", (), why)
    found = [ring_of_heads(whole, ranks, ranks.count // within, within) for within in fitting]
    return min(found, key=lambda method: (method.seconds, method.bytes))
