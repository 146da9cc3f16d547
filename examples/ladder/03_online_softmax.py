"""3. The online softmax, on paper: one pass over scores that come one by one, in pure Python.

What changed   No kernel, but the idea that the next one stands on. A softmax needs the largest score
               first, so that no exponential overflows; so it reads a row three times: for the maximum,
               for the sum, for the weights. Online, it keeps a state for what it has seen so far, and
               mends it when a larger score comes: all that was summed is multiplied by exp(old maximum -
               new maximum).

                   row_max   the largest score
                   row_sum   Σ exp(score - row_max)
                   o         Σ exp(score - row_max) · value

Why            What is read once need not be stored. A row of scores can be made, used and forgotten tile
               by tile, and a matrix of them never exists.
What it saves  Two of three passes over the scores. It costs an exponential more for each score, to
               rescale; a kernel pays it once for each tile and row.
Source         "Online normalizer calculation for softmax" (Milakov and Gimelshein 2018, arXiv
               1805.02867).
The real one   kernels/tilewise/parts/softmax.py.
Exercise       lse = ln Σ exp(score) in one pass, of scores that can be read only once and in any order.
               Some, or all, may be -inf; without any score it is -inf.
               python -m tilewise.ladder check 3
"""

import math
from collections.abc import Iterable, Iterator


class Row(list[float]):
    """Numbers that count how often they are read."""

    reads = 0

    def __iter__(self) -> Iterator[float]:
        for x in super().__iter__():
            self.reads += 1
            yield x


def textbook(scores: Iterable[float], values: Iterable[float]) -> float:
    """The average of the values with the weights softmax(scores): three passes."""
    row_max = max(scores)
    row_sum = sum(math.exp(s - row_max) for s in scores)
    weights = [math.exp(s - row_max) / row_sum for s in scores]
    return sum(p * v for p, v in zip(weights, values, strict=True))


def online(scores: Iterable[float], values: Iterable[float], prints: bool = False) -> float:
    """The same in one pass."""
    row_max, row_sum, o = -math.inf, 0.0, 0.0
    for s, v in zip(scores, values, strict=True):
        new_max = max(row_max, s)
        rescale = math.exp(row_max - new_max)  # 1 where the maximum stays, 0 at the first score
        p = math.exp(s - new_max)
        row_max, row_sum, o = new_max, row_sum * rescale + p, o * rescale + p * v
        if prints:
            print(
                f"{s:8.1f}{v:8.1f}{row_max:10.1f}{rescale:10.4f}{row_sum:10.4f}{o:10.4f}{o / row_sum:12.4f}"
            )
    return o / row_sum


def exercise(scores: Iterator[float]) -> float:
    """lse = ln Σ exp(score) of scores that can be read once."""
    raise NotImplementedError


def main() -> tuple[int, int]:
    """Watch one row, then count passes over a longer one."""
    print((__doc__ or "").partition("\n")[0])
    print("   score   value   row_max   rescale   row_sum         o   o / row_sum")
    scores, values = Row([1.0, 3.0, 2.0, 1000.0, 999.0]), [1.0, 2.0, 3.0, 4.0, 5.0]
    assert math.isclose(online(scores, values, prints=True), textbook(scores, values), rel_tol=1e-12)

    scores = Row(100 * math.sin(7.0 * i) for i in range(1000))
    values = [math.cos(3.0 * i) for i in range(1000)]
    want, passes = textbook(scores, values), scores.reads
    scores.reads = 0
    assert abs(online(scores, values) - want) < 1e-12
    assert (passes, scores.reads) == (3 * 1000, 1000)
    print(f"scores read for a row of 1000: {passes} by the textbook, {scores.reads} online\n")
    return passes, scores.reads


if __name__ == "__main__":
    main()
