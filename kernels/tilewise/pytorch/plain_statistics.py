"""What the softmax knows beside its result, in plain PyTorch: by the definition,
`tilewise_reference.statistics`.

A block of rows after the other, as plain.py has them, each computed again in the backward; so memory is
linear in length, and derivatives of all orders are PyTorch's. Packed sequences and those of a cache are
answered one after another: pieces.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from tilewise_reference import statistics as definition
from tilewise_reference.attention import forward

from ..parts.shape import computed_in
from ..parts.stats import Statistics, Stats
from ..plan.request import Request, is_autocast
from .dequantized import dequantized
from .pieces import check_extents, sequences
from .plain import Block, blocks, can_run_again, oracle_arguments, run_again

Tensor = torch.Tensor
pad = torch.nn.functional.pad


class Asked(NamedTuple):
    """`Stats` of a dense request, in the dtype of its scores."""

    stats: Stats
    counts: Tensor  # [batch, q_heads, q_len], what each query counts for the mass of keys
    rows: Tensor | None


def plain_statistics(request: Request, stats: Stats) -> Statistics:
    """[blocks, heads, ...], in fp32 or, where q is, fp64."""
    q = request.q
    given = stats.key_mass if isinstance(stats.key_mass, Tensor) else q.new_ones(())
    counts = given.detach().to(computed_in(q.dtype)).expand(q.shape[:3])
    asked = Asked(stats, counts, stats.rows)
    with torch.autocast(q.device.type, enabled=False) if is_autocast(q.device) else nullcontext():
        return of_dense(request, asked) if request.shape.is_dense else of_sequences(request, asked)


# ---- One dense request, a block of rows at a time


def of_dense(request: Request, asked: Asked, batch: int | None = None) -> Statistics:
    """batch: the number of the one packed sequence that the request is left of."""
    request = dequantized(request)
    stats, parts = asked.stats, list(blocks(request, batch))
    several = len(parts) > 1 or batch is not None
    differentiable = partial(of_block, asked)
    if several and can_run_again(request):
        differentiable = partial(run_again, compute=differentiable)
    found = Statistics()
    if stats.max_logit or stats.entropy or stats.has_mass:
        logit, entropy, mass = zip(*[differentiable(request, block) for block in parts], strict=True)
        if stats.max_logit:
            found = found._replace(max_logit=torch.cat(logit, 2))
        if stats.entropy:
            found = found._replace(entropy=torch.cat(entropy, 2))
        if stats.has_mass:
            kv_len = request.shape.kv_len
            spread = [pad(x, (b.kv_start, kv_len - b.kv_end)) for x, b in zip(mass, parts, strict=True)]
            found = found._replace(key_mass=sum(spread[1:], spread[0]))
    if asked.rows is not None or stats.top_k:
        with torch.no_grad():
            found = found._replace(**chosen(request, asked, parts))
    return found


def forward_of(request: Request, block: Block) -> Any:
    """All that a block of rows computes on its way, before dropout; values are left out."""
    q = request.q[:, :, block.q_start : block.q_end]
    k = request.k[:, :, block.kv_start : block.kv_end]
    arguments = oracle_arguments(request, block) | dict(dropout_p=0.0, dropout_keep=None)
    return forward(q, k, k[..., :0], **arguments, dtype=computed_in(q.dtype))


def of_block(asked: Asked, request: Request, block: Block) -> tuple[Tensor, ...]:
    """max_logit and entropy of its rows, and the mass that they give to its keys."""
    fwd = forward_of(request, block)
    counts = asked.counts[:, :, block.q_start : block.q_end]
    mass = definition.key_mass(fwd, counts, request.shape.kv_heads)
    return definition.max_logit(fwd), definition.entropy(fwd), mass


def chosen(request: Request, asked: Asked, parts: list[Block]) -> dict[str, Tensor]:
    """What has no gradient: the weights of chosen rows, and the largest ones of all rows."""
    shape, top_k, found = request.shape, asked.stats.top_k, dict[str, Tensor]()
    weights, keys, tops = None, [], []
    if asked.rows is not None:
        sizes = shape.batch, shape.q_heads, len(asked.rows), shape.kv_len
        weights = request.q.new_zeros(sizes, dtype=computed_in(request.q.dtype))
    for block in parts:
        fwd = forward_of(request, block)
        if weights is not None and asked.rows is not None:
            at = ((asked.rows >= block.q_start) & (asked.rows < block.q_end)).nonzero()[:, 0]
            weights[:, :, at, block.kv_start : block.kv_end] = fwd.p[
                :, :, asked.rows[at].long() - block.q_start
            ]
        if top_k:
            key, p = definition.top_keys(fwd.s, fwd.p, top_k)
            keys.append(torch.where(key < 0, key, key + block.kv_start))
            tops.append(p)
    if weights is not None:
        found["weights"] = weights
    if top_k:
        found |= dict(top_keys=torch.cat(keys, 2), top_weights=torch.cat(tops, 2))
    return found


# ---- Packed sequences, and those of a cache


def of_sequences(request: Request, asked: Asked) -> Statistics:
    packing, shape = request.packing, request.shape
    starts = [0] * (shape.batch + 1)
    q_starts = kv_starts = starts
    if packing is not None:
        q_starts, kv_starts = (offsets.tolist() for offsets in packing.offsets())
    if request.cache is not None:
        kv_starts = starts
    found = []
    for batch, one in enumerate(sequences(request)):
        q_len, kv_len = one.q.shape[2], one.k.shape[2]
        check_extents(request, q_len, kv_len, batch)
        first = q_starts[batch]
        counts = asked.counts[batch : batch + 1] if packing is None else asked.counts.narrow(2, first, q_len)
        rows = None if asked.rows is None else asked.rows - first
        of_one = of_dense(one, Asked(asked.stats, counts, rows), batch)
        keys = of_one.top_keys
        if keys is not None:
            of_one = of_one._replace(top_keys=torch.where(keys < 0, keys, keys + kv_starts[batch]))
        found.append(of_one)
    joined = {}
    for name, join in (("max_logit", -torch.inf), ("entropy", 0), ("top_keys", -1), ("top_weights", 0)):
        parts = [x for each in found if (x := getattr(each, name)) is not None]
        if parts:
            joined[name] = along_queries(request, parts, join, q_starts)
    for name in ("key_mass", "weights"):
        parts = [x for each in found if (x := getattr(each, name)) is not None]
        if parts:
            joined[name] = along_keys(request, parts, kv_starts)
    return Statistics(**joined) if found else of_nothing(request, asked)


def along_queries(request: Request, parts: list[Tensor], other: float, starts: list[int]) -> Tensor:
    """[blocks, q_heads, rows, ..]; other: of rows of no sequence."""
    if request.packing is None:
        return torch.cat(parts, 0)
    before, behind = starts[0], request.shape.q_len - starts[-1]
    like = parts[0]
    around = [like.new_full((*like.shape[:2], n, *like.shape[3:]), other) for n in (before, behind)]
    return torch.cat([around[0], *parts, around[1]], 2)


def along_keys(request: Request, parts: list[Tensor], starts: list[int]) -> Tensor:
    """[.., keys], 0 for keys of no sequence and for what a cache has not filled."""
    kv_rows = request.shape.kv_len
    if request.cache is None:
        return pad(torch.cat(parts, -1), (starts[0], kv_rows - starts[-1]))
    parts = [pad(x, (0, kv_rows - x.shape[-1])) for x in parts]
    is_of_rows = request.packing is not None and parts[0].dim() == 4  # each is of one sequence
    return sum(parts[1:], parts[0]) if is_of_rows else torch.cat(parts, 0)


def of_nothing(request: Request, asked: Asked) -> Statistics:
    """Of a batch of 0."""
    shape, stats = request.shape, asked.stats
    rows = request.q.new_zeros((0, shape.q_heads, shape.q_len), dtype=computed_in(request.q.dtype))
    mass = rows.new_zeros((0, shape.kv_heads, shape.kv_len)) if stats.has_mass else None
    weights = top_keys = top_weights = None
    if asked.rows is not None:
        weights = rows.new_zeros((0, shape.q_heads, len(asked.rows), shape.kv_len))
    if stats.top_k:
        top_weights = rows.new_zeros((*rows.shape, stats.top_k))
        top_keys = top_weights.long()
    logit, entropy = (rows if asked else None for asked in (stats.max_logit, stats.entropy))
    return Statistics(logit, entropy, mass, weights, top_keys, top_weights)
