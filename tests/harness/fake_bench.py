"""Tuning without a GPU: a bench that gives each tile the time and the faults that a test wants."""

from __future__ import annotations

import triton

from tilewise.kernels.tile import HopperTile, Tile
from tilewise.plan import tiles, user_tiles
from tilewise.tools.tune import store
from tilewise.tools.tune.bench import Rejected, Verdict
from tilewise.tools.tune.candidates import candidates, distance
from tilewise.tools.tune.search import Search
from tilewise_reference import CASES, FEATURE_CASES, paper_grid

KEY = ("forward", "sm_90", 2, 128)
SHIPPED = Tile(128, 128, 8, 2)
HOPPER_KEY = ("hopper", "sm_90", 2, 128)
HOPPER_SHIPPED = tiles.table_tile("sm_90", 2, 128, "hopper")
WHERE = store.Where("NVIDIA H200", "sm_90", "580.1", "2.11.0", triton.__version__, user_tiles.kernels_hash())


def case_named(name):
    return next(case for case in (*CASES, *FEATURE_CASES, *paper_grid()) if case.name == name)


class FakeBench:
    """Times and faults by tile; `calls` is what was asked, in order."""

    cases = ("full", "causal")
    batch, portable = 4, 1.0

    def __init__(self, times, faults=None, spills=(), wrong_with_features=(), stop_after=None):
        self.times, self.faults, self.spills = times, faults or {}, spills
        self.wrong_with_features, self.stop_after = wrong_with_features, stop_after
        self.calls, self.ahead, self.now = [], [], 0.0

    def compile_ahead(self, tiles):
        self.ahead.append(list(tiles))

    def check(self, tile):
        if self.stop_after is not None and len(self.checked()) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(("check", tile))
        if tile in self.faults:
            raise self.faults[tile]
        return Verdict(0.5, registers=100, spills=4 if tile in self.spills else 0, shared_bytes=1024)

    def check_every_feature(self, tile):
        self.calls.append(("features", tile))
        if tile in self.wrong_with_features:
            raise Rejected("wrong: dbias")
        return Verdict(0.6)

    def time(self, case, tile, milliseconds):
        self.calls.append(("time", tile))
        self.now += 1.0
        return [self.times(tile) * (2.0 if case == "full" else 1.0)] * 3

    def time_portable(self, case, milliseconds):
        self.calls.append(("portable", case))
        return [self.portable * (2.0 if case == "full" else 3.0)] * 3

    def checked(self):
        return [tile for call, tile in self.calls if call == "check"]


POOL = candidates(*KEY)
FASTEST = Tile(128, 64, 8, 3)
HOPPER_FASTEST = HopperTile(128, 64, 8, 3, False, False)


def by_distance(tile):
    """The nearer to the fastest, the faster; 10 % a step."""
    return 1.1 ** distance(tile, HOPPER_FASTEST if isinstance(tile, HopperTile) else FASTEST)


def searched(bench, journal, pool=POOL, starts=(SHIPPED,), seconds=1e9):
    return Search(KEY, starts, pool, bench, journal, clock=lambda: bench.now).run(seconds)


def searched_hopper(bench, journal):
    pool = candidates(*HOPPER_KEY)
    return Search(HOPPER_KEY, (HOPPER_SHIPPED,), pool, bench, journal, clock=lambda: bench.now).run(1e9)
