"""The hidden checks of the exercises that are plain functions: rungs 1, 3, 5, 7 and 8.

Each takes the reader's function and returns a sentence on what was right, or raises `Refused`, or `Unsolved`.
"""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilewise_reference import attention, yardstick

from .verdict import Refused, call, compare, pair

Exercise = Callable[..., Any]
FP32 = torch.float32


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    """Random numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_of(result: Tensor, want: Tensor) -> float:
    """How far PyTorch is off."""
    return yardstick.largest_difference(result, want)


# ---- 1: a mask


def check_mask(exercise: Exercise) -> str:
    drawn = randn(7, 11) > 0
    drawn[3] = False
    drawn[5], drawn[5, 10] = False, True
    cases = {
        "all keys": (1.0, torch.ones(7, 11, dtype=torch.bool)),
        "a row without a key": (1.0, drawn),
        "scores of a thousand": (60.0, drawn),
        "one key": (1.0, torch.tensor([[True], [False]])),
        "no key at all": (1.0, torch.ones(2, 0, dtype=torch.bool)),
    }
    for case, (size, mask) in cases.items():
        m, n = mask.shape
        q, k, v = size * randn(m, 16, seed=1), size * randn(n, 16, seed=2), randn(n, 5, seed=3)
        lifted = [x[None, None] for x in (q, k, v)]
        want = attention(*lifted, mask=mask)[0, 0]
        theirs = yardstick.pytorch_attention(*lifted, mask=mask)[0][0, 0]
        everything = attention(*lifted)[0, 0]
        unseen = mask.any(1, keepdim=True)
        compare(
            case, "O", call(case, exercise, q, k, v, mask), want, error_of(theirs, want), FP32,
            nan="a row is -inf throughout: its maximum is -inf too, and -inf - -inf is NaN",
            looks_like=[
                (everything, "the mask is ignored"),
                (
                    torch.where(unseen, want, v.double().mean(0)),
                    "a finite number stands for -inf: where all scores are the same, all keys weigh the same",
                ),
            ],
        )  # fmt: skip
    return f"right for {len(cases)} masks, also where a row sees no key"


# ---- 3: lse in one pass


def check_lse(exercise: Exercise) -> str:
    rng = random.Random(0)
    drawn = [rng.gauss(0, 3) for _ in range(200)]
    cases = {
        "200 scores": drawn,
        "growing scores": sorted(drawn),
        "falling scores": sorted(drawn, reverse=True),
        "scores beyond 10000": [10_000 + x for x in drawn],
        "scores below -10000": [x - 10_000 for x in drawn],
        "-inf first, and in between": [-math.inf, -math.inf, *drawn[:5], -math.inf, *drawn[5:9]],
        "one score": [3.0],
        "-inf and nothing else": [-math.inf] * 3,
        "no score": [],
    }
    when = {
        OverflowError: "exponentials are taken before the maximum is subtracted",
        ValueError: "something is read twice, or a logarithm is taken of 0: no score leaves row_sum = 0",
        TypeError: "something else is asked of the scores than to come one by one",
    }
    for case, scores in cases.items():
        got = call(case, exercise, iter(scores), when=when)
        top = max(scores, default=-math.inf)
        total = math.fsum(math.exp(s - top) for s in scores) if top > -math.inf else 0.0
        want = top + math.log(total) if total else -math.inf
        # Each score may round lse once or twice, also where no more than lse is kept.
        allowed = 2.0**-52 * 4 * len(scores) * (1 + abs(want)) if total else 0.0
        if not isinstance(got, float):
            raise Refused(f"{case}: lse must be a float, but is {got!r}")
        if not (got == want or abs(got - want) <= allowed):
            hint = ""
            if got != got:
                hint = "; this happens when -inf is subtracted from -inf: nothing was seen so far"
            raise Refused(f"{case}: expected {want!r}, got {got!r}{hint}")
    count = 20_000

    def many() -> Iterator[float]:
        yield from (math.sin(i) for i in range(count))

    tracemalloc.start()
    try:
        call(f"{count} scores", exercise, many())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8 * count:
        raise Refused(
            f"{count} scores: keeps {peak:,} bytes, as many as the scores themselves: two numbers are enough"
        )
    return f"right for {len(cases)} rows, and {count} scores need {peak:,} bytes"


# ---- 5: ranges of a prefix mask


def check_ranges(exercise: Exercise) -> str:
    tried = visited = 0
    for tile, n, prefix in itertools.product((4, 8), (1, 13, 16, 30), (0, 3, 8, 12, 50)):
        for first_row in range(0, n, 4):
            rows = min(4, n - first_row)
            case = f"exercise(first_row={first_row}, rows={rows}, n={n}, prefix={prefix}, tile={tile})"
            cut, full = pair(case, call(case, exercise, first_row, rows, n, prefix, tile), ("cut", "full"))
            visited += judge_ranges(case, [*cut], [*full], first_row, rows, n, prefix, tile)
            tried += 1
    return f"right for {tried} tiles of rows, which visit {visited} tiles of keys"


def judge_ranges(
    case: str, cut: list[int], full: list[int], first_row: int, rows: int, n: int, prefix: int, tile: int
) -> int:
    """Compare with the mask, pair by pair; how many tiles there are to visit."""
    pairs = {
        start: [
            (row, key, key < n and (key < prefix or key <= row))
            for row in range(first_row, first_row + rows)
            for key in range(start, start + tile)
        ]
        for start in range(0, n, tile)
    }
    wanted = [start for start, each in pairs.items() if any(sees for *_, sees in each)]
    for start in wanted:
        row, key, _ = next(each for each in pairs[start] if each[2])
        if start not in cut + full:
            raise Refused(f"{case}: the tile at {start} is skipped, but row {row} may see key {key}")
    for start in [*cut, *full]:
        if start not in pairs:
            raise Refused(f"{case}: the tile at {start} is visited, but tiles begin at {[*pairs]}")
    if len(cut + full) > len(set(cut + full)):
        raise Refused(f"{case}: {sorted(cut + full)}: a tile is visited twice, and its keys count twice")
    if len(cut + full) > len(wanted):
        extra = min({*cut, *full} - {*wanted})
        raise Refused(
            f"{case}: {len(cut + full)} tiles visited, {len(wanted)} expected: no row may see a key of the "
            f"tile at {extra}"
        )
    for start in full:
        for row, key, sees in pairs[start]:
            if not sees:
                why = f"there are {n} keys" if key >= n else f"row {row} may not see it"
                raise Refused(f"{case}: the tile at {start} is called full, but of its key {key}: {why}")
    for start in cut:
        if all(sees for *_, sees in pairs[start]):
            raise Refused(f"{case}: the tile at {start} is called cut, but every row sees every key of it")
    return len(wanted)


# ---- 7: delta with a gradient of lse


def check_delta(exercise: Exercise) -> str:
    half = torch.float16
    cases = {
        "no gradient of lse": (5, 16, 1.0, 0.0),
        "a gradient of lse": (5, 16, 1.0, 1.0),
        "one row, one column": (1, 1, 1.0, 1.0),
        "sums beyond fp16": (3, 512, 40.0, 1.0),
    }
    for case, (n, d, size, lse_size) in cases.items():
        out, do = randn(n, d, seed=1, dtype=half) * size, randn(n, d, seed=2, dtype=half) * size + size
        dlse = lse_size * randn(n, seed=3)
        got = call(case, exercise, out, do, dlse)
        summed = (do.double() * out.double()).sum(1)
        want = summed - dlse.double()
        theirs = (do.float() * out.float()).sum(1) - dlse
        compare(
            case, "delta", got, want, error_of(theirs, want), FP32,
            looks_like=[
                ((do * out).sum(1).double() - dlse, "products or sums are taken in fp16"),
                (summed, "dlse is left out: d lse / d S = P, so dS = P ∘ (dP - delta + dlse)"),
                (summed + dlse, "dlse has the other sign: dS = P ∘ (dP - delta + dlse)"),
            ],
        )  # fmt: skip
    return f"right for {len(cases)} cases, and dS = P ∘ (dP - delta) needs no other change"


# ---- 8: merge


def check_merge(exercise: Exercise) -> str:
    none = -math.inf
    cases = {
        "any two": ([0.3, -1.0, 2.0], [1.0, -1.0, -2.0]),
        "one side has seen no key": ([none, 0.5, none], [0.5, none, -40.0]),
        "neither side has": ([none, 1.0], [none, 1.0]),
        "lse of thousands": ([9000.0, -9000.0, 9000.0], [9001.0, -9001.0, -9000.0]),
    }
    for case, (first, second) in cases.items():
        lse_a, lse_b = torch.tensor(first), torch.tensor(second)
        out_a, out_b = randn(len(first), 6, seed=1), randn(len(first), 6, seed=2)
        out_a[lse_a == none], out_b[lse_b == none] = 0.0, 0.0
        result = call(case, exercise, out_a, lse_a, out_b, lse_b)
        out, lse = pair(case, result, ("out", "lse"))
        wants = joined(*(x.double() for x in (out_a, lse_a, out_b, lse_b)))
        theirs = joined(out_a, lse_a, out_b, lse_b)
        nan = "both lse are -inf, and -inf - -inf is NaN; or an exponential overflows before it is divided"
        average = (out_a + out_b).double() / 2
        compare(
            case, "lse", lse, wants[1], error_of(theirs[1], wants[1]), FP32, nan=nan,
            looks_like=[(lse_a.double() + lse_b, "the two lse are added, not their exponentials")],
        )  # fmt: skip
        compare(
            case, "out", out, wants[0], error_of(theirs[0], wants[0]), FP32, nan=nan,
            looks_like=[(average, "both weigh the same: the weights are exp(lse of one - lse of all)")],
        )  # fmt: skip
    return f"right for {len(cases)} pairs, also where one side or both have seen no key"


def joined(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of both sets of keys, by PyTorch, in the dtype of what is given."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == -math.inf, 0.0, lse)
    return out_a * (lse_a - base).exp()[:, None] + out_b * (lse_b - base).exp()[:, None], lse
