"""What the softmax of a row knows besides its sum: the entropy of its weights, and its largest score.

Beside (row_max, row_sum, o) of softmax.py a walk may keep two numbers more of each row. One is a second sum
over the same exponentials, the `moment`, in base 2:

    moment    = Σ exp(s - row_max) · log₂ exp(s - row_max)
    H         = ln row_sum - ln 2 · moment / row_sum                 = lse - E[s]

No term of it is positive, and row_sum is at least 1. So nothing cancels however large scores are, where of
lse - E[s] no digit might be left. A sink is one more key: its weight has a part in H. Rows without a key
have H = 0. The other is `largest`, the first key that has the largest score of the row, for the gradient of
max_logit = row_max, which is that of keys alone: a sink is none.

On the way back a row hands in dH and dmax, and both join dS:

    dH/ds_j   = -P_j · (ln P_j + H)
    dS        = P · (dP - delta) - dH · P · ln P + dmax · [j = largest]         delta = .. + dH · H

with ln P = s - lse from the same differences as P itself. dH · H is one number a row and stands in delta.
"""

import triton
import triton.language as tl

from .addressing import load_rows
from .numerics import LN2, LOG2E
from .softmax import anchor, log2_probabilities

NO_KEY = tl.constexpr(2**31 - 1)  # the largest of a row that sees none


@triton.jit
def moment_moved(moment, row_sum, shift_log2):
    """The moment that goes with row_sum once row_max is larger by -shift_log2: Σ p' log₂ p' with p' = p ·
    2^shift. Where nothing is left of the sum, or it had no key (shift -inf), 0."""
    rescale = tl.exp2(shift_log2)
    return tl.where(rescale > 0.0, rescale * (moment + shift_log2 * row_sum), 0.0)


@triton.jit
def moment_step(moment, s, row_max, row_sum, new_max, unit):
    """Take in scores s [TILE_Q, TILE_KV], beside `softmax_step`: row_max and row_sum are of before it,
    new_max is what it made of row_max."""
    base = anchor(new_max)
    if unit is None:
        log2_p = (s - base[:, None]) * LOG2E  # [TILE_Q, TILE_KV]
        shift_log2 = (row_max - base) * LOG2E  # [TILE_Q]
    else:
        unit_log2 = unit * LOG2E
        log2_p = s * unit_log2 - (base * unit_log2)[:, None]
        shift_log2 = row_max * unit_log2 - base * unit_log2
    p = tl.exp2(log2_p)
    # 0 · -inf is NaN.
    return moment_moved(moment, row_sum, shift_log2) + tl.sum(tl.where(p > 0.0, p * log2_p, 0.0), 1)


@triton.jit
def moment_join(moment_a, max_a, sum_a, moment_b, max_b, sum_b, row_max):
    """That of two states, beside `softmax_join`, which gave row_max; maxima in natural units."""
    base = anchor(row_max)
    a = moment_moved(moment_a, sum_a, (max_a - base) * LOG2E)
    return a + moment_moved(moment_b, sum_b, (max_b - base) * LOG2E)


@triton.jit
def moment_end(moment, row_sum):
    """H of each row, in nats."""
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    return (tl.log2(row_sum) - moment / row_sum) * LN2


@triton.jit
def largest_step(largest, s, kv_idx, row_max, new_max):
    """The first key with the largest score of those seen so far, [TILE_Q], once s [TILE_Q, TILE_KV] of the
    keys kv_idx has been taken in; row_max as for `moment_step`. Tiles come in any order."""
    is_largest = (s == new_max[:, None]) & (s > float("-inf"))
    first = tl.min(tl.where(is_largest, kv_idx[None, :], NO_KEY), 1)
    return tl.where(new_max > row_max, first, tl.minimum(largest, first))


# ---- Both, as they are asked for: stats = (entropy, max_logit, largest), each () or (pointer,); or ()
#
# `known` of a tile of rows is (moment,), (largest,), (moment, largest) or ().


@triton.jit
def statistics_start(stats, TILE_Q: tl.constexpr):
    """Of rows that have seen no key."""
    known = ()
    if len(stats) > 0:
        if len(stats[0]) > 0:
            known = known + (tl.zeros([TILE_Q], tl.float32),)  # type: ignore[assignment]
        if len(stats[2]) > 0:
            known = known + (tl.full([TILE_Q], NO_KEY, tl.int32),)  # type: ignore[assignment]
    return known


@triton.jit
def statistics_step(known, stats, s, kv_idx, before, new_max, unit):
    """Take in scores s [TILE_Q, TILE_KV] of the keys kv_idx, which `softmax_step` has taken in: before is
    (row_max, row_sum) of before it, new_max what it made of row_max."""
    found = ()
    if len(stats) > 0:
        if len(stats[0]) > 0:
            found = found + (moment_step(known[0], s, before[0], before[1], new_max, unit),)  # type: ignore[assignment]
        if len(stats[2]) > 0:
            found = found + (largest_step(known[len(known) - 1], s, kv_idx, before[0], new_max),)  # type: ignore[assignment]
    return found


@triton.jit
def statistics_join(known, stats, before, sink, row_max):
    """Take in a sink, (its logit, 1), which `softmax_join` has taken in and which is no key."""
    found = ()
    if len(stats) > 0:
        if len(stats[0]) > 0:
            alone = sink[1] * 0.0  # the moment of one weight
            found = found + (moment_join(known[0], before[0], before[1], alone, sink[0], sink[1], row_max),)  # type: ignore[assignment]
        if len(stats[2]) > 0:
            found = found + (known[len(known) - 1],)  # type: ignore[assignment]
    return found


@triton.jit
def store_statistics(stats, known, max_score, row_sum, unit, rows, valid, split):
    """Write what is asked for of the rows that are valid; of a split of the keys, to its own arrays."""
    if len(stats) > 0:
        if len(split) > 0:
            rows += tl.program_id(1).to(tl.int64) * split[2]
        if len(stats[0]) > 0:
            tl.store(stats[0][0] + rows, moment_end(known[0], row_sum), mask=valid)
        if len(stats[1]) > 0:
            if unit is not None:
                max_score *= unit
            tl.store(stats[1][0] + rows, max_score, mask=valid)
        if len(stats[2]) > 0:
            tl.store(stats[2][0] + rows, known[len(known) - 1], mask=valid)


# ---- Back: two optional numbers a row more, as (dentropy,) or () and (dmax, largest) or ()


@triton.jit
def load_row_gradients(of_rows, first, rows, row_mask):
    """Those of rows of a sequence that begins at `first` in arrays of a number a row; 0 outside row_mask
    (None: all count)."""
    entropy, logit = of_rows
    x, y = (), ()
    for i in tl.static_range(len(entropy)):
        x = x + (load_rows(entropy[i] + first, rows, row_mask),)  # type: ignore[assignment]
    for i in tl.static_range(len(logit)):
        y = y + (load_rows(logit[i] + first, rows, row_mask),)  # type: ignore[assignment]
    return x, y


@triton.jit
def add_statistics(ds, p, s, kv_idx, row_max, sum_log2, unit, of_rows, IS_TRANSPOSED: tl.constexpr):
    """dS with what entropy and max_logit add to it. Everything has the shape of a tile [TILE_Q, TILE_KV] or
    broadcasts to it, or, IS_TRANSPOSED, to its transpose; of_rows: what `load_row_gradients` gave."""
    entropy, logit = of_rows
    if len(entropy) > 0:
        # ln P, 0 where P is: 0 · -inf is NaN.
        log2_p = log2_probabilities(s, row_max, sum_log2, unit)
        log_p = tl.where(p > 0.0, log2_p * LN2, 0.0)
        ds -= along_rows(entropy[0], IS_TRANSPOSED) * (p * log_p)
    if len(logit) > 0:
        is_largest = kv_idx == along_rows(logit[1], IS_TRANSPOSED)
        ds += tl.where(is_largest, along_rows(logit[0], IS_TRANSPOSED), 0.0)
    return ds


@triton.jit
def along_rows(x, IS_TRANSPOSED: tl.constexpr):
    """A number a row, for a tile of scores or its transpose."""
    if IS_TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]
