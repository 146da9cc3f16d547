"""What a score is: the modifiers that act on s = scale * similarity(q, k) before the mask.

Each function returns a ``Score``, called as ``score(s, batch, head, q_idx, kv_idx) -> s``. ``s`` is
[B, Hq, Nq, Nk] and the index tensors broadcast to it, as in ``masks``. Everything is differentiable by
autograd, in ``s`` and in the tables; the derivatives by formula, which ``gradients``, ``tangent`` and
``second`` use, stand beside each rule. ``align`` has the meaning it has in ``masks``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import Align, at, expand, lookup, shift

ScoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
AtPairs = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Pair = tuple[int | str, int | str]


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor that a modifier reads, one element a pair, and the derivative by that element.

    read(x, batch, head, q_idx, kv_idx) -> the element of x, of the shape of ``tensor``, that each pair reads,
    broadcastable to [B, Hq, Nq, Nk]. total: the way back, from a number a pair to the sum of those of each
    element, in the shape of ``tensor``. derivative(s, batch, head, q_idx, kv_idx) -> d function / d element,
    s being the modifier's input.
    """

    tensor: Tensor
    read: AtPairs
    total: AtPairs
    derivative: ScoreFn


@dataclass(frozen=True, eq=False)
class Score:
    """A modifier with its derivatives beside it.

    function(s, batch, head, q_idx, kv_idx) -> s. derivative: the same arguments -> d function / d s at s,
    each score by itself. parameters: the tensors that the function reads.

    second_derivatives: {("s", "s"): d² function / ds², ("s", i): d² function / ds d parameters[i],
    (i, j): d² function / d parameters[i] d parameters[j], i <= j}, functions of the same arguments; a pair
    that is left out is 0. None: not given, and ``second`` refuses the score.
    """

    function: ScoreFn
    derivative: ScoreFn
    parameters: tuple[Parameter, ...] = ()
    second_derivatives: Mapping[Pair, ScoreFn] | None = None

    def __call__(self, s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.function(s, batch, head, q_idx, kv_idx)


def softcap(cap: float) -> Score:
    """s -> cap * tanh(s / cap): scores stay inside (-cap, cap) (Gemma 2, arXiv 2408.00118).

    Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"{cap=} must be greater than 0; leave the score out for no cap")

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(s / cap)

    # d tanh x / dx = 1 - tanh² x = 1 / cosh² x: the second form does not cancel near the cap.
    def derivative(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.cosh(s / cap) ** -2

    def second(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (-2 / cap) * torch.tanh(s / cap) * torch.cosh(s / cap) ** -2

    return Score(score, derivative, second_derivatives={("s", "s"): second})


def alibi(slopes: Tensor, q_len: int, kv_len: int, align: Align | None = "bottom_right") -> Score:
    """s -> s - slope * |distance|: attention with linear biases (Press et al. 2021, arXiv 2108.12409).

    slopes: [Hq] or [B, Hq].
    """
    offset = shift(q_len, kv_len, align)

    def read(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return lookup(x, batch, head)

    def total(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return x.sum(dim=(2, 3)).sum_to_size(slopes.shape)

    # dslope = Σ_ij ds_ij · -|distance_ij|
    def by_slope(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return -(kv_idx - (q_idx + at(offset, batch))).abs().to(s.dtype)

    def score(s: Tensor, *index: Tensor) -> Tensor:
        return s + read(slopes.to(s.dtype), *index) * by_slope(s, *index)

    return Score(score, _one, (Parameter(slopes, read, total, by_slope),), {})


def relative_position(
    table: Tensor,
    q_len: int,
    kv_len: int,
    max_distance: int = 128,
    bidirectional: bool = True,
    align: Align | None = "bottom_right",
) -> Score:
    """s -> s + table[head, bucket(distance)]: the relative position bias of T5 (arXiv 1910.10683).

    table: [Hq, num_buckets]. ``t5_bucket`` gives the bucket of a distance.
    """
    offset = shift(q_len, kv_len, align)

    def bucket(batch: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return t5_bucket(kv_idx - (q_idx + at(offset, batch)), table.shape[1], max_distance, bidirectional)

    def read(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return x[head, bucket(batch, q_idx, kv_idx)]

    # dtable[h, n] = Σ ds_bhij over the batch and the pairs whose bucket is n
    def total(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        of_pair = bucket(batch, q_idx, kv_idx)
        summed = x.sum_to_size(of_pair.shape[0], *x.shape[1:])  # sequences that share their buckets
        return x.new_zeros(table.shape).index_put((head, of_pair), summed, accumulate=True)

    return _added(table, read, total)


def additive_bias(bias: Tensor) -> Score:
    """s -> s + bias. bias: broadcastable to [B, Hq, Nq, Nk]."""

    def read(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return expand("bias", x, (batch.shape[0], head.shape[1], q_idx.shape[2], kv_idx.shape[3]))

    # dbias = Σ ds over the dimensions along which the bias was repeated
    def total(x: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return x.sum_to_size(bias.shape)

    return _added(bias, read, total)


def _added(tensor: Tensor, read: AtPairs, total: AtPairs) -> Score:
    """s -> s + the element of the tensor that the pair reads: both derivatives are 1."""

    def score(s: Tensor, *index: Tensor) -> Tensor:
        return s + read(tensor.to(s.dtype), *index)

    return Score(score, _one, (Parameter(tensor, read, total, _one),), {})


def _one(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The derivative by s of whatever adds to s, and by what is added."""
    return torch.ones_like(s)


def t5_bucket(
    relative: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """The bucket of each relative position: one a bucket when near, logarithmically wider ones farther off.

    relative: int tensor of any shape, key position minus query position. Returns int64 of the same shape.

    Bidirectional: the upper half of the buckets is for keys after the query. Else keys after the query share
    bucket 0 with the query's own position. Of the n buckets of a side the first e = n // 2 hold the distances
    0 .. e-1, one each; the others hold

        e + floor((n - e) * log(distance / e) / log(max_distance / e)),    at most n - 1.

    That floor is taken in whole numbers: bucket e + b starts at the smallest distance for which
    distance^(n-e) * e^b >= max_distance^b * e^(n-e), so that no rounding of a logarithm can move a distance
    to the neighbouring bucket.

    Raises ValueError for too few buckets or a max_distance within the exact ones.
    """
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    if exact < 1:
        raise ValueError(f"{num_buckets=} must be at least {4 if bidirectional else 2} ({bidirectional=})")
    if max_distance <= exact:
        raise ValueError(f"{max_distance=} must be greater than {exact}, the distances with a bucket each")

    wide = buckets - exact
    starts = list(range(1, exact + 1))  # buckets 1 .. exact start at the distance of their own number
    distance = exact
    for b in range(1, wide):
        while distance**wide * exact**b < max_distance**b * exact**wide:
            distance += 1
        starts.append(distance)

    far = relative.abs() if bidirectional else (-relative).clamp_min(0)
    bucket = torch.bucketize(far, torch.tensor(starts, device=relative.device), right=True)
    return bucket + torch.where(relative > 0, buckets, 0) if bidirectional else bucket
