"""DTensors: a call that is cut over a mesh of devices, each of which answers its own part.

A rank's part has some of the sequences and some of the query heads, with the keys and values that these
attend to. Masks, scores and dropout are asked about the part with the numbers that sequences and heads have
in the whole call, so all ranks together give what one device would. Gradients of what several ranks have are
sums over these ranks.

How a call is cut: plan/shards.py. Why one may not be: plan/rules/sharding.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from ..parts.dtensors import dim_of, from_part, is_dtensor, whole_of
from ..parts.place import Place
from ..parts.plug import Plug
from ..parts.rotary import RotaryTable
from ..parts.scores.bias import Bias
from ..parts.scores.own_bias import OwnBias
from ..parts.shape import Cache, Packing, computed_in
from ..parts.similarity import Cosine
from ..plan.request import Request
from ..plan.shards import BATCH, HEADS, Range, Shards, asks_where, chunk, heads_taken, shards_of  # fmt: skip
from .append import append, lengths_after

Tensor = torch.Tensor
ROWS = {BATCH: 0, HEADS: 1}  # the dimensions of q, k and v along axes of the call
Answer = Callable[[Request, bool], tuple[Tensor, Tensor | None]]
Turn = Callable[[Request, RotaryTable], Request]


def answer_on_mesh(request: Request, return_lse: bool, answer: Answer) -> tuple[Any, Any]:
    """out and lse, as DTensors, of a request that has been checked. answer: how a rank answers its part."""
    shards = shards_of(request.q, request.k, request.v)
    return joined(shards, request, *answered(part_of(request, shards), answer, return_lse))


def attend_on_mesh(
    request: Request, new_k: Any, new_v: Any, rotary: RotaryTable | None, return_lse: bool, turn: Turn,
    answer: Answer,
) -> tuple[Any, Any]:  # fmt: skip
    """The same of a cache, once new_k and new_v are in its shards; all has been checked."""
    shards = shards_of(request.q, request.k, request.v)
    table = None if rotary is None else RotaryTable(*[whole_of(x) for x in rotary])
    if new_k is not None:
        request = write(request, new_k, new_v, table)
    part = part_of(request, shards)
    if table is not None and is_some(part):
        part = turn(part, table)
    return joined(shards, request, *answered(part, answer, return_lse))


def write(request: Request, new_k: Any, new_v: Any, rotary: RotaryTable | None) -> Request:
    """New keys and values in the shards of the cache, placed as these are; the request after that."""
    q: Any = request.q
    k: Any = request.k
    v: Any = request.v
    mesh, placements = k.device_mesh, k.placements
    coordinate = mesh.get_coordinate()
    cuts = [(mesh.size(d), coordinate[d]) for d, p in enumerate(placements) if dim_of(p) == BATCH]
    rows = rows_of(request, chunk(request.shape.batch, cuts))
    own_q, own_k, own_v = (x.to_local() for x in (q, k, v))
    new = [x.redistribute(placements=placements).to_local() for x in (new_k, new_v)]
    append(replace(rows, q=own_q, k=own_k, v=own_v), new[0], new[1], rotary)
    everybody = rows_of(request, (0, request.shape.batch))
    assert everybody.cache is not None
    lens = lengths_after(everybody, new_k)
    return replace(everybody, cache=everybody.cache._replace(kv_lens=lens))


# ---- A rank's part


def part_of(request: Request, shards: Shards) -> Request:
    """What this rank answers, in plain tensors."""
    q, k, v = request.q, request.k, request.v
    q_heads, kv_heads = q.shape[1], k.shape[1]
    batch = shards.range(BATCH, request.shape.batch)
    heads = shards.range(HEADS, q_heads)
    first = shards.range(HEADS, kv_heads, shards.kept)[0]
    taken = heads_taken(heads, q_heads // kv_heads, first)
    is_paged = request.cache is not None and request.cache.pages is not None
    kv_dims = {HEADS: 1} if is_paged else ROWS  # any page may hold rows of any sequence
    similarity, dropout = request.similarity, request.dropout

    def by_head(x: Any) -> Any:
        """[q_heads], of which the part has its own."""
        if is_dtensor(x):
            return placed(x, shards, {HEADS: 0})
        return x[slice(*heads)] if isinstance(x, Tensor) else x

    if isinstance(similarity, Cosine):
        similarity = Cosine(by_head(similarity.temperature))
    return replace(
        rows_of(request, batch),
        q=placed(q, shards, ROWS),
        k=with_heads(placed(k, shards, kv_dims, shards.kv_axes), taken),
        v=with_heads(placed(v, shards, kv_dims, shards.kv_axes), taken),
        masks=tuple([with_tensors(mask, shards) for mask in request.masks]),
        scores=tuple([own_score(score, shards, batch[0], heads[0]) for score in request.scores]),
        scale=everywhere(request.scale, shards),
        similarity=similarity,
        sink=by_head(request.sink),
        dropout=None if dropout is None else dropout._replace(seed=whole_of(dropout.seed)),
        place=place_of(request, batch, heads),
    )


def place_of(request: Request, batch: Range, heads: Range) -> Place | None:
    """Where these sequences and heads are in the whole call; None where nothing asks for it."""
    shape = request.shape
    if not asks_where(request) or (batch, heads) == ((0, shape.batch), (0, shape.q_heads)):
        return None
    return Place(*shape[:5], first_batch=batch[0], first_head=heads[0])


def rows_of(request: Request, batch: Range) -> Request:
    """The request with the offsets, lengths and pages of these sequences, in plain tensors."""
    packing, cache = request.packing, request.cache
    if packing is not None:
        packing = Packing(*[whole_of(x) for x in packing])
    if cache is not None:
        pages, each = cache.pages, slice(*batch)
        pages = None if pages is None else pages._replace(table=whole_of(pages.table)[each])
        cache = Cache(whole_of(cache.kv_lens)[each], pages, cache.split_size)
    return replace(request, packing=packing, cache=cache)


def placed(
    x: Any, shards: Shards, dims: dict[int, int], axes: tuple[int | None, ...] | None = None
) -> Tensor:
    """This rank's part of a DTensor whose dimensions `dims` lie along axes of the call; all of it along those
    that it has not. What several ranks of a call that is cut there have, has the sum of their gradients."""
    axes = shards.axes if axes is None else axes
    placements: list[Any] = [Replicate() if axis not in dims else Shard(dims[axis]) for axis in axes]
    grads = [
        Partial() if kept.is_replicate() and axis is not None else kept
        for kept, axis in zip(placements, shards.axes, strict=True)
    ]
    found: Tensor = x.redistribute(placements=placements).to_local(grad_placements=grads)
    return found


def with_heads(x: Tensor, taken: list[int]) -> Tensor:
    """[batch, heads, ...] with these heads alone: a view where they lie side by side."""
    if taken == list(range(x.shape[1])):
        return x
    first = taken[0] if taken else 0
    if taken == list(range(first, first + len(taken))):
        return x.narrow(1, first, len(taken))
    return x.index_select(1, torch.tensor(taken, device=x.device))


def everywhere(x: Any, shards: Shards) -> Any:
    """What each rank needs all of."""
    return placed(x, shards, {}) if is_dtensor(x) else x


def own_score(score: Any, shards: Shards, first_batch: int, first_head: int) -> Any:
    """A score as this rank's part, which begins at these numbers, reads it; of a bias its own part."""
    if type(score) is not Bias or not is_dtensor(score.bias):
        return with_tensors(score, shards)
    sizes = score.bias.shape
    of_axes = {BATCH: len(sizes) - 4, HEADS: len(sizes) - 3}
    dims = {axis: dim for axis, dim in of_axes.items() if dim >= 0 and sizes[dim] > 1}
    return OwnBias(placed(score.bias, shards, dims), first_batch, first_head)


def with_tensors(part: Any, shards: Shards) -> Any:
    """A mask or a score with tensors that each rank has whole."""
    if not any([is_dtensor(x) for x in part.tensors().values()]):
        return part
    made = object.__new__(type(part))
    for name in part.FIELDS:
        setattr(made, name, within(getattr(part, name), shards))
    if hasattr(part, "_twin"):
        made._twin = part._twin
    return made


def within(value: Any, shards: Shards) -> Any:
    if isinstance(value, tuple):
        return tuple([within(each, shards) for each in value])
    if isinstance(value, Plug):  # of a mask that is made of masks
        return with_tensors(value, shards)
    return everywhere(value, shards)


# ---- The results


def answered(part: Request, answer: Answer, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out and lse of a part, which may have no sequence or no head."""
    if is_some(part):
        return answer(part, return_lse)
    # Its gradients are 0 and not missing: other ranks wait for them.
    given = [part.q, part.k, part.v, *[x for _, x in part.other_tensors if x.is_floating_point()]]
    zero = sum([x.flatten()[:0].sum() for x in given])
    out = part.q.new_zeros(*part.q.shape[:3], part.v.shape[3]) + zero
    return out, out.sum(3).to(computed_in(part.q.dtype)) if return_lse else None


def is_some(part: Request) -> bool:
    return 0 not in part.q.shape[:2]


def joined(shards: Shards, request: Request, out: Tensor, lse: Tensor | None) -> tuple[Any, Any]:
    """What the ranks have, as DTensors."""
    placements = [Replicate() if axis is None else Shard(axis) for axis in shards.axes]
    sizes = tuple(request.q.shape[:3])
    whole_out = from_part(out, shards.mesh, placements, (*sizes, request.v.shape[3]))
    return whole_out, None if lse is None else from_part(lse, shards.mesh, placements, sizes)
