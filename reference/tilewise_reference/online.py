"""The tiled algorithm of the kernel, in plain PyTorch on one head: read it beside ``forward.py``.

    S = scale · Q Kᵀ        P = exp(S - row_max)        O = P V / row_sum        lse = row_max + ln row_sum

never needs a whole row of S at once. Going over the keys tile by tile, keep for each query row

    row_max   the largest score so far
    row_sum   the sum of exp(score - row_max) so far
    o         the sum of exp(score - row_max) · value so far

and when a tile raises the maximum, multiply what was summed so far by ``rescale`` = exp(old max - new max).
Such states form a commutative monoid: ``start`` is its neutral element and ``merge`` its operation, so keys
may be taken in any order, split between workers, and joined by any tree.

A mask is one interval of keys a row: query i sees the keys lo[i] <= j < hi[i].

              keys ──►
    row 0     ████████████░░░░░░░░          ██ lo <= key < hi
    row 1     ░░████████████░░░░░░
    row 2     ░░░░████████████░░░░
              └cut┘└full ┘└cut┘└── skipped

A tile of queries visits first the key tiles in which every pair counts, without any masking work, then the
tiles that some interval cuts, and never the others.

Exponentials are in base 2, which is what the hardware computes: exp(x) = exp2(x · log2 e).

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv 1805.02867); the same with values, by tiles,
FlashAttention, Dao et al. 2022 (arXiv 2205.14135); one division at the end and queries in the outer loop,
FlashAttention-2, Dao 2023 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


class State(NamedTuple):
    """What is kept of the keys seen so far, for a tile of query rows."""

    row_max: Tensor  # [rows], -inf where no key was seen
    row_sum: Tensor  # [rows]
    o: Tensor  # [rows, value_dim]


def start(rows: int, value_dim: int, like: Tensor) -> State:
    """The state that has seen no key. dtype and device are those of ``like``."""
    return State(
        row_max=like.new_full((rows,), -math.inf),
        row_sum=like.new_zeros(rows),
        o=like.new_zeros(rows, value_dim),
    )


def step(state: State, s: Tensor, v: Tensor) -> State:
    """Take in one tile of keys: s [rows, keys], -inf where masked, and v [keys, value_dim]."""
    row_max = torch.maximum(state.row_max, s.amax(dim=1))  # [rows]
    base = _finite(row_max)
    p = torch.exp2((s - base[:, None]) * LOG2E)  # [rows, keys]
    rescale = torch.exp2((state.row_max - base) * LOG2E)  # [rows], 0 at the first key
    row_sum = state.row_sum * rescale + p.sum(dim=1)
    # O = P V
    o = state.o * rescale[:, None] + p @ v
    return State(row_max, row_sum, o)


def merge(a: State, b: State) -> State:
    """The state that has seen the keys of both, which must have none in common."""
    row_max = torch.maximum(a.row_max, b.row_max)
    base = _finite(row_max)
    rescale_a, rescale_b = (torch.exp2((state.row_max - base) * LOG2E) for state in (a, b))
    return State(
        row_max,
        a.row_sum * rescale_a + b.row_sum * rescale_b,
        a.o * rescale_a[:, None] + b.o * rescale_b[:, None],
    )


def finish(state: State) -> tuple[Tensor, Tensor]:
    """out [rows, value_dim] and the natural lse [rows]; 0 and -inf for a row that has seen no key."""
    row_sum = torch.where(state.row_sum == 0, 1.0, state.row_sum)
    lse = state.row_max + torch.log2(row_sum) / LOG2E
    return state.o / row_sum[:, None], lse


def _finite(row_max: Tensor) -> Tensor:
    """The number to subtract before exponentials: the maximum, or 0 where it is -inf, for -inf - -inf is NaN
    and exp2(-inf - 0) is the 0 that is wanted."""
    return torch.where(row_max == -math.inf, 0.0, row_max)


def sink_state(sink: float | Tensor, rows: int, value_dim: int, like: Tensor) -> State:
    """The sink is a key of score ``sink`` (a float or a 0-d tensor) whose value is 0."""
    score = torch.as_tensor(sink, dtype=like.dtype, device=like.device)
    return State(score.expand(rows), like.new_ones(rows), like.new_zeros(rows, value_dim))


def key_tiles(lo: Tensor, hi: Tensor, kv_len: int, tile_kv: int) -> tuple[range, list[int]]:
    """The first keys of the tiles that rows with intervals lo .. hi ([rows], ints) must visit: those in which
    every pair counts, and those that some interval cuts."""
    lo, hi = lo.clamp(min=0), hi.clamp(max=kv_len)
    sees = lo < hi
    if not bool(sees.any()):
        return range(0), []
    # From the smallest lo to the largest hi somebody sees something ...
    first = int(lo[sees].min()) // tile_kv
    last = -(-int(hi[sees].max()) // tile_kv)
    # ... and between the largest lo and the smallest hi every row sees every key. A row with no key leaves
    # nothing between them, for its own lo is not below its hi.
    full_first = -(-int(lo.max()) // tile_kv)
    full_last = int(hi.min()) // tile_kv
    full = range(full_first * tile_kv, full_last * tile_kv, tile_kv)
    return full, [t * tile_kv for t in range(first, last) if t * tile_kv not in full]


def attention_one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    scale: float | None = None,
    sink: float | Tensor | None = None,
    tile_q: int = 16,
    tile_kv: int = 16,
) -> tuple[Tensor, Tensor]:
    """Attention of one head by tiles: q [q_len, head_dim], k [kv_len, head_dim], v [kv_len, value_dim] of one
    floating dtype -> out [q_len, value_dim] and the natural lse [q_len] in that dtype.

    lo, hi: int tensors [q_len]; query i sees the keys lo[i] <= j < hi[i], none where hi[i] <= lo[i]. Bounds
    beyond 0 .. kv_len are cut to it. scale: 1/sqrt(head_dim) by default. sink: a logit that takes weight and
    adds no value. Lengths need not be multiples of the tile sizes, and may be 0. Raises ValueError for tile
    sizes below 1.
    """
    if tile_q < 1 or tile_kv < 1:
        raise ValueError(f"{tile_q=} and {tile_kv=} must be at least 1")
    q_len, kv_len, value_dim = q.shape[0], k.shape[0], v.shape[1]
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    out, lse = q.new_empty(q_len, value_dim), q.new_empty(q_len)

    for q_start in range(0, q_len, tile_q):
        rows = slice(q_start, min(q_start + tile_q, q_len))  # the last tile may be shorter
        q_tile, lo_tile, hi_tile = q[rows], lo[rows, None], hi[rows, None]
        full, cut = key_tiles(lo[rows], hi[rows], kv_len, tile_kv)
        state = start(len(q_tile), value_dim, like=q)

        for kv_start in full:
            keys = slice(kv_start, kv_start + tile_kv)
            # S = scale · Q Kᵀ
            s = scale * (q_tile @ k[keys].T)  # [rows, keys]
            state = step(state, s, v[keys])

        for kv_start in cut:
            keys = slice(kv_start, min(kv_start + tile_kv, kv_len))
            kv_idx = torch.arange(keys.start, keys.stop, device=q.device)
            keep = (lo_tile <= kv_idx) & (kv_idx < hi_tile)  # [rows, keys]
            s = (scale * (q_tile @ k[keys].T)).masked_fill(~keep, -math.inf)
            # A key that none of these rows sees has p = 0, but 0 · NaN would be NaN.
            v_tile = v[keys].masked_fill(~keep.any(dim=0)[:, None], 0)
            state = step(state, s, v_tile)

        if sink is not None:
            state = merge(state, sink_state(sink, len(q_tile), value_dim, like=q))
        out[rows], lse[rows] = finish(state)
    return out, lse
