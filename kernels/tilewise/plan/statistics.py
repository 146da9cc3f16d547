"""Forward and backward of a request with what it asks of the softmax beside the result: parts/stats.py.

max_logit and entropy come out of the forward's own walk, and of the backward's they are two numbers a row
more. The rest are walks of their own after the forward, which has left two numbers a row for them. The mass
of keys is one that there is already: Σ_i w_i P_ij is dV where V has one column and dO = w, so `dkv_kernel`
takes it. For its way back

    Σ_j dmass_j mass_j = Σ_i w_i Σ_j P_ij dmass_j = <w, attention(q, k, v = dmass)>

so the gradient of q, k and all that scores are made of is that of a call with dmass for its values and w for
its dO. Neither knows of dropout, for both are made of the weights before it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..kernels.backward import launch_dkv
from ..kernels.call import Call, RowStats
from ..kernels.combine import launch_combine
from ..kernels.forward import launch_forward
from ..kernels.prepare import prepare
from ..kernels.top_keys import launch_top_keys
from ..kernels.weights import launch_weights
from ..parts.stats import Statistics, Stats
from .bind import bind
from .passes import empty_in_order_of, forward_tile, multiprocessors, run_backward, run_forward, split_keys
from .request import Request
from .tiles import choose_tile

Tensor = torch.Tensor


class Kept(NamedTuple):
    """What the backward needs of the forward, beside its request."""

    out: Tensor
    rows: Tensor  # [2, batch, q_heads, q_len]: `launch_forward`
    entropy: Tensor | None
    largest: Tensor | None


def forward(request: Request, stats: Stats, for_backward: bool) -> tuple[Tensor, Tensor, Statistics, Kept]:
    """out, lse and statistics [blocks, q_heads, ...], by the portable kernels."""
    q, shape = request.q, request.shape
    sizes = q.shape[:3]
    out = empty_in_order_of(q, shape.value_dim, request.out_dtype)
    lse = q.new_empty(sizes, dtype=torch.float32)
    rows = q.new_empty((2, *sizes), dtype=torch.float32)

    def asked(splits: tuple[int, ...] = ()) -> RowStats:
        entropy, logit = (
            q.new_empty((*splits, *sizes), dtype=torch.float32) if wanted else None
            for wanted in (stats.entropy, stats.max_logit)
        )
        has_largest = stats.max_logit and for_backward
        largest = q.new_empty((*splits, *sizes), dtype=torch.int32) if has_largest else None
        return RowStats(entropy, logit, largest)

    call, tile, of_rows = bind(request), forward_tile(q, shape), asked()
    split = split_keys(shape, tile, multiprocessors(q.device))
    keeps = rows if for_backward or stats.walks_again else None
    if split is None:
        launch_forward(call, out, lse, keeps, tile, stats=of_rows)
    else:
        parts = q.new_empty((split.programs, *out.shape), dtype=torch.float32)
        parts_lse = q.new_empty((split.programs, *sizes), dtype=torch.float32)
        parts_rows = None if keeps is None else q.new_empty((2, *parts_lse.shape), dtype=torch.float32)
        of_parts = asked((split.programs,))
        launch_forward(call, parts, parts_lse, parts_rows, tile, split, of_parts)
        launch_combine(parts, parts_lse, out, lse, of_parts, of_rows)
        if parts_rows is not None:
            rows = rows_of_splits(parts_rows, call.unit)
    mass = key_mass(request, rows, weights_of_rows(stats, request)) if stats.has_mass else None
    weights = None if stats.rows is None else chosen_weights(call, request, rows, stats.rows)
    top_keys, top_weights = largest_keys(call, request, rows, stats.top_k) if stats.top_k else (None, None)
    found = Statistics(of_rows.max_logit, of_rows.entropy, mass, weights, top_keys, top_weights)
    return out, lse, found, Kept(out, rows, of_rows.entropy, of_rows.largest)


def rows_of_splits(parts: Tensor, unit: float | None) -> Tensor:
    """row_max and sum_log2 [2, ..] of all keys, from those of each split [2, splits, ..]."""
    row_max = parts[0].amax(0)
    base = row_max.where(row_max != -torch.inf, 0.0)
    shift = (parts[0] - base) * ((1.0 if unit is None else unit) / math.log(2))
    row_sum = torch.exp2(parts[1] + shift).sum(0)
    return torch.stack([row_max, torch.where(row_sum == 0, 1.0, row_sum).log2()])


def weights_of_rows(stats: Stats, request: Request) -> Tensor:
    """How much each query counts for the mass of keys, as a dO [blocks, q_heads, rows, 1] in fp32."""
    given = stats.key_mass
    if not isinstance(given, Tensor):
        given = request.q.new_ones((), dtype=torch.float32)
    return given.detach().to(torch.float32).expand(request.q.shape[:3])[..., None]


def of_one_column(request: Request, v: Tensor) -> Request:
    """The request with other values, of the weights before dropout."""
    return replace(request, v=v, dropout=None, impl="portable")


def key_mass(request: Request, rows: Tensor, counts: Tensor) -> Tensor:
    """Σ_i counts_i P_ij, [.., kv_heads, kv rows] in fp32: dV of values of one column, which are not read."""
    one, q = of_one_column(request, request.k[..., :1]), request.q
    shape, capacity = one.shape, request.shape.kv_len
    blocks = shape.batch if shape.cache is not None else shape.blocks
    # What a cache has not filled, nobody writes.
    mass = q.new_zeros((blocks, shape.kv_heads, capacity, 1), dtype=torch.float32)
    if 0 in shape.scores:
        return mass[..., 0]
    tile = choose_tile(q, shape, "dkv")
    nothing = counts.new_zeros(()).expand(counts.shape)  # for out: delta is not asked for
    backward = prepare(bind(one), nothing, rows, counts, None, tile.tile_q)
    launch_dkv(backward, mass, mass, tile, ("dv",))
    return mass[..., 0]


def chosen_weights(call: Call, request: Request, rows: Tensor, chosen: Tensor) -> Tensor:
    """[blocks, q_heads, chosen rows, kv rows] in fp32."""
    shape = call.shape
    sizes = (shape.blocks, shape.q_heads, len(chosen), shape.kv_len)
    weights = request.q.new_zeros(sizes, dtype=torch.float32)
    if 0 not in sizes:
        launch_weights(call, rows, chosen, weights, choose_tile(request.q, shape, "dq"))
    return weights


def largest_keys(call: Call, request: Request, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """int64 and fp32 [blocks, q_heads, rows, top_k]."""
    sizes = (*request.q.shape[:3], top_k)
    keys = request.q.new_empty(sizes, dtype=torch.int64)
    weights = request.q.new_empty(sizes, dtype=torch.float32)
    launch_top_keys(call, rows, keys, weights, choose_tile(request.q, call.shape, "dq"))
    return keys, weights


class Arrived(NamedTuple):
    """The gradients that came back, each None or as what it is of."""

    do: Tensor | None
    dlse: Tensor | None
    dmax: Tensor | None
    dentropy: Tensor | None
    dmass: Tensor | None


def backward(request: Request, stats: Stats, kept: Kept, arrived: Arrived, needs: list[bool]) -> list[Tensor]:
    """The gradients of those of (q, k, v, *other tensors) that `needs` names, in order."""
    do, dlse, dmax, dentropy, dmass = arrived
    others = any([x is not None for x in (do, dlse, dmax, dentropy)])
    dtype = torch.float32 if others and dmass is not None else None  # rounded once, when both are added
    found: list[list[Tensor | None]] = []
    if others or dmass is None:
        if do is None:
            do = kept.out.new_zeros(()).expand(kept.out.shape)
        entropy: tuple[Tensor, ...] = () if dentropy is None else (dentropy.contiguous(),)
        if dentropy is not None:
            assert kept.entropy is not None
            moved = dentropy * kept.entropy  # dH · H belongs to delta, as -dLSE does: statistics.py
            dlse = -moved if dlse is None else dlse - moved
        largest: tuple[Tensor, ...] = ()
        if dmax is not None:
            assert kept.largest is not None
            largest = dmax.contiguous(), kept.largest
        grads = iter(run_backward(request, kept.out, kept.rows, do, dlse, needs, dtype, (entropy, largest)))
        found.append([next(grads) if needed else None for needed in needs])
    if dmass is not None:
        found.append(mass_gradients(request, stats, dmass, needs, dtype))
    inputs = [*request.qkv().values(), *[x for _, x in request.other_tensors]]
    results = zip(zip(*found, strict=True), needs, inputs, strict=True)
    return [total(grads, like) for grads, needed, like in results if needed]


def total(grads: tuple[Tensor | None, ...], like: Tensor) -> Tensor:
    """The sum of those that there are, in the dtype of what they are the gradients of."""
    given = [x for x in grads if x is not None]
    if not given:
        return torch.zeros_like(like)
    return sum(given[1:], given[0]).to(like.dtype)


def mass_gradients(
    request: Request, stats: Stats, dmass: Tensor, needs: list[bool], dtype: torch.dtype | None
) -> list[Tensor | None]:
    """Through the mass of keys, in the order of `needs`; None where there is none."""
    one = of_one_column(request, dmass.to(torch.float32)[..., None])
    names = [name for name, _ in request.other_tensors]
    mine = [name != "dropout_seed" for name in names]
    asked = [needs[0], needs[1], False, *[n for n, is_mine in zip(needs[3:], mine, strict=True) if is_mine]]
    out = request.q.new_empty((*request.q.shape[:3], 1), dtype=torch.float32)
    _, _, rows = run_forward(one, return_lse=False, for_backward=True, out=out)
    assert rows is not None
    grads = iter(run_backward(one, out, rows, weights_of_rows(stats, request), None, asked, dtype))
    found: list[Any] = [next(grads) if asked[0] else None, next(grads) if asked[1] else None, None]
    rest = iter(asked[3:])
    for is_mine in mine:
        found.append(next(grads) if is_mine and next(rest) else None)
    return found
