"""Runs the kernels of a call while they are watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...kernels.tile import Tile
from ...plan import tiles
from ...plan.passes import run_backward, run_forward
from ...plan.request import Request
from .recording import Arrays, Pass
from .shown import Shown
from .story import COMBINE, DKV, DQ, FORWARD, SPLITS, Kernel, Teller, pass_of
from .telling import is_always_told
from .tracer import Tracer, watching

Tensor = torch.Tensor


@dataclass(frozen=True)
class Forward:
    passes: list[Pass]
    files: set[str]  # of the sources that ran
    out: Tensor
    lse: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class Backward:
    passes: list[Pass]
    files: set[str]
    grads: list[Tensor]  # of q, k and v


@contextlib.contextmanager
def watched(kernels: list[Kernel], tile: Tile) -> Iterator[Tracer]:
    """Watch these kernels, with this tile for all passes."""
    tracer = Tracer({(kernel.file, kernel.function) for kernel in kernels}, is_always_told)
    with tiles.use(tile), tiles.use_walks(2), watching(tracer):
        yield tracer


def watch_forward(request: Request, shown: Shown, tile: Tile, arrays: Arrays) -> Forward:
    """The forward of what is shown; where a cache's keys are split, the splits and their merge."""
    with watched([FORWARD, COMBINE], tile) as tracer:
        out, lse, statistics = run_forward(request, True, for_backward=True)
    assert lse is not None and statistics is not None  # both were asked for
    is_split = any(run.function == COMBINE.function for run in tracer.runs)
    kernels = [SPLITS, COMBINE] if is_split else [FORWARD]
    teller = Teller(arrays, shown)
    passes = [pass_of(kernel, tracer.runs, teller, (tile.tile_q, tile.tile_kv)) for kernel in kernels]
    return Forward(passes, teller.files, out, lse, statistics)


def watch_backward(
    request: Request, forward: Forward, do: Tensor, shown: Shown, tile: Tile, arrays: Arrays
) -> Backward:
    """The backward from the gradient `do` of the output."""
    needs = [True, True, True, *[False] * len(request.other_tensors)]
    with watched([DKV, DQ], tile) as tracer:
        grads = run_backward(request, forward.out, forward.statistics, do, None, needs)
    teller = Teller(arrays, shown)
    passes = [pass_of(kernel, tracer.runs, teller, (tile.tile_q, tile.tile_kv)) for kernel in (DKV, DQ)]
    return Backward(passes, teller.files, grads)
