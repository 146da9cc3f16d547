"""Attention to a sequence that several ranks hold, each a part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..api import answer
from ..parts.dropout import Dropout
from ..parts.dtensors import is_dtensor
from ..parts.masks.mask import Mask
from ..parts.place import Place
from ..parts.scores.score import Score
from ..parts.similarity import Cosine
from ..plan.checks import check
from ..plan.implementation import implementation
from ..plan.names import refuse_unknown
from ..plan.request import Request, make_request, without_drawing
from .agree import Words, agreed, word
from .exchange import Channel
from .group import check_mesh, coordinate, group_along
from .heads import Exchanged, ToHeads, ToRows, key_heads, query_heads
from .hosts import Hosts, host_group
from .known import known_blocks
from .order import Order, order_of
from .share import Share, attend_to_all
from .walk import WALKS

Tensor = torch.Tensor
Method = str | tuple[str, str]
CALL = "context_parallel_attention"
METHODS = (*WALKS, "heads")
ARGUMENTS = (
    "mesh", "method", "order", "mask", "bias", "score", "scale", "similarity", "sink", "dropout_p",
    "dropout_seed", "return_lse", "impl", "deterministic",
)  # fmt: skip


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    method: Method = "ring",
    order: str = "zigzag",
    mask: Mask | Tensor | Any = None,
    bias: Tensor | None = None,
    score: Score | Any = None,
    scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot",
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    deterministic: bool = True,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over a sequence that is cut over the ranks of a mesh; all of them call it together.

    q:       [batch, q_heads, q_len / ranks, head_dim], this rank's rows, as `split` gives them.
    k:       [batch, kv_heads, kv_len / ranks, head_dim], this rank's keys.
    v:       [batch, kv_heads, kv_len / ranks, value_dim].
    mesh:    a DeviceMesh of one dimension, or of two. No dimension means the batch: of a mesh with one for
             data, give the part that the sequence is cut over, mesh["context"].
    method:  "ring": keys and values come step by step from the other ranks, while those that are there are
             computed with (arXiv 2310.01889). "all_gather": they come all at once. "heads": rows are
             exchanged for heads, so that each rank has all rows of q_heads / ranks of them (arXiv
             2309.14509). Of a mesh of two dimensions one for each, "heads" and another: ("ring", "heads").
    order:   which rows each rank holds, as in `split`.
    mask, bias, score, scale, similarity, sink, dropout_p, deterministic: as in `attention`, and the same on
             all ranks: those of the whole call, with tensors of its sizes and positions of its rows.
    dropout_seed: the same on all ranks; None: the first rank draws one. The same pairs are dropped as on one
             device.
    impl:    as in `attention`; "hopper" takes whole calls alone, so method="heads".

    Returns out [batch, q_heads, q_len / ranks, value_dim] in q's dtype, and lse [batch, q_heads,
    q_len / ranks] if asked: those of this rank's rows. The same mesh gives the same bits each time.

    Differentiable once, in all that `attention` is. Gradients of q, k and v are whole; that of any other
    tensor is this rank's part, and the sum over all ranks is the whole: as of any weight whose copies on
    several ranks see different data. All ranks run the backward, for it sends messages, too.

    The ranks first compare what they were given, which costs a message between hosts. Which parts see one
    another is planned from the masks' bounds: a mask's tensors are read once. A block that no pair needs is
    neither sent nor computed.

    Raises ValueError, NotImplementedError and TypeError as `attention` does, on every rank; ValueError for
    a mesh, a method or an order that is not one, a length or heads that do not divide, and arguments that
    differ between ranks; RuntimeError, within the time-out of the process group, where a rank has died.
    Under torch.compile it stays outside of the graph. No GPU, and no NCCL, has run it yet: it is tested with
    gloo on CPUs.
    """
    if unknown:
        refuse_unknown(CALL, unknown, ARGUMENTS)
    arguments = dict(
        mask=mask, bias=bias, score=score, scale=scale, similarity=similarity, sink=sink,
        dropout_p=dropout_p, dropout_seed=dropout_seed, impl=impl, deterministic=deterministic,
    )  # fmt: skip
    given = q, k, v, arguments, mesh, method, order, return_lse
    if torch.compiler.is_compiling():
        from ..pytorch.uncompiled import uncompiled

        found: Tensor | tuple[Tensor, Tensor] = uncompiled(attend_together, *given)
        return found
    return attend_together(*given)


def attend_together(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], mesh: DeviceMesh, method: Method, order: str,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The call, all of its arguments given; `arguments` are those of `make_request`."""
    check_mesh(mesh)
    hosts = host_group(mesh)
    with agreed(hosts, CALL) as given:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_local(name, x)
        given.update(in_words(q, k, v, arguments, method=method, order=order, return_lse=return_lse))
        layout = layout_of(mesh, method)
        request, q_order, kv_order = checked(q, k, v, without_drawing(q, arguments), layout, order)
        given["requires a gradient"] = ", ".join(trained(request)) or "nothing"  # who runs a backward
    if request.dropout is not None and arguments["dropout_seed"] is None:
        request = replace(request, dropout=Dropout(request.dropout.p, drawn(hosts, q.device)))
    return run(request, layout, q_order, kv_order, return_lse)


def check_local(name: str, x: Any) -> None:
    """Raise ValueError for a tensor that is more than this rank's rows."""
    if is_dtensor(x):
        raise ValueError(
            f"{name} is a DTensor, placed {x.placements}, and must be a plain tensor, this rank's rows: give "
            f"{name}.to_local(), sharded along the sequence as tilewise.distributed.split has it"
        )
    if isinstance(x, Tensor) and x.is_nested:
        raise ValueError(
            f"{name} is nested, and must be a plain tensor, this rank's rows: put the sequences one behind "
            "the other, with mask=tilewise.Documents(ids)"
        )


class Layout(NamedTuple):
    """Which dimension of the mesh is along the sequence, which along heads, and how keys come."""

    mesh: DeviceMesh
    sequence: int | None
    heads: int | None
    walk: str

    @property
    def head_ranks(self) -> int:
        return 1 if self.heads is None else self.mesh.shape[self.heads]

    def lines(self, dim: int) -> list[list[int]]:
        """The ranks of each group along a dimension, row-major."""
        ranks = torch.arange(self.mesh.size(), device="cpu").reshape(self.mesh.shape)
        lines: list[list[int]] = ranks.movedim(dim, -1).reshape(-1, self.mesh.shape[dim]).tolist()
        return lines


def layout_of(mesh: DeviceMesh, method: Any) -> Layout:
    methods = (method,) if isinstance(method, str) else method
    if not isinstance(methods, tuple) or any(each not in METHODS for each in methods):
        raise ValueError(f"{method=} must be one of {METHODS}, or one for each of the mesh's two dimensions")
    if len(methods) != mesh.ndim:
        raise ValueError(
            f"{method=} names {len(methods)}, and mesh={mesh} has {mesh.ndim} dimension(s): one for each"
        )
    if len(methods) == 2 and methods.count("heads") != 1:
        raise ValueError(f"{method=}: of two dimensions one must be 'heads', the other one of {tuple(WALKS)}")
    walks = [(dim, name) for dim, name in enumerate(methods) if name != "heads"]
    sequence, walk = walks[0] if walks else (None, "")
    return Layout(mesh, sequence, methods.index("heads") if "heads" in methods else None, walk)


def in_words(q: Any, k: Any, v: Any, arguments: dict[str, Any], **others: Any) -> Words:
    """What all ranks must be given alike. Of masks and seeds the contents, too."""
    words = {name: word(x) for name, x in (("q", q), ("k", k), ("v", v))}
    for name, value in (arguments | others).items():
        words[name] = word(value, contents=name in ("mask", "dropout_seed"))
    return words


def trained(request: Request) -> list[str]:
    """The names of what has a gradient."""
    named = [*request.qkv().items(), *request.other_tensors]
    return [name for name, x in named if x.requires_grad and torch.is_grad_enabled()]


def drawn(hosts: Hosts, device: torch.device) -> Tensor:
    """A seed from the CPU's generator of the first rank; all ranks' generators move on."""
    own = torch.randint(-(1 << 62), 1 << 62, (1,), dtype=torch.int64, device="cpu")
    seeds = hosts.gather(int(own).to_bytes(8, "little", signed=True), f"{CALL}, drawing a seed")
    seed = int.from_bytes(seeds[0], "little", signed=True)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def checked(
    q: Any, k: Any, v: Any, arguments: dict[str, Any], layout: Layout, order: str
) -> tuple[Request, Order, Order]:
    """The request of this rank's rows, in its place, and the order of rows and keys. Raises as `attention`
    does, of the whole call."""
    ranks = layout.mesh.size()
    whole = make_request(*[as_whole(x, ranks) for x in (q, k, v)], **arguments)
    check(whole)
    shape = whole.shape
    if shape.q_heads % layout.head_ranks:
        raise ValueError(
            f"method 'heads' gives each of {layout.head_ranks} ranks as many query heads, and "
            f"q_heads={shape.q_heads}: give method='ring' or 'all_gather', or a mesh of two dimensions with "
            "fewer ranks along heads"
        )
    orders = [order_of(shape.q_len, ranks, order, name="q_len")]
    orders.append(order_of(shape.kv_len, ranks, order, name="kv_len"))
    if layout.sequence is not None and implementation(whole) == "hopper":
        if whole.impl == "hopper":
            raise ValueError(
                "impl='hopper' does not know calls that are parts of a larger one: give method='heads', or "
                "leave impl=None"
            )
        arguments = arguments | dict(impl="portable")
    if layout.sequence is not None and whole.dropout is not None and orders[1].chunk % 4:
        raise ValueError(
            f"dropout_p={whole.dropout.p} draws for four keys at once, and kv_len={shape.kv_len} makes "
            f"chunks of {orders[1].chunk} keys: give a multiple of {4 * orders[1].chunks}, or method='heads'"
        )
    request = replace(make_request(q, k, v, **arguments), place=Place(*shape[:5]))
    return request, orders[0], orders[1]


def as_whole(x: Any, ranks: int) -> Any:
    """A tensor with the sizes of the whole sequence, and no memory of its own."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    row = x.detach()[:, :, :1] if x.shape[2] else x.new_empty((*x.shape[:2], 1, x.shape[3]))
    whole = row.expand(-1, -1, x.shape[2] * ranks, -1)
    return whole.requires_grad_() if x.requires_grad else whole


def run(
    request: Request, layout: Layout, q_order: Order, kv_order: Order, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    mesh, device, back = layout.mesh, request.q.device, None
    if layout.heads is not None:
        channel = Channel(group_along(mesh, layout.heads), "heads", device)
        request, back, q_order, kv_order = to_heads(request, layout, channel, q_order, kv_order)
    if layout.sequence is None:
        has_place = bool(request.plugs) or request.dropout is not None
        out, lse = answer(request if has_place else replace(request, place=None), True)
    else:
        channel = Channel(group_along(mesh, layout.sequence), layout.walk, device)
        blocks = known_blocks(request, request.whole, q_order, kv_order)
        out, lse = attend_to_all(Share(channel, q_order, kv_order, blocks, layout.walk), request)
    assert lse is not None
    if back is not None:
        count = request.whole.q_heads
        if not return_lse:
            return ToRows.apply([back], count, out)[0]
        out, lse = ToRows.apply([back, back], count, out, lse[..., None])
        lse = lse[..., 0]
    return (out, lse) if return_lse else out


def to_heads(
    request: Request, layout: Layout, channel: Channel, q_order: Order, kv_order: Order
) -> tuple[Request, Exchanged, Order, Order]:
    """The request of this rank's heads, with the rows of all ranks along heads; how rows come back; and the
    order in which the groups of ranks along heads hold the sequence."""
    assert layout.heads is not None
    shape, ranks, mine = request.shape, layout.head_ranks, channel.group.rank
    q_heads = query_heads(shape.q_heads, ranks)
    kv_heads = key_heads(shape.q_heads, shape.kv_heads, ranks)
    lines = layout.lines(layout.heads)
    line = lines[line_of(layout)]
    own_q, own_kv = (x.of(line) for x in (q_order, kv_order))
    of_q, of_kv = Exchanged(channel, q_heads, own_q), Exchanged(channel, kv_heads, own_kv)
    q, k, v = ToHeads.apply([of_q, of_kv, of_kv], request.q, request.k, request.v)
    heads = slice(q_heads[mine][0], q_heads[mine][-1] + 1)
    similarity, sink, place = request.similarity, request.sink, request.place
    if isinstance(similarity, Cosine) and isinstance(similarity.temperature, Tensor):
        similarity = Cosine(similarity.temperature[heads])
    if sink is not None:
        sink = sink[heads]
    assert place is not None
    own = replace(
        request, q=q, k=k, v=v, similarity=similarity, sink=sink, place=place._replace(first_head=heads.start)
    )
    return own, of_q, q_order.together(lines), kv_order.together(lines)


def line_of(layout: Layout) -> int:
    """Which of the groups along heads this rank is in."""
    assert layout.heads is not None
    place = [at for dim, at in enumerate(coordinate(layout.mesh)) if dim != layout.heads]
    return place[0] if place else 0
