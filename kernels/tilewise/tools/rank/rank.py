"""Which tiles does the static model find best? They are what a short time on a GPU is spent on.

Tiles near the shipped one are compiled ahead of time. What spills, or multiplies with the instructions of
older chips, is out; the rest is ranked by `call_model`, for the papers' grid at 4096, full and causal, by the
geometric mean of both times. No GPU has confirmed the order: it says what to try first.

    python -m tilewise.tools.rank --out bench/candidates.json      # the five best of each row, a row a line
    python -m tilewise.tools.rank --shipped bench/model.json       # what the model says of the shipped tiles
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import triton

from tilewise_reference import Case, paper_grid

from ...kernels.tile import CopiedTile, Pass, Tile, describe
from ...plan import tiles
from ...plan.user_tiles import kernels_hash
from ..chips import chip_of_target
from ..compiled.compiler import MATMUL, Compiled, Variant, compile_variants
from ..compiled.variants import MASKS, backward_variant, forward_variant, hopper_variant, one_walk_variant
from ..tune.candidates import candidates, distance, nearest_first
from ..tune.journal import tile_of
from .call_model import TileModel, call_seconds, model_of

_began = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - _began:5.0f} s  {text}", flush=True)


SOURCE = "tilewise.tools.rank.rank:variants"
ARCH, DTYPE, ELEMENT_BYTES, LENGTH = "sm_90", "bf16", 2, 4096
CHIP = chip_of_target(ARCH)
WORKS: tuple[Pass, ...] = ("forward", "hopper", "dkv", "dq", "dqkv")
SHIPPED_DIMS, RANKED_DIMS = (64, 128, 256), (128, 64)
# Rows for which tiles are searched for, those that most calls use first; of one walk where a call may take it
# by default, with deterministic=False.
RANKED: tuple[tuple[Pass, int], ...] = (
    *((work, dim) for dim in RANKED_DIMS for work in ("forward", "hopper", "dkv", "dq")),
    ("dqkv", 64),
)
NEAREST, BEST = 26, 5  # tiles compiled of a row, and kept
SAME = 1.02  # times that differ by less are the same to the model, whose errors are larger


@dataclass(frozen=True)
class Ranked:
    """A tile that can be used, and what the model says."""

    compiled: Compiled
    model: TileModel
    seconds: dict[str, float]  # of the grid's call at 4096, by mask

    @property
    def mean(self) -> float:
        return geometric_mean(self.seconds.values())


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))


# ---- Compiling


def variants(work: Pass, dim: int, mask: str, numbers: Sequence[Sequence[Any]]) -> list[Variant]:
    """What the child process compiles: a plain call with each of these tiles, named by its place."""
    found = []
    for place, each in enumerate(numbers):
        plain = plain_variant(work, dim, mask)
        tile = tile_of(work, each)

        def launch(plain: Variant = plain, tile: Tile = tile) -> None:
            with tiles.use(tile, (work,)):
                plain.launch()

        found.append(Variant(str(place), launch, plain.kernels))
    return found


def plain_variant(work: Pass, dim: int, mask: str) -> Variant:
    """The pass alone, of a plain call."""
    if work == "forward":
        return forward_variant(DTYPE, dim, mask)
    if work == "dqkv":
        return one_walk_variant(DTYPE, dim, mask)
    return (
        hopper_variant(DTYPE, dim, mask) if work == "hopper" else backward_variant(DTYPE, dim, mask, (work,))
    )


def compile_tiles(work: Pass, dim: int, mask: str, chosen: Sequence[Tile]) -> dict[Tile, Compiled | str]:
    """Each tile's kernel, or why it does not compile."""
    found: dict[Tile, Compiled | str] = {}
    arguments = dict(work=work, dim=dim, mask=mask, numbers=[astuple(tile) for tile in chosen])

    def failed(place: str, error: str) -> None:
        found[chosen[int(place)]] = error.splitlines()[0]

    done = compile_variants(SOURCE, [ARCH], arguments, on_failure=failed)[ARCH]
    return found | {chosen[int(compiled.variant)]: compiled for compiled in done}


def why_not(compiled: Compiled | str) -> str:
    """Why a tile is out; empty where it is not."""
    if isinstance(compiled, str):
        return compiled
    if compiled.spill_bytes or any(loop.spills for loop in compiled.loops):
        return f"spills {compiled.spill_bytes} bytes"
    others = sorted({name for name in compiled.matmuls if not name.startswith(MATMUL[ARCH])})
    if others or not compiled.matmuls:
        return f"multiplies with {', '.join(others)}" if others else "multiplies without tensor cores"
    return ""


# ---- Ranking


def case_of(dim: int, mask: str, length: int = LENGTH) -> Case:
    """The papers' grid's call."""
    grid = paper_grid((dim,), (length,), "bfloat16")
    return next(case for case in grid if ("causal" in case.features) == (mask == "causal"))


def ranked(work: Pass, dim: int, tile: Tile, compiled: Compiled) -> Ranked:
    """By the kernel of a causal call, which has both loops; the full loop of a full call is the same."""
    model = model_of(compiled, work, dim, tile, CHIP)
    return Ranked(compiled, model, {mask: call_seconds(model, case_of(dim, mask), CHIP) for mask in MASKS})


def near(work: Pass, dim: int) -> list[Tile]:
    """The tiles to look at, the shipped one first."""
    shipped = tiles.table_tile(ARCH, ELEMENT_BYTES, dim, work)
    found = nearest_first(candidates(work, ARCH, ELEMENT_BYTES, dim), shipped, shipped)
    if work == "hopper":
        return found
    ways = 2 if any(isinstance(tile, CopiedTile) for tile in found) else 1  # that threads and the engine load
    return found[: ways * NEAREST + 1]


def best(work: Pass, dim: int) -> list[dict[str, Any]]:
    """The five best tiles of a row that are not the shipped one, as rows of the file."""
    chosen = near(work, dim)
    shipped, usable = chosen[0], []
    for tile, compiled in compile_tiles(work, dim, "causal", chosen).items():
        reason = why_not(compiled)
        if not reason and not isinstance(compiled, str):
            try:
                usable.append(ranked(work, dim, tile, compiled))
            except ValueError as error:
                reason = str(error)
        if reason:
            say(f"  {describe(tile)}: {reason}")
    base = next((each for each in usable if each.model.tile == shipped), None)
    if base is None:
        raise ValueError(f"{work} {dim}: the shipped tile, {describe(shipped)}, is out itself")
    usable.sort(key=lambda each: each.mean)
    for each in usable:
        say(
            f"  {each.mean / base.mean:.3f}  {describe(each.model.tile)}, {each.compiled.registers} registers"
        )
    usable.remove(base)
    right: set[Tile] = set()  # in a full call too
    while not {each.model.tile for each in choose(usable, shipped)} <= right:
        asked = [each.model.tile for each in choose(usable, shipped) if each.model.tile not in right]
        reasons = {tile: why_not(full) for tile, full in compile_tiles(work, dim, "full", asked).items()}
        for tile in filter(reasons.get, asked):
            say(f"  {describe(tile)}, full: {reasons[tile]}")
        right |= {tile for tile in asked if not reasons[tile]}
        usable = [each for each in usable if not reasons.get(each.model.tile)]
    if len(usable) < BEST:
        raise ValueError(f"{work} {dim}: only {len(usable)} tiles are left of {len(chosen)}")
    return [row_of(each, base) for each in choose(usable, shipped)]


def choose(usable: Sequence[Ranked], shipped: Tile) -> list[Ranked]:
    """The best, in order. Where the last places go to tiles that are the same to the model, the nearest to
    the shipped one have them, first one of each shape that is not there yet: what differs most tells most,
    and one change at a time."""
    in_order = sorted(usable, key=lambda each: each.mean)
    if len(in_order) <= BEST:
        return in_order
    last = in_order[BEST - 1].mean
    clear = [each for each in in_order if each.mean < last / SAME]
    same = [each for each in in_order if last / SAME <= each.mean <= last * SAME]
    same.sort(key=lambda each: (distance(each.model.tile, shipped), each.mean))
    seen = {shape(each) for each in clear}
    new: list[Ranked] = []
    known: list[Ranked] = []
    for each in same:
        (known if shape(each) in seen else new).append(each)
        seen.add(shape(each))
    return sorted([*clear, *[*new, *known][: BEST - len(clear)]], key=lambda each: each.mean)


def shape(each: Ranked) -> tuple[int, int, int]:
    return each.model.tile.tile_q, each.model.tile.tile_kv, each.model.tile.num_warps


def row_of(each: Ranked, base: Ranked) -> dict[str, Any]:
    """A row of the file: the tile as in the table of tiles, and the model's figures."""
    return {
        **head(each.model),
        "model": {
            "over_shipped": rounded(each.mean / base.mean),
            "milliseconds": {mask: rounded(1e3 * seconds) for mask, seconds in each.seconds.items()},
            "apart": rounded(each.model.full.none),
            "together": rounded(each.model.full.full),
            "expected": rounded(each.model.full.expected),
            "limit": each.model.limit,
            "programs": each.model.programs,
            "registers": each.compiled.registers,
            "shared_bytes": each.compiled.shared_bytes,
        },
        **versions(),
    }


def head(model: TileModel) -> dict[str, Any]:
    row = {"pass": model.work, "arch": ARCH, "element_bytes": ELEMENT_BYTES, "dim": model.dim}
    return row | asdict(model.tile)


def versions() -> dict[str, str]:
    return {"triton": triton.__version__, "kernels": kernels_hash()}


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


# ---- The shipped tiles


def shipped_row(work: Pass, dim: int, mask: str) -> dict[str, Any]:
    """What the model says of the shipped tile of a row, compiled for a call with this mask."""
    tile = tiles.table_tile(ARCH, ELEMENT_BYTES, dim, work)
    compiled = compile_tiles(work, dim, mask, [tile])[tile]
    if isinstance(compiled, str):
        raise ValueError(f"{work} {dim} {mask}: {compiled}")
    model = model_of(compiled, work, dim, tile, CHIP)
    steps = {
        name: {k: rounded(v) for k, v in asdict(getattr(model, name)).items()} for name in ("full", "cut")
    }
    return {
        **head(model), "mask": mask, "programs": model.programs, "start": rounded(model.start), **steps,
        "limit": model.limit, "registers": compiled.role_registers.get("consumer", compiled.registers),
        "spill_bytes": compiled.spill_bytes, **versions(),
    }  # fmt: skip


# ---- The files


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows
