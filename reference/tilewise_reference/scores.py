"""What a score is: the modifiers that act on s = scale * similarity(q, k) before the mask.

Each function returns ``score(s, batch, head, q_idx, kv_idx) -> s``. ``s`` is [B, Hq, Nq, Nk] and the index
tensors broadcast to it, as in ``masks``. Everything is differentiable by autograd, in ``s`` and in the
tables. ``align`` has the meaning it has in ``masks``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .positions import Align, lookup, shift

ScoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def softcap(cap: float) -> ScoreFn:
    """s -> cap * tanh(s / cap): scores stay inside (-cap, cap) (Gemma 2, arXiv 2408.00118).

    Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"{cap=} must be greater than 0; leave the score out for no cap")

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(s / cap)

    return score


def alibi(slopes: Tensor, q_len: int, kv_len: int, align: Align = "bottom_right") -> ScoreFn:
    """s -> s - slope * |distance|: attention with linear biases (Press et al. 2021, arXiv 2108.12409).

    slopes: [Hq] or [B, Hq].
    """
    offset = shift(q_len, kv_len, align)

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (kv_idx - (q_idx + offset)).abs()
        return s - lookup(slopes.to(s.dtype), batch, head) * distance

    return score


def relative_position(
    table: Tensor,
    q_len: int,
    kv_len: int,
    max_distance: int = 128,
    bidirectional: bool = True,
    align: Align = "bottom_right",
) -> ScoreFn:
    """s -> s + table[head, bucket(distance)]: the relative position bias of T5 (arXiv 1910.10683).

    table: [Hq, num_buckets]. ``t5_bucket`` gives the bucket of a distance.
    """
    offset = shift(q_len, kv_len, align)

    def score(s: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = kv_idx - (q_idx + offset)
        return s + table.to(s.dtype)[head, t5_bucket(distance, table.shape[1], max_distance, bidirectional)]

    return score


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
