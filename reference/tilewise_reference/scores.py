"""What a score is: the modifiers that act on s = scale * similarity(q, k) before the mask.

Each function returns a ``Score``, called as ``score(s, batch, head, q_idx, kv_idx) -> s``. ``s`` is
[B, Hq, Nq, Nk] and the index tensors broadcast to it, as in ``masks``. Everything is differentiable by
autograd, in ``s`` and in the tables; the derivatives by formula, which ``gradients`` uses, stand beside each
rule. ``align`` has the meaning it has in ``masks``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import Align, at, expand, lookup, shift

ScoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
ParameterFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor that a modifier reads, and its gradient.

    gradient(ds, s, batch, head, q_idx, kv_idx) -> a tensor of the shape of ``tensor``: ds [B, Hq, Nq, Nk] is
    the gradient of the modifier's result, s its input.
    """

    tensor: Tensor
    gradient: ParameterFn


@dataclass(frozen=True, eq=False)
class Score:
    """A modifier with its derivatives beside it.

    function(s, batch, head, q_idx, kv_idx) -> s. derivative: the same arguments -> d function / d s at s,
    each score by itself. parameters: the tensors that the function reads.
    """

    function: ScoreFn
    derivative: ScoreFn
    parameters: tuple[Parameter, ...] = ()

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

    return Score(score, derivative)


def alibi(slopes: Tensor, q_len: int, kv_len: int, align: Align | None = "bottom_right") -> Score:
    """s -> s - slope * |distance|: attention with linear biases (Press et al. 2021, arXiv 2108.12409).

    slopes: [Hq] or [B, Hq].
    """
    offset = shift(q_len, kv_len, align)

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (kv_idx - (q_idx + at(offset, batch))).abs()
        return s - lookup(slopes.to(s.dtype), batch, head) * distance

    # dslope = -Σ_ij ds_ij · |distance_ij|
    def gradient(ds: Tensor, s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (kv_idx - (q_idx + at(offset, batch))).abs()
        return -(ds * distance).sum(dim=(2, 3)).sum_to_size(slopes.shape)

    return Score(score, _one, (Parameter(slopes, gradient),))


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

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = kv_idx - (q_idx + at(offset, batch))
        return s + table.to(s.dtype)[head, t5_bucket(distance, table.shape[1], max_distance, bidirectional)]

    # dtable[h, n] = Σ ds_bhij over the batch and the pairs whose bucket is n
    def gradient(ds: Tensor, s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        bucket = t5_bucket(kv_idx - (q_idx + at(offset, batch)), table.shape[1], max_distance, bidirectional)
        zero = ds.new_zeros(table.shape)
        summed = ds.sum_to_size(bucket.shape[0], *ds.shape[1:])  # sequences that share their buckets
        return zero.index_put((head, bucket), summed, accumulate=True)

    return Score(score, _one, (Parameter(table, gradient),))


def additive_bias(bias: Tensor) -> Score:
    """s -> s + bias. bias: broadcastable to [B, Hq, Nq, Nk]."""

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return s + expand("bias", bias.to(s.dtype), tuple(s.shape))

    # dbias = Σ ds over the dimensions along which the bias was repeated
    def gradient(ds: Tensor, s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ds.sum_to_size(bias.shape)

    return Score(score, _one, (Parameter(bias, gradient),))


def _one(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The derivative of whatever adds to s."""
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
