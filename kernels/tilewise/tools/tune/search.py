"""Which tile of many is the fastest? A search from the shipped one outwards, then longer and longer timing.

1  near ones first: every candidate is compiled, checked and timed briefly; the order follows the best so
   far, until all are tried or the time is up
2  the best few are timed again, for longer, in turns with the shipped tile, so that a drift of the clocks
   meets all alike; of these the best few once more
3  the fastest replaces the shipped tile if it is faster by more than the noise, and right with every
   feature too
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from statistics import geometric_mean
from typing import Any, NamedTuple, Protocol

from ...kernels.tile import HOPPER_PASSES, Tile
from ...plan.tile_table import Key
from .bench import DeviceLost, Rejected, Verdict, median
from .candidates import nearest_first
from .journal import Journal, Subject, tile_of

NOISE = 0.02  # a gain that is smaller is none


class Round(NamedTuple):
    """So many turns of timing each candidate for so many milliseconds a case; the best few go on."""

    turns: int
    milliseconds: int
    keep: int


ROUNDS = (Round(1, 30, 8), Round(2, 100, 3), Round(5, 100, 1))
EXPLORING = 0.75  # of a row's time; the rest is for the rounds that follow


class Measures(Protocol):
    """What a search asks about a tile: `tune_bench.Bench`."""

    @property
    def cases(self) -> tuple[str, ...]: ...
    @property
    def batch(self) -> int: ...
    def compile_ahead(self, tiles: Sequence[Tile]) -> None: ...
    def check(self, tile: Tile) -> Verdict: ...
    def check_every_feature(self, tile: Tile) -> Verdict: ...
    def time(self, case: str, tile: Tile, milliseconds: int) -> list[float]: ...
    def time_portable(self, case: str, milliseconds: int) -> list[float]: ...


@dataclass(frozen=True)
class Outcome:
    """What the search for one row of the table found."""

    key: Key
    cases: tuple[str, ...]
    shipped: Tile
    winner: Tile | None  # None: the shipped tile stays
    gain: float | None  # shipped / winner's time, geometric mean over the cases
    milliseconds: dict[str, float]  # of the winner, or of the shipped tile that stays: medians by case
    before: dict[str, float]  # of the shipped tile, in the same turns
    samples: int  # the fewest behind a median
    verdict: Verdict | None  # of the tile that stays or wins
    tried: int
    rejected: int
    left: int  # candidates that there was no time for
    problem: str = ""  # why the shipped tile itself cannot be used here
    settled: bool = False  # an earlier run found it, and nothing was left to try
    portable: dict[str, float] = field(default_factory=dict)  # of Hopper's: the portable kernels', likewise

    @property
    def tile(self) -> Tile:
        return self.winner or self.shipped

    @property
    def over_portable(self) -> float | None:
        """The portable kernels' time over Hopper's, the least over the cases; None of other passes."""
        ratios = [time / self.milliseconds[case] for case, time in self.portable.items()]
        return min(ratios) if ratios else None

    def facts(self) -> dict[str, Any]:
        """As the journal keeps it, without its subject."""
        facts = {
            name: value for name, value in asdict(self).items() if name not in ("key", "cases", "shipped")
        }
        return facts | {"winner": None if self.winner is None else list(astuple(self.winner))}

    @classmethod
    def of_entry(cls, subject: Subject, entry: dict[str, Any]) -> Outcome:
        facts = {name: entry[name] for name in cls.__dataclass_fields__ if name in entry}
        facts |= dict(key=subject.key, cases=subject.cases, shipped=subject.shipped)
        facts["settled"] = True
        work = subject.key[0]
        facts["winner"] = None if facts["winner"] is None else tile_of(work, facts["winner"])
        facts["verdict"] = None if facts["verdict"] is None else Verdict(**facts["verdict"])
        return cls(**facts)


@dataclass
class Status:
    """Where a search is, for whoever watches it."""

    phase: str
    done: int
    total: int
    best: Tile
    gain: float  # of the best so far; 1 for the shipped tile


@dataclass
class Search:
    """The search for one row. `starts` are tried first whatever the time: the shipped tile, then those that
    are in use; `pool` are all candidates."""

    key: Key
    starts: Sequence[Tile]
    pool: Sequence[Tile]
    bench: Measures
    journal: Journal
    report: Callable[[Status], None] = lambda status: None
    rounds: Sequence[Round] = ROUNDS
    clock: Callable[[], float] = time.monotonic
    ratios: dict[Tile, float] = field(default_factory=dict)  # time by that of the shipped tile
    verdicts: dict[Tile, Verdict] = field(default_factory=dict)
    rejected: dict[Tile, str] = field(default_factory=dict)
    reference: Tile | None = None  # what times are compared with: the shipped tile, if it can be used
    portable: dict[str, list[float]] = field(default_factory=dict)  # in the turns of the last comparison

    def run(self, seconds: float) -> Outcome:
        """Search for about so long. Raises DeviceLost where a candidate took the GPU with it; the journal
        knows of it then, and the next search leaves it out."""
        began = self.clock()
        self.recall()
        settled = self.journal.outcome(self.subject)
        if settled is not None and not {*self.untried()} - {*self.starts}:
            outcome = Outcome.of_entry(self.subject, settled)
            total = len(self.pool)
            self.report(Status("found before", total, total, outcome.tile, outcome.gain or 1.0))
            return outcome
        self.explore(began + EXPLORING * seconds)
        samples: dict[Tile, dict[str, list[float]]] = {}
        for before, this in itertools.pairwise(self.rounds):
            samples = self.compare(self.best(before.keep), this)
        outcome = self.decide(samples)
        self.journal.add("outcome", self.subject, **outcome.facts())
        return outcome

    @property
    def subject(self) -> Subject:
        return Subject(self.key, self.bench.cases, self.starts[0])

    def recall(self) -> None:
        """Take up what an earlier run found out about this row."""
        entries = self.journal.tried(self.subject)
        self.rejected = {tile: e["reason"] for tile, e in entries.items() if e["kind"] != "timed"}
        if self.starts[0] in self.rejected:
            return  # times were compared with another tile's then: they are taken anew
        for tile, entry in entries.items():
            if entry["kind"] == "timed" and tile != self.starts[0]:
                self.ratios[tile] = entry["ratio"]
                self.verdicts[tile] = Verdict(**entry["verdict"])

    def explore(self, until: float) -> None:
        """Try one candidate after another, the nearest to the best so far first."""
        first = [tile for tile in dict.fromkeys(self.starts) if tile not in self.rejected]
        self.bench.compile_ahead(first)
        references: dict[str, float] = {}
        for tile in first:
            self.try_tile(tile, references)
        while self.untried() and self.clock() < until:
            batch = self.untried()[: self.bench.batch]
            self.bench.compile_ahead(batch)
            for tile in batch:
                if self.clock() >= until:
                    break
                self.try_tile(tile, references)

    def untried(self) -> list[Tile]:
        """In the order in which they deserve a try."""
        left = [tile for tile in self.pool if tile not in self.ratios and tile not in self.rejected]
        return nearest_first(left, self.best(1)[0] if self.ratios else self.starts[0], self.starts[0])

    def try_tile(self, tile: Tile, references: dict[str, float]) -> None:
        """Check and time a candidate; the first that passes is what the others' times are compared with."""
        self.journal.add("trying", self.subject, tile)
        milliseconds = self.rounds[0].milliseconds
        try:
            verdict = self.bench.check(tile)
            if verdict.spills and tile != self.starts[0]:
                raise Rejected(f"spills {verdict.spills} registers")
            times = {case: self.bench.time(case, tile, milliseconds) for case in self.bench.cases}
        except (Rejected, DeviceLost) as error:
            self.reject(tile, str(error))
            if isinstance(error, DeviceLost):
                raise
            return
        except KeyboardInterrupt:
            self.journal.add("interrupted", self.subject, tile)
            raise
        medians = {case: median(each) for case, each in times.items()}
        if self.reference is None:
            self.reference = tile
            references.update(medians)
        ratio = geometric_mean(medians[case] / references[case] for case in medians)
        self.ratios[tile], self.verdicts[tile] = ratio, verdict
        self.journal.add(
            "timed", self.subject, tile, ratio=ratio, milliseconds=medians, verdict=asdict(verdict)
        )  # fmt: skip
        self.tell("trying")

    def reject(self, tile: Tile, reason: str) -> None:
        self.rejected[tile] = reason
        self.ratios.pop(tile, None)
        self.journal.add("rejected", self.subject, tile, reason=reason)
        self.tell("trying")

    def best(self, count: int) -> list[Tile]:
        """The fastest so far."""
        return sorted(self.ratios, key=self.ratios.__getitem__)[:count]

    def compare(self, field: Sequence[Tile], this: Round) -> dict[Tile, dict[str, list[float]]]:
        """Time these and those in use in turns with the reference, Hopper's with the portable kernels too; by
        tile and case all samples."""
        if self.reference is None:
            return {}
        tiles = list(dict.fromkeys([self.reference, *field, *(t for t in self.starts if t in self.ratios)]))
        samples: dict[Tile, dict[str, list[float]]] = {
            tile: {c: [] for c in self.bench.cases} for tile in tiles
        }
        self.bench.compile_ahead(tiles)
        self.portable = {case: [] for case in self.bench.cases if self.key[0] in HOPPER_PASSES}
        for turn in range(this.turns):
            self.tell(f"comparing {len(tiles)}, turn {turn + 1} of {this.turns}")
            for case, times in self.portable.items():
                times += self.bench.time_portable(case, this.milliseconds)
            for tile in [tile for tile in tiles if tile in samples]:
                try:
                    for case in self.bench.cases:
                        samples[tile][case] += self.bench.time(case, tile, this.milliseconds)
                except (Rejected, DeviceLost) as error:
                    self.reject(tile, str(error))
                    if isinstance(error, DeviceLost) or tile == self.reference:
                        raise
                    del samples[tile]
        base = samples[self.reference]
        # What was not among these was slower before; it does not come back.
        self.ratios = {
            tile: geometric_mean(median(times[case]) / median(base[case]) for case in times)
            for tile, times in samples.items()
        }
        return samples

    def decide(self, samples: dict[Tile, dict[str, list[float]]]) -> Outcome:
        """The winner of the last round, if it is faster than the noise and right with every feature."""
        shipped, winner = self.starts[0], None
        usable = shipped not in self.rejected
        for tile in self.best(len(self.ratios)):
            if usable and 1 / self.ratios[tile] <= 1 + NOISE:
                break
            try:
                self.bench.check_every_feature(tile)
            except (Rejected, DeviceLost) as error:
                self.reject(tile, f"with every feature: {error}")
                if isinstance(error, DeviceLost):
                    raise
                continue
            winner = tile
            break
        kept = winner or shipped
        times, base = samples.get(kept, {}), samples.get(shipped, {})
        return Outcome(
            key=self.key,
            cases=self.bench.cases,
            shipped=shipped,
            winner=winner,
            gain=1 / self.ratios[winner] if winner is not None and usable else None,
            milliseconds={case: median(each) for case, each in times.items()},
            before={case: median(each) for case, each in base.items()},
            samples=min((len(each) for each in times.values()), default=0),
            verdict=self.verdicts.get(kept),
            tried=self.count_tried(),
            rejected=len(self.rejected),
            left=len(self.pool) - self.count_tried(),
            problem=self.rejected.get(shipped, ""),
            portable={case: median(each) for case, each in self.portable.items() if case in times},
        )

    def count_tried(self) -> int:
        return len({*self.verdicts, *self.rejected} & {*self.pool})

    def tell(self, phase: str) -> None:
        best = self.best(1)[0] if self.ratios else self.starts[0]
        gain = 1 / self.ratios[best] if self.ratios else 1.0
        self.report(Status(phase, self.count_tried(), len(self.pool), best, gain))
