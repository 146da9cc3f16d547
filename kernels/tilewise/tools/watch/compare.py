"""What is compared on the page: similarities, masks, and rounding errors of one call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...kernels.tile import Tile
from ...parts.shape import Shape, ceil_div
from ...plan.passes import run_forward
from ...plan.request import Request
from ...pytorch.plain import oracle_arguments, run_torch
from ..explain.coverage import rows_of as bounds_of
from ..explain.coverage import tile_states
from .recording import (
    CUT,
    FULL,
    SKIPPED,
    Array,
    Arrays,
    Compare,
    Cost,
    Masked,
    Pass,
    Rounding,
    Similarity,
    Stage,
)
from .shown import Shown, identity_values, key_rows, query_rows
from .watched import watch_forward

EQUATIONS = {
    "dot": ("dot product", "S = Q Kᵀ"),
    "scaled_dot": ("scaled dot product", "S = Q Kᵀ / √d"),
    "cosine": ("cosine", "S = Q Kᵀ / (|Q| |K|)"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compare(
    request: Request, shown: Shown, tile: Tile, walk: Pass, arrays: Arrays, omitted: dict[str, str]
) -> Compare:
    """All comparisons of a call, each computed by the kernel itself. walk: of its forward. omitted: gets what
    cannot be compared, and why."""
    reason = why_not_rounding(request)
    if reason is not None:
        omitted["rounding"] = reason
    masks = [masked(" & ".join(map(repr, request.masks)) or "no mask", request, walk.grid, shown, arrays)]
    if request.masks:
        free = tile_states(bounds_of((), dense(shown)), dense(shown), tile.tile_q, tile.tile_kv)[0, 0]
        grid = ["".join((SKIPPED, CUT, FULL)[state] for state in row) for row in free.tolist()]
        masks.append(masked("no mask", replace(request, masks=()), grid, shown, arrays))
    return Compare(
        similarities(request, shown, arrays),
        masks,
        [] if reason else [rounding(request, name, shown, tile, arrays) for name in DTYPES],
        Cost(request.shape.q_heads, request.q.element_size()),
    )


def dense(shown: Shown) -> Shape:
    """What is shown, as a call of its own."""
    return Shape(1, 1, 1, *shown.lengths, shown.head_dim, shown.value_dim)


def weights(request: Request, shown: Shown) -> Array:
    """The weights of what is shown, [rows, keys], in fp32."""
    asked = replace(request, q=request.q.float(), k=request.k.float())
    out, _, _ = run_forward(replace(asked, v=identity_values(asked, shown)), False)
    return query_rows(out, shown)[:, : shown.kv_len].numpy()


def similarities(request: Request, shown: Shown, arrays: Arrays) -> list[Similarity]:
    found = []
    for similarity, (name, equation) in EQUATIONS.items():
        asked = replace(request, similarity=similarity, scale=None)
        found.append(Similarity(name, equation, arrays.add(weights(asked, shown))))
    return found


def masked(name: str, request: Request, grid: list[str], shown: Shown, arrays: Arrays) -> Masked:
    total = sum(map(len, grid))
    visited = total - sum(row.count(SKIPPED) for row in grid)
    return Masked(name, arrays.add(weights(request, shown)), grid, visited, total)


def why_not_rounding(request: Request) -> str | None:
    """Why float64 cannot stand beside the kernel; None if it can."""
    if request.dropout is not None:
        return f"dropout_p={request.dropout.p}: what is dropped is missing from partial results"
    try:
        oracle_arguments(request)
    except ValueError as error:
        return str(error)
    return None


def rounding(request: Request, name: str, shown: Shown, tile: Tile, arrays: Arrays) -> Rounding:
    """The kernel's partial results in a dtype, beside float64's of the same inputs over the same keys."""
    dtype = DTYPES[name]
    asked = replace(request, q=request.q.to(dtype), k=request.k.to(dtype), v=request.v.to(dtype))
    if asked.cache is not None:  # all keys by one program
        capacity = ceil_div(asked.shape.kv_len, tile.tile_kv) * tile.tile_kv
        asked = replace(asked, cache=asked.cache._replace(split_size=capacity))
    kept = Arrays(None)
    walk = watch_forward(asked, shown, tile, kept).passes[0]
    exact = replace(asked, q=asked.q.double(), k=asked.k.double(), impl="torch")
    out, _ = run_torch(replace(exact, v=identity_values(exact, shown)), False)
    weight = query_rows(out, shown)[:, : shown.kv_len].numpy()
    values = key_rows(asked.v, shown, asked).double().numpy()
    rows = shown.lengths[0]
    steps = max(sum(stage.kind == "step" for stage in program.stages) for program in walk.programs)
    error = np.full((steps, rows), np.nan)
    for program in walk.programs:
        first, stop = program.owns
        own = slice(first, stop)
        seen = np.zeros(shown.kv_len, bool)
        taken = [stage for stage in program.stages if stage.kind == "step"]
        for step, stage in enumerate(taken):
            assert stage.tile is not None
            seen[stage.tile[1] * tile.tile_kv : (stage.tile[1] + 1) * tile.tile_kv] = True
            row_sum, o = last_set(stage, "row_sum", kept), last_set(stage, "o", kept)
            total = (weight[own] * seen).sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                partial = (weight[own] * seen) @ values / total[:, None]
                mine = o[: stop - first].astype(np.float64) / row_sum[: stop - first, None]
            error[step, own] = np.where(total > 0, np.abs(mine - partial).max(1), np.nan)
    keys = [min((step + 1) * tile.tile_kv, shown.kv_len) for step in range(steps)]
    return Rounding(name, keys, arrays.add(error))


def last_set(stage: Stage, name: str, arrays: Arrays) -> Array:
    """What a variable of the kernel was at the end of a step."""
    return next(
        arrays[moment.sets[name]]
        for moment in reversed(stage.moments)
        if name in moment.sets and not moment.depth
    )
