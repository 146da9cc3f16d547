"""One process, or several that train one model together: who has which part, and what they tell each other.

Several are started by torchrun, and are called ranks. They stand in a mesh of `shard` rows and `context`
columns. A batch is cut twice: each row of the mesh has some of its texts, each column some of the characters
of a text. With 4 ranks, --shard 2 --context 2, and 4 texts:

                  characters 0-15, 48-63      16-47
    texts 0, 1    rank 0                      rank 1
    texts 2, 3    rank 2                      rank 3

Which characters a column has is the order of `tilewise.distributed`: causal attention gives the later ones
more work, so each column has early ones and late ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .settings import ExampleError, Settings

T = TypeVar("T")


class Ranks:
    """The processes of a run. Here there is one, which has all and needs to tell nobody."""

    rank, count, shard, context = 0, 1, 1, 1

    @property
    def first(self) -> bool:
        """Is this the rank that speaks, and writes what is written once?"""
        return self.rank == 0

    def named(self, words: str) -> str:
        """Words that this rank alone has to say."""
        return words

    def total(self, *numbers: float) -> list[float]:
        """The sum over all ranks, on every rank, of each number."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Is it so on any rank? All get the same answer, and so do the same next."""
        return self.total(flag)[0] > 0

    def together(self, act: Callable[[], T]) -> T:
        """act(), on every rank; where it raises ExampleError on some, all raise one that says so."""
        return act()

    def agree(self, **known: Any) -> None:
        """Raise ExampleError, on all ranks, where one knows something else than the first."""

    def close(self) -> None:
        """Part, after the last word."""


ALONE = Ranks()


class SeveralRanks(Ranks):
    """The ranks of torch.distributed, this process one of them, in rows of `context` ranks."""

    def __init__(self, context: int) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.context, self.shard = context, self.count // context

    def named(self, words: str) -> str:
        return f"rank {self.rank}: {words}"

    def total(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def together(self, act: Callable[[], T]) -> T:
        result, problem = None, None
        try:
            result = act()
        except ExampleError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self.count
        dist.all_gather_object(problems, problem)
        for rank, words in enumerate(problems):
            if words is not None:
                everywhere = problems.count(words) == self.count
                raise ExampleError(words if everywhere else f"rank {rank}: {words}")
        return result  # type: ignore[return-value]

    def agree(self, **known: Any) -> None:
        everywhere: list[dict[str, Any]] = [{}] * self.count
        dist.all_gather_object(everywhere, known)
        for name, value in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other[name] != value:
                    raise ExampleError(
                        f"rank {rank} has {name} {other[name]}, and rank 0 has {value}: start all ranks with "
                        "one command, and give them one folder"
                    )

    def told_by_the_first(self, word: T) -> T:
        """What the first rank has given, on every rank."""
        words = [word]
        dist.broadcast_object_list(words, src=0)
        return words[0]

    def meshes(self, device: str) -> tuple[DeviceMesh, DeviceMesh]:
        """All ranks in one line, and in rows and columns. Made once: each takes new process groups."""
        kind = torch.device(device).type
        line = init_device_mesh(kind, (self.count,), mesh_dim_names=("ranks",))
        grid = init_device_mesh(kind, (self.shard, self.context), mesh_dim_names=("shard", "context"))
        return line, grid

    def own_texts(self, batch: Tensor) -> Tensor:
        """This rank's texts of a batch [batch, ...]."""
        return batch.tensor_split(self.shard)[self.rank // self.context]

    def close(self) -> None:
        dist.destroy_process_group()


def lost_rank(error: BaseException) -> str | None:
    """What an error says of a rank that cannot be talked to any more; None where it is another error. gloo
    has no exception of its own, but names its file; tilewise says more, and has gloo's as the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, dist.DistError) and "/gloo/" not in str(cause):
        cause = cause.__cause__
    if cause is None:
        return None
    words = str(error).partition("\n")[0]
    return words.partition("] ")[2].partition(". This is")[0] if "/gloo/" in words else words


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def speaks() -> bool:
    """Is this the process that prints: the first rank, or the only one? Known before the ranks are joined."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def join_ranks(ranks: int | None, context: int | None, shard: int | None, device: str) -> Ranks:
    """The ranks of this run: those that torchrun has started, or one process.

    ranks, context, shard: what the caller asked for, None where nothing. Raises ExampleError where that is
    not what was started.
    """
    if not started_by_torchrun():
        given = {"ranks": ranks, "context": context, "shard": shard}
        asked = {name: number for name, number in given.items() if number not in (None, 1)}
        if asked:
            words = " ".join(f"--{name} {number}" for name, number in asked.items())
            count = ranks or (context or 1) * (shard or 1)
            raise ExampleError(
                f"{words}: this is one process. torchrun --nproc-per-node {count} examples/train_gpt.py "
                f"{words} starts {count}" + ("; --length is that of a text" if context else "")
            )
        return ALONE
    count = int(os.environ["WORLD_SIZE"])
    if ranks not in (None, count):
        raise ExampleError(
            f"--ranks {ranks}: torchrun has started {count}; say torchrun --nproc-per-node {ranks}, or leave "
            "--ranks out"
        )
    context = columns(count, context, shard)
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ExampleError(
                f"{here} ranks were started on a machine with {gpus} GPUs, and each needs its own: say "
                f"torchrun --nproc-per-node {gpus}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    return SeveralRanks(context)


def columns(count: int, context: int | None, shard: int | None) -> int:
    """How many ranks share a text: all that --shard leaves. Raises ExampleError where the two do not make
    `count` ranks."""
    if context is None:
        context = count // (shard or 1)
    if shard is None:
        shard = count // context
    if shard * context != count:
        raise ExampleError(
            f"--shard {shard} times --context {context} is {shard * context}, and there are {count} ranks: "
            "leave one of the two out, and it is what the other leaves"
        )
    return context


def check_parts(settings: Settings, ranks: Ranks) -> None:
    """Raise ExampleError for a batch that cannot be cut into equal parts. They must be equal, for the mean
    over the ranks of each one's mean loss to be the mean loss."""
    if ranks.count > 1 and settings.implementation == "sdpa":
        raise ExampleError(
            "--implementation sdpa trains in one process: PyTorch's attention needs whole texts. "
            "--implementation both compares it with tilewise's on all ranks"
        )
    if settings.batch % ranks.shard:
        raise ExampleError(f"--batch {settings.batch} must be a multiple of --shard {ranks.shard}")
    if ranks.count > 1 and settings.context % (2 * ranks.context):
        raise ExampleError(
            f"--length {settings.context} must be a multiple of {2 * ranks.context}, two chunks of a text "
            f"for each of --context {ranks.context}"
        )
