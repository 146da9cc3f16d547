"""What is kept of a row of scores: the softmax state, a monoid.

The state of a query row is (row_max, row_sum, o): the largest score so far, the sum of exp(score - row_max),
and the values weighted by the same exponentials. `start` is its neutral element, `step` takes in one tile of
scores, `merge` joins the states of two disjoint sets of keys in any order, and `finish` divides.
The loop over keys, the sink and split walks are all built from these four.

A maximum is kept in the unit in which scores reach `step`: exp(score) = exp(s · unit). Plain dot products
keep the scale for that unit, which saves a multiplication; scores from modifiers are in natural units (unit
None), as are the maxima that `merge` and `finish` take. The hardware's exponential is that of base 2.

Method: Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E


@triton.jit
def anchor(row_max):
    """The number to subtract before exponentials: row_max, or 0 where no key was seen (never -inf - -inf)."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def softmax_start(TILE_Q: tl.constexpr):
    """The state of rows that have seen no key, but for o, which is 0."""
    return tl.full([TILE_Q], float("-inf"), tl.float32), tl.zeros([TILE_Q], tl.float32)


@triton.jit
def softmax_step(s, row_max, row_sum, unit):
    """Take in scores s [TILE_Q, TILE_KV]: the new maxima and sums, P, and the factor that is due to o."""
    new_max = tl.maximum(row_max, tl.max(s, 1))  # [TILE_Q]
    base = anchor(new_max)
    if unit is None:
        # Subtract first: a bias of finfo.min, the mask of many models, would overflow if it were scaled.
        p = tl.exp2((s - base[:, None]) * LOG2E)  # [TILE_Q, TILE_KV]
        rescale = tl.exp2((row_max - base) * LOG2E)  # [TILE_Q]
    else:
        # Scale first: multiplication and subtraction are one instruction.
        unit_log2 = unit * LOG2E
        base_log2 = base * unit_log2
        p = tl.exp2(s * unit_log2 - base_log2[:, None])
        rescale = tl.exp2(row_max * unit_log2 - base_log2)
    return new_max, row_sum * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def softmax_join(max_a, sum_a, max_b, sum_b):
    """The state of rows that have seen the keys of state a and those of state b: the maxima, in natural units
    all of them, the sums, and the factors that are due to the o of each."""
    row_max = tl.maximum(max_a, max_b)
    base = anchor(row_max)
    a = tl.exp2((max_a - base) * LOG2E)
    b = tl.exp2((max_b - base) * LOG2E)
    return row_max, sum_a * a + sum_b * b, a, b


@triton.jit
def softmax_merge(max_a, sum_a, o_a, max_b, sum_b, o_b):
    """The same with o, where that is one tile."""
    row_max, row_sum, a, b = softmax_join(max_a, sum_a, max_b, sum_b)
    return row_max, row_sum, o_a * a[:, None] + o_b * b[:, None]


@triton.jit
def softmax_end(row_max, row_sum):
    """1 / row_sum, by which o is multiplied for O, LSE = row_max + ln row_sum, and log2 row_sum, for the
    backward; rows that saw no key give 1, -inf and 0."""
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    sum_log2 = tl.log2(row_sum)  # [TILE_Q]
    # One division a row, and not one an element, each of which is eight instructions.
    return 1.0 / row_sum, row_max + sum_log2 * LN2, sum_log2


@triton.jit
def softmax_finish(row_max, row_sum, o):
    """The same with O = o / row_sum, where that is one tile, for the factor."""
    factor, lse, sum_log2 = softmax_end(row_max, row_sum)
    return o * factor[:, None], lse, sum_log2


@triton.jit
def softmax_probabilities(s, row_max, sum_log2, unit):
    """P again, in the backward, from scores s and what is known of each score's row, shaped to broadcast;
    row_max in the unit of s. LSE alone would do for scores of moderate size. But beside a score of ±10⁴ fp32
    keeps three digits of ln row_sum, and beside finfo.min (an additive mask over a whole row) none."""
    return tl.exp2(log2_probabilities(s, row_max, sum_log2, unit))


@triton.jit
def log2_probabilities(s, row_max, sum_log2, unit):
    """log₂ P."""
    base = anchor(row_max)
    if unit is None:
        return (s - base) * LOG2E - sum_log2
    else:
        unit_log2 = unit * LOG2E
        return (s * unit_log2 - base * unit_log2) - sum_log2
