"""What is known of a call before it runs, in plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .limits import PIPES, Limit, Limits
from .suggestions import Suggestion
from .workload import Allocation, Kernel

Work = Literal["forward", "training"]


@dataclass(frozen=True)
class Packed:
    """Sequences that are packed one behind the other, in tokens; each pair is of queries and of keys."""

    sequences: int
    tokens: tuple[int, int]  # of all sequences; the tensors may have more
    shortest: tuple[int, int]
    longest: tuple[int, int]
    assumed: bool  # the offsets have no contents here, and equal lengths stand in


@dataclass(frozen=True)
class Cached:
    """A cache, as the call finds it: what it appends is not counted."""

    sequences: int
    capacity: int  # keys of a sequence that there is room for
    keys: int  # of all sequences
    shortest: int
    longest: int
    assumed: bool  # kv_lens has no contents here, and the capacity stands in
    page_size: int | None  # None: not in pages
    pages: int | None
    pages_in_use: int | None  # by each sequence, so that one they share counts for each
    rows: int  # of the longest sequence's queries, for all heads of a group: what its tiles are filled with
    splits: int  # programs that the keys of a sequence are split over
    split_keys: int  # the most that one of them has


@dataclass(frozen=True)
class Findings:
    """Counts, bytes and seconds. Times are floors by the chip's datasheet, not forecasts."""

    work: Work
    device: str  # of q
    implementation: str  # what answers `attention` here, or would if it were not refused
    because: str
    refused: tuple[str, ...]  # why `attention` raises here
    others: dict[str, str]  # every other implementation, and why it does not answer
    gpu: str
    gpu_because: str
    no_kernels: str  # why no GPU runs this call with the fused kernels; empty if one does
    on_gpu: str  # the implementation that the forward below is of
    on_gpu_note: str  # what to know of that; empty where there is nothing
    sizes: dict[str, int]  # packed: batch counts the sequences, q_len and kv_len the tensors' tokens
    # of a cache: kv_len is its capacity
    packed: Packed | None
    cached: Cached | None
    dtype: str
    pairs: int  # of query and key, in all batches and heads
    pairs_that_count: int
    exact: bool  # False: a mask could not be evaluated here, and tiles visited are those at most
    notes: tuple[str, ...]
    kernels: tuple[Kernel, ...]  # that the GPU runs
    memory: tuple[Allocation, ...]  # that they need
    memory_here: tuple[Allocation, ...]  # what plain PyTorch needs, where that is what answers
    suggestions: tuple[Suggestion, ...]

    @property
    def limits(self) -> Limits:
        """Of all kernels: each pipe's seconds added up."""
        return Limits(*(sum(getattr(kernel.limits, pipe) for kernel in self.kernels) for pipe in PIPES))

    @property
    def limit(self) -> Limit:
        """The pipe that has the most to do, or "programs" where most of the time passes in kernels that have
        too few of them."""
        few = sum(kernel.limits.overlapped for kernel in self.kernels if kernel.limits.few_programs)
        return "programs" if 2 * few > self.seconds else self.limits.largest

    @property
    def seconds(self) -> float:
        """The least time of the kernels, one after another, each bound by its slowest pipe."""
        return sum(kernel.limits.overlapped for kernel in self.kernels)

    @property
    def seconds_in_turns(self) -> float:
        """The same where matmuls and exponentials take turns."""
        return sum(kernel.limits.in_turns for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Of the pairs that count, as papers count them: two products forward, five more backward."""
        head_dim, value_dim = self.sizes["head_dim"], self.sizes["value_dim"]
        dims = head_dim + value_dim
        if self.work == "training":
            dims += 3 * head_dim + 2 * value_dim
        return 2 * self.pairs_that_count * dims

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        found = asdict(self)
        for entry, kernel in zip(found["kernels"], self.kernels, strict=True):
            entry |= dict(intensity=kernel.intensity, limit=kernel.limits.limit)
        return found | dict(
            limits=self.limits.seconds(), limit=self.limit, flops=self.flops,
            seconds=self.seconds, seconds_in_turns=self.seconds_in_turns,
        )  # fmt: skip
