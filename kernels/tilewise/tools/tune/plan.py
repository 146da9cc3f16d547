"""Which rows of the table does a run of `tilewise tune` look at, by which cases, and from where?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tilewise_reference import Case, paper_grid
from tilewise_reference.cases import find_case

from ...kernels.tile import HOPPER_PASSES, PASSES, HopperTile, Pass, Tile, hopper_backward_tile
from ...plan.request import make_request
from ...plan.rules import hopper as hopper_rules
from ...plan.tile_table import Key
from ...plan.tiles import has_tile, length_tile, row_dim, table_tile, tile_dim, user_table
from ..inputs import case_inputs, refuse_sequences
from .candidates import candidates, nearest_first

DEFAULT_LENGTH = 4096
FEWEST_QUERIES = 128
DTYPES = ("bfloat16", "float16", "float32")
NO_FP8 = "fp8 is not tuned yet: tilewise.tiles.use gives its calls another tile"
ORDER: tuple[Pass, ...] = (*PASSES, *HOPPER_PASSES)  # timed beside the portable ones, which are tuned by then


class Job(NamedTuple):
    """One row to search: the cases that decide it, the tiles to try first, all candidates."""

    key: Key
    cases: tuple[Case, ...]
    starts: tuple[Tile, ...]  # the shipped tile, then the one in use
    pool: tuple[Tile, ...]


def choose_cases(names: Sequence[str], dtype: str | None) -> list[Case]:
    """The cases of these names, or the default ones; with `dtype` in that.

    Raises ValueError for a name that nobody knows, and for a case that is too short to decide a row, packs
    sequences or has a cache.
    """
    if dtype is not None and dtype not in DTYPES:
        known = f"--dtype {dtype} must be one of {', '.join(DTYPES)}"
        raise ValueError(f"{known}; {NO_FP8}" if "8" in dtype else known)
    dtype_of_grid = dtype or "bfloat16"
    if not names:
        # Dimension 128 first: most models have it.
        chosen = [case for case in paper_grid(dtype=dtype_of_grid) if case.q_len == DEFAULT_LENGTH]
        chosen.sort(key=lambda case: (128, 64, 256).index(case.head_dim))
        return chosen
    cases = [find_case(name, dtype_of_grid) for name in dict.fromkeys(names)]
    for case in cases:
        refuse_sequences(case, "a row is decided by")
        if case.q_len < FEWEST_QUERIES:
            raise ValueError(
                f"--case {case.name}: it has {case.q_len} queries, and calls with so few get a part of a "
                f"row's tile; a row is decided by cases of at least {FEWEST_QUERIES}"
            )
    return [replace(case, dtype=dtype) if dtype else case for case in cases]


def passes_of(case: Case, asked: Sequence[Pass], arch: str) -> tuple[Pass, ...]:
    """The passes to tune with a case: those asked for, else what its model runs, Hopper's kernels too where
    these can answer. Raises ValueError where one is asked for and cannot."""
    against = {work: why_not_hopper(case, arch, work) for work in HOPPER_PASSES}
    for work, reason in against.items():
        if work in asked and reason:
            raise ValueError(f"--pass {work}, case {case.name}: {reason}")
    if asked:
        return tuple(asked)
    run: tuple[Pass, ...] = ("forward", "hopper") if case.phase != "training" else ORDER
    return tuple(work for work in run if not against.get(work))


def why_not_hopper(case: Case, arch: str, work: Pass) -> str:
    """Why Hopper's kernel of this pass cannot answer the case on this architecture; empty where it can."""
    if arch != "sm_90":
        return f"it needs a Hopper GPU (sm_90), and this one is {arch}"
    q, k, v, arguments, _ = case_inputs(case, "meta")
    reasons = hopper_rules.reasons if work == "hopper" else hopper_rules.backward_reasons
    return "; ".join(reasons(make_request(q, k, v, **arguments, impl="hopper")))


def dim_of(case: Case, work: Pass, arch: str) -> int:
    """The dimension that the case's row stands for."""
    dim = tile_dim(case.head_dim, case.value_dim, work)
    return row_dim(arch, case.torch_dtype.itemsize, dim, work)


def grouped(cases: Iterable[Case], asked: Sequence[Pass], arch: str) -> dict[Key, list[Case]]:
    """The rows that these cases decide, in the order in which they deserve the time."""
    rows: dict[Key, list[Case]] = {}
    for case in cases:
        for work in passes_of(case, asked, arch):
            key = work, arch, case.torch_dtype.itemsize, dim_of(case, work, arch)
            if has_tile(key[2], max(case.head_dim, case.value_dim), work):
                rows.setdefault(key, []).append(case)
    return dict(sorted(rows.items(), key=lambda row: ORDER.index(row[0][0])))


def gpu_jobs(cases: Iterable[Case], asked: Sequence[Pass], arch: str, device: torch.device) -> list[Job]:
    """The jobs on this GPU."""
    in_use, jobs = user_table(device).applied, []
    for key, group in grouped(cases, asked, arch).items():
        work, _, element_bytes, dim = key
        starts = [table_tile(arch, element_bytes, dim, work)]
        starts += [in_use[key].tile] if key in in_use else []
        longest = max(length_tile(case.q_len, 1 << 20) for case in group)
        found = [tile for tile in candidates(work, arch, element_bytes, dim) if tile.tile_q <= longest]
        pool = tuple(dict.fromkeys([*starts, *found]))
        jobs.append(Job(key, tuple(group), tuple(dict.fromkeys(starts)), pool))
    return jobs


SMOKE_LENGTH, SMOKE_CANDIDATES, SMOKE_ARCH = 48, 3, "sm_90"
_HOPPER = HopperTile(128, 16, 8, 2)
SMOKE_HOPPER: tuple[Tile, ...] = (
    _HOPPER,
    replace(_HOPPER, has_turns=False),
    replace(_HOPPER, is_q_in_registers=True),
)


def is_tiny(tile: Tile) -> bool:
    """Whether the interpreter has several steps to walk, and so something to get wrong, on a tiny problem."""
    return max(tile.tile_q, tile.tile_kv) <= 32 and (tile.num_warps, tile.num_stages) == (4, 2)


def smoke_jobs(cases: Sequence[Case], asked: Sequence[Pass]) -> list[Job]:
    """A few tiny jobs for the interpreter: one case of one head, three candidates a pass."""
    case = min(cases, key=lambda case: case.head_dim)
    features = case.features.copy()
    if "bias" in features:
        features["bias"] = 1, 1, *features["bias"][2:]
    tiny = replace(case, batch=1, q_heads=1, kv_heads=1, features=features)
    jobs = []
    for work in passes_of(case, asked, SMOKE_ARCH):
        size = tiny.torch_dtype.itemsize, dim_of(tiny, work, SMOKE_ARCH)
        pool = {"hopper": SMOKE_HOPPER, "hopper_backward": (hopper_backward_tile(size[1]),)}.get(work)
        if pool is None:
            start = Tile(32, 32)
            found = [tile for tile in candidates(work, SMOKE_ARCH, *size) if is_tiny(tile)]
            pool = (start, *nearest_first(found, start, start)[:SMOKE_CANDIDATES])
        jobs.append(Job((work, "interpreter", *size), (tiny,), (pool[0],), tuple(dict.fromkeys(pool))))
    return jobs
