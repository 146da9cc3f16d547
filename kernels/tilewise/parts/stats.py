"""What a caller asks of the softmax beside its result, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Tensor = torch.Tensor
MOST_KEYS = 32  # that top_k may ask for: a program keeps them in registers


@dataclass(frozen=True, eq=False)
class Stats:
    """What `attention(..., return_stats=Stats(...))` returns of its softmax, each in memory linear in length.

    max_logit:  the largest score of each row.
    entropy:    the entropy of each row's weights, in nats.
    key_mass:   the weight that each key receives: True, from all queries; or a bool or float tensor that
                broadcasts to [batch, q_heads, q_len], packed to [q_heads, tokens]: how much each query
                counts.
    rows:       int32 or int64 [rows]: the queries whose weights are wanted, one by one. Where there is no
                such query the weights are 0.
    top_k:      how many of each row's largest weights, with their keys; 0 to 32.

    Rows and keys of packed sequences are rows of the packed tensors. `Statistics` says what comes back.
    """

    max_logit: bool = False
    entropy: bool = False
    key_mass: bool | Tensor = False
    rows: Tensor | None = None
    top_k: int = 0

    @property
    def has_mass(self) -> bool:
        return self.key_mass is not False

    @property
    def walks_again(self) -> bool:
        """Whether anything is asked for that the forward's own walk does not give."""
        return self.has_mass or self.rows is not None or self.top_k > 0


class Statistics(NamedTuple):
    """What `Stats` asked for, in fp32 (fp64 where q is); None for the rest. All of the weights P = exp(s -
    lse) before dropout, of the scores s that the softmax sees: with scale, modifiers, bias and mask.

    max_logit:   [batch, q_heads, q_len], max_j s_j, in natural units; -inf for a row without keys. The sink
                 is no key. That of a head is `.amax((0, 2))`.
    entropy:     [batch, q_heads, q_len], -Σ_j P_j ln P_j; the sink's weight counts as one more. 0 for a row
                 without keys.
    key_mass:    [batch, kv_heads, kv_len], Σ P over the queries, times what each counts, of the heads that
                 share the key.
    weights:     [batch, q_heads, rows, kv_len], P of the rows that were chosen.
    top_keys:    int64 [batch, q_heads, q_len, top_k], largest weight first, of equal ones the smaller key
                 first; -1 where a row sees fewer keys.
    top_weights: [batch, q_heads, q_len, top_k], their P; 0 there.

    Packed: without batch, and tokens for lengths. With a cache kv_len is its capacity, of which what is not
    filled has 0. Gradients flow through max_logit (to the first of the largest keys), entropy and key_mass.
    """

    max_logit: Tensor | None = None
    entropy: Tensor | None = None
    key_mass: Tensor | None = None
    weights: Tensor | None = None
    top_keys: Tensor | None = None
    top_weights: Tensor | None = None


def of_packed(found: Statistics, is_cached: bool = False) -> Statistics:
    """The same without the first dimension, which for packed rows is 1; keys in a cache have it."""
    has_own = ("key_mass",) if is_cached else ()
    named = zip(found._fields, found, strict=True)
    return Statistics(*[x if x is None or name in has_own else x[0] for name, x in named])
