"""The hidden checks of the exercises that are kernels, which are counted too: rungs 2, 4, 6 and 9.

They run in Triton's interpreter and in the Gluon emulator, on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise_reference import attention, yardstick

from ..gluon_emulator import EmulationError, PriorityChange, RandomSchedule, Schedule, emulate
from .checks import FP32, Exercise, error_of, randn
from .counting import Counts, counted
from .verdict import Refused, call, compare, pair, run

FP16 = torch.float16


def count(case: str, exercise: Exercise, *args: Any, runs: Callable[..., Any] = call) -> tuple[Any, Counts]:
    """What the exercise returns, and what it does, which must be the work of a kernel."""
    found = []

    @functools.wraps(exercise)
    def counting(*given: Any) -> Any:
        with counted() as counts, np.errstate(all="ignore"):  # what is wrong shows in the result
            found.append(counts)
            return exercise(*given)

    result = runs(case, counting, *args)
    (counts,) = found
    if not counts.programs:
        raise Refused(f"{case}: no kernel ran: the exercise asks for one of your own, with @triton.jit")
    return result, counts


# ---- 2: softmax in place


def check_softmax(exercise: Exercise) -> str:
    none = torch.zeros(1, dtype=torch.bool)
    cases: dict[str, tuple[int, int, int, float, Tensor]] = {  # rows, columns, stride, size, rows of -inf
        "as long as a power of two": (3, 64, 64, 1.0, none),
        "rows of 100, 128 apart": (5, 100, 128, 1.0, none),
        "rows of 1": (4, 1, 1, 1.0, none),
        "a row of -inf": (3, 37, 40, 1.0, torch.tensor([False, True, False])),
        "scores of thousands": (3, 50, 50, 3000.0, none),
    }
    for case, (m, n, stride, size, gone) in cases.items():
        whole = randn(m, stride)
        s = whole[:, :n]
        s *= size
        if bool(gone.any()):
            s[gone] = -math.inf
        s[0, 0] = s[0].max() + size
        before, given = whole.clone(), s.double()
        _, counts = count(case, exercise, s, runs=run)
        changed = (whole[:, n:] != before[:, n:]).nonzero().tolist()
        if changed:
            raise Refused(
                f"{case}: what lies {changed[0][1] + 1} beyond the end of row {changed[0][0]} was changed; "
                "this happens when rows are taken to lie n apart, not s.stride(0), or a store has no mask"
            )
        want = torch.softmax(given, 1).nan_to_num(0.0)
        theirs = torch.softmax(given.float(), 1).nan_to_num(0.0)
        compare(
            case, "s", s, want, error_of(theirs, want), FP32,
            nan="a row's maximum is -inf, and -inf - -inf is NaN",
            looks_like=[(given, "s is left as it is: write the weights over the scores")],
        )  # fmt: skip
        expected = 4 * m * n
        for what, found in (("reads", counts.asked), ("writes", counts.written)):
            if found > expected:
                raise Refused(
                    f"{case}: {what} {found} bytes, {expected} expected: each of {m} · {n} numbers in "
                    "fp32 once"
                )
    return f"right for {len(cases)} matrices, and each number is read and written once"


# ---- 4: cross-attention in one loop


def check_cross_attention(exercise: Exercise) -> str:
    cases = {  # queries, keys, head_dim, width of values, mean of q, mean of k
        "100 queries, 130 keys": (100, 130, 64, 32, 0.0, 0.0),
        "one query, one key": (1, 1, 16, 16, 0.0, 0.0),
        "wide values": (17, 65, 16, 64, 0.0, 0.0),
        "all scores far below 0": (20, 70, 64, 16, 3.0, -3.0),
        "all scores far above 0": (20, 70, 64, 16, 6.0, 6.0),
    }
    for case, (m, n, d, e, q_mean, k_mean) in cases.items():
        q, k = q_mean + randn(m, d, seed=1), k_mean + randn(n, d, seed=2)
        q, k, v = q.to(FP16), k.to(FP16), randn(n, e, seed=3, dtype=FP16)
        result, counts = count(case, exercise, q, k, v)
        out, lse = pair(case, result, ("O", "lse"))
        lifted = [x[None, None] for x in (q, k, v)]
        want, want_lse = attention(*lifted, return_lse=True)
        theirs = yardstick.pytorch_attention(*lifted)[0]
        their_lse = yardstick.pytorch_attention(*(x.float() for x in lifted))[1]
        pads = "keys beyond the end count: their score is 0, so it must become -inf"
        padded = [padded_attention(q, k, v, tile) for tile in (16, 32, 64, 128)]
        compare(
            case, "O", out, want[0, 0], error_of(theirs, want), FP16,
            nan="a score overflows, or 0 is divided by 0",
            looks_like=[
                *((each, pads) for each, _ in padded),
                (unscaled(q, k, v), "the scale 1 / √D is left out"),
            ],
        )  # fmt: skip
        compare(
            case, "lse", lse, want_lse[0, 0], error_of(their_lse, want_lse), FP32,
            looks_like=[
                (want_lse[0, 0] / math.log(2), "the logarithm is in base 2, not the natural one"),
                *((each, pads) for _, each in padded),
            ],
        )  # fmt: skip
        expected = 2 * (m * d + n * d + n * e + m * e) + 4 * m
        if counts.memory > expected + 2 * m * n:
            raise Refused(
                f"{case}: memory gives and takes {counts.memory:,} bytes, {expected:,} expected: Q, K, V, O "
                f"and lse; this happens when the scores, [{m}, {n}], are stored"
            )
    return f"right for {len(cases)} cases, and no matrix of scores goes through memory"


def padded_attention(q: Tensor, k: Tensor, v: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """O and lse of a kernel with tiles of so many keys that does not look where they end."""
    pad = -len(k) % tile
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad))[None, None] for x in (k, v))
    out, lse = attention(q[None, None], k, v, return_lse=True)
    return out[0, 0], lse[0, 0]


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[None, None], k[None, None], v[None, None], scale=1.0)[0, 0]


# ---- 6: a scale of any sign


def check_scale(exercise: Exercise) -> str:
    cases = {"scale 0.125": 0.125, "scale -0.125": -0.125, "scale 0": 0.0, "scale -6": -6.0, "scale 6": 6.0}
    n, d = 100, 64
    q, k, v = (randn(n, d, seed=seed, dtype=FP16) for seed in range(3))
    lifted = [x[None, None] for x in (q, k, v)]
    for case, scale in cases.items():
        out, counts = count(case, exercise, q, k, v, scale)
        want = attention(*lifted, scale=scale)
        theirs = yardstick.pytorch_attention(*lifted, scale=scale)[0]
        hint = (
            "row_max is the largest product times the scale: with a scale below 0 that is the smallest score"
            if scale < 0
            else ""
        )
        compare(
            case, "O", out, want[0, 0], error_of(theirs, want), FP16, nan=hint,
            looks_like=[(attention(*lifted)[0, 0], "the scale is not the one that is given")],
        )  # fmt: skip
        # Exponentials beyond those of the pairs rescale, once for each row of each tile, and O with it.
        pairs = counts.matmul // (4 * d)
        rescaled = counts.exponentials - pairs
        rest = rescaled * (d + 2) + n * d
        if counts.multiplications > pairs + rest + 2 * rescaled + 2 * n * d:
            raise Refused(
                f"{case}: {(counts.multiplications - rest) // pairs} multiplications for each pair, 1 "
                "expected; this happens when the scale and log2 e are two factors, as with tl.exp"
            )
    return f"right for {len(cases)} scales, with one multiplication for each pair"


# ---- 9: a ring with two consumers

ROWS, COLUMNS = 16, 64


def check_ring(exercise: Exercise) -> str:
    if not isinstance(exercise, GluonJITFunction):
        with contextlib.suppress(Refused):
            call("exercise", exercise, None, None, None, 1, 1)
        raise Refused("exercise must be a kernel: put @gluon.jit before it")
    orders: list[tuple[str, Schedule]] = [("each role as long as it can", Schedule())]
    orders += [(f"a random order, seed {seed}", RandomSchedule(seed)) for seed in range(6)]
    orders += [(f"one role starved, seed {seed}", PriorityChange(seed, 3, 60)) for seed in range(6)]
    tried = 0
    for stages, steps in ((1, 3), (2, 1), (2, 5), (4, 9)):
        for order, schedule in orders:
            case = f"{steps} tiles, STAGES={stages}, {order}"
            counts = run_ring(case, exercise, stages, steps, schedule)
            expected = 2 * steps * ROWS * COLUMNS
            if counts.asked != expected:
                raise Refused(
                    f"{case}: {counts.asked} bytes were asked for, {expected} expected: each tile once"
                )
            if (
                stages > 1
                and steps > stages
                and type(schedule) is Schedule
                and counts.most_in_flight < stages
            ):
                raise Refused(
                    f"{case}: at most {counts.most_in_flight} copies were under way at once, {stages} "
                    "expected; this happens when the producer waits for a tile, not for a free buffer"
                )
            tried += 1
    return f"right in {tried} orders of the roles"


def run_ring(case: str, kernel: Any, stages: int, steps: int, schedule: Schedule) -> Counts:
    x = randn(steps * ROWS, COLUMNS, seed=steps, dtype=FP16)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    added, largest = (torch.full((ROWS, COLUMNS), math.nan) for _ in range(2))
    arguments = dict(
        x_tiles=TensorDescriptor.from_tensor(x, [ROWS, COLUMNS], layout), sum_ptr=added, max_ptr=largest,
        steps=steps, STAGES=stages, num_warps=4,
    )  # fmt: skip
    try:
        with counted() as counts:
            emulate(kernel, (1,), arguments, schedule)
    except EmulationError as error:
        raise Refused(f"{case}: the machine's rules are broken:\n{error}") from error
    except (TypeError, AttributeError, NotImplementedError, ValueError) as error:
        raise Refused(f"{case}: raised {type(error).__name__}: {error}") from error
    tiles = x.reshape(steps, ROWS, COLUMNS)
    want = tiles.double().sum(0)
    unwritten = "nothing was stored there"
    compare(case, "the sum", added, want, error_of(tiles.float().sum(0), want), FP32, nan=unwritten)
    compare(case, "the maximum", largest, tiles.double().amax(0), 0.0, FP32, nan=unwritten)
    return counts
