"""A call to `attention` in the making, the registry of features that shape it, and its judgement."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import tilewise
from tilewise.plan.request import request_of

from .gradients import check_gradients
from .oracle import check, rows_that_see
from .sanitizer import sanitize
from .second import check_second

# In the order in which a problem is built: sizes before what must fit them.
KINDS = {
    "dtype": "dtypes",
    "heads": "heads",
    "dims": "dimensions",
    "lengths": "lengths",
    "rows": "where rows lie",
    "tile": "tiles",
    "layout": "memory layouts",
    "similarity": "similarities",
    "scale": "scale",
    "score": "score modifiers",
    "bias": "bias",
    "sink": "sink",
    "dropout": "dropout",
    "mask": "masks, alone and combined: and, or, not",
    "order": "derivatives",
}
ALIGNS = ("bottom_right", "top_left")
DTYPES = ("float32", "float16", "bfloat16")  # features, all three
# Sizes at which the interpreter is soon done with a backward, in several tiles of 16 × 16.
SMALL = {"batch": 2, "q_heads": 2, "kv_heads": 1, "q_len": 17, "kv_len": 20}


def longer(device: torch.device) -> int:
    """How many times the interpreter's lengths a test affords: a GPU takes tens of tiles."""
    return 13 if device.type == "cuda" else 1


class Packing(NamedTuple):
    """Offsets, and how many rows the tensors of queries and of keys have."""

    q_offsets: torch.Tensor
    kv_offsets: torch.Tensor | None
    tokens: tuple[int, int]


class Cached(NamedTuple):
    """How many rows of each sequence a cache holds, and the table of its pages, if it is in pages."""

    kv_lens: torch.Tensor
    pages: torch.Tensor | None


@dataclass
class Problem:
    """One call to `attention` in the making."""

    rng: random.Random
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = 19
    kv_len: int = 45
    head_dim: int = 16
    value_dim: int = 16
    tile: tilewise.tiles.Tile | None = field(default_factory=lambda: tilewise.tiles.Tile(16, 16))
    scales: Callable[[Problem], tilewise.Scales] | None = None  # of fp8
    packed: Callable[[Problem], Packing] | None = None
    packing: Packing | None = None  # drawn when it is first asked for
    page_size: int | None = None  # of a cache; 0: in one piece
    cache: Cached | None = None
    layout: Callable[[Problem, tuple[int, ...]], torch.Tensor] | None = None
    order: int = 1  # of the derivatives that `judge` asks for, of what has any
    mask: Any = None
    scores: list[Any] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def longer(self) -> int:
        return longer(self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 20))
        return torch.randn(shape, generator=generator).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers from low to high, both included, int32 or int64."""
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 20))
        numbers = torch.randint(low, high + 1, shape, generator=generator)
        return numbers.to(self.device, self.rng.choice((torch.int32, torch.int64)))

    def length_or_lengths(self) -> Any:
        """A number of keys for all sequences, or one for each; 0 and all keys included."""
        if self.rng.random() < 0.25:
            return self.rng.randint(0, self.kv_len)
        return self.integers(0, self.kv_len, self.batch)

    def corner(self) -> Any:
        """The corner of the last query and key, said in so many words where it would not be clear."""
        return None if self.packed is not None else "bottom_right"

    def align(self) -> Any:
        """A corner, or the key position of query 0, for all sequences or one for each; before the first key
        and behind the last one too."""
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.rng.choice((self.corner(), *ALIGNS))
        low, high = -self.q_len // 2 - 1, self.kv_len + 2
        return self.rng.randint(low, high) if kind == 1 else self.integers(low, high, self.batch)

    def broadcast(self, *shape: int) -> tuple[int, ...]:
        """The shape with some dimensions replaced by 1, and perhaps without its first ones."""
        sizes = [1 if self.rng.random() < 0.4 else size for size in shape]
        return tuple(sizes[self.rng.randrange(len(shape)) if self.rng.random() < 0.3 else 0 :])

    def add_mask(self, mask: Any) -> None:
        self.mask = mask if self.mask is None else self.mask & mask

    def rows(self) -> Packing | None:
        """Where packed sequences lie; None where each has a tensor's row of its own."""
        if self.packed is not None and self.packing is None:
            self.packing = self.packed(self)
        return self.packing

    def tensor(self, heads: int, length: int, dim: int, tokens: int) -> torch.Tensor:
        """[batch, heads, length, dim], or packed [tokens, heads, dim], in the memory layout asked for."""
        make = self.layout or (lambda problem, shape: problem.randn(*shape, dtype=problem.dtype))
        if self.rows() is None:
            return make(self, (self.batch, heads, length, dim))
        return make(self, (1, heads, tokens, dim))[0].transpose(0, 1)

    def filled(self) -> Cached | None:
        """What the cache holds; None where there is none. Its pages lie in any order."""
        if self.page_size is not None and self.cache is None:
            lens = self.integers(0, self.kv_len, self.batch)
            pages = None
            if self.page_size:
                each = -(-self.kv_len // self.page_size)
                pages = torch.tensor(self.rng.sample(range(self.batch * each), self.batch * each))
                pages = pages.reshape(self.batch, each).to(lens.device, lens.dtype)
            self.cache = Cached(lens, pages)
        return self.cache

    def cache_of(self, dim: int) -> torch.Tensor:
        """A cache of keys or values, NaN behind what is filled."""
        lens, pages = self.filled()
        make = self.layout or (lambda problem, shape: problem.randn(*shape, dtype=problem.dtype))
        if pages is None:
            x = make(self, (self.batch, self.kv_heads, self.kv_len, dim))
            rows = [x[b, :, n:] for b, n in enumerate(lens.tolist())]
        else:
            x = make(self, (max(1, pages.numel()), self.kv_heads, self.page_size, dim)).transpose(1, 2)
            rows = [
                x[page, max(0, n - i * self.page_size) :]
                for b, n in enumerate(lens.tolist())
                for i, page in enumerate(pages[b].tolist())
            ]
        if all(stride or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            for each in rows:
                each.fill_(torch.nan)
        return x

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v."""
        if self.filled() is not None:
            q = self.tensor(self.q_heads, self.q_len, self.head_dim, 0)
            return q, self.cache_of(self.head_dim), self.cache_of(self.value_dim)
        tokens, kv_tokens = (0, 0) if self.rows() is None else self.rows().tokens
        return (
            self.tensor(self.q_heads, self.q_len, self.head_dim, tokens),
            self.tensor(self.kv_heads, self.kv_len, self.head_dim, kv_tokens),
            self.tensor(self.kv_heads, self.kv_len, self.value_dim, kv_tokens),
        )

    def gradient_of_out(self) -> torch.Tensor:
        """dO."""
        tokens = 0 if self.rows() is None else self.rows().tokens[0]
        return self.tensor(self.q_heads, self.q_len, self.value_dim, tokens)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `attention`; of `packed_attention`, then with offsets; or of
        `cached_attention`, then with lengths."""
        given = {"mask": self.mask, "score": self.scores or None, **self.arguments}
        if self.scales is not None:
            given["scales"] = self.scales(self)
        if self.rows() is not None:
            given |= {"q_offsets": self.rows().q_offsets, "kv_offsets": self.rows().kv_offsets}
        if self.filled() is not None:
            given |= {"kv_lens": self.filled().kv_lens, "pages": self.filled().pages}
        return given


class Feature(NamedTuple):
    name: str
    kind: str
    text: str  # the words of docs/support.md
    apply: Callable[[Problem], None]

    def __repr__(self) -> str:
        return self.name


FEATURES: dict[str, Feature] = {}


def feature(kind: str, text: str) -> Callable[[Callable[[Problem], None]], Callable[[Problem], None]]:
    def register(apply: Callable[[Problem], None]) -> Callable[[Problem], None]:
        name = apply.__name__
        assert kind in KINDS and name not in FEATURES, name
        FEATURES[name] = Feature(name, kind, text, apply)
        return apply

    return register


def of_kind(kind: str) -> list[Feature]:
    return [entry for entry in FEATURES.values() if entry.kind == kind]


def build(
    device: torch.device, rng: random.Random, features: Iterable[Feature | str], **sizes: Any
) -> Problem:
    """The problem with these sizes and features; features are applied in the order of KINDS."""
    problem = Problem(rng, device, **sizes)
    entries = [FEATURES[entry] if isinstance(entry, str) else entry for entry in features]
    order = list(KINDS)
    for entry in sorted(entries, key=lambda entry: order.index(entry.kind)):
        entry.apply(problem)
    return problem


def judge(problem: Problem, backward: bool = False) -> dict[str, torch.Tensor]:
    """Compare the kernels with the oracle on this problem, every address checked by the sanitizer; with
    `backward` all gradients too, for a gradient of out that has the problem's memory layout, but of a cache
    and of fp8, which have none. Returns the gradients by name."""
    q, k, v = problem.tensors()
    arguments = problem.keywords()
    forced = contextlib.nullcontext() if problem.tile is None else tilewise.tiles.use(problem.tile)
    has_gradient = problem.filled() is None and problem.scales is None
    with forced, sanitize():
        if backward and problem.order == 2 and has_gradient:
            check_second(q, k, v, **arguments)
        if backward and has_gradient:
            return check_gradients(q, k, v, problem.gradient_of_out(), **arguments)
        check(q, k, v, **arguments)
        return {}


def run(
    device: torch.device, *features: str, seed: object = 0, backward: bool = False, **sizes: object
) -> None:
    """Judge a problem that has these features and, unless a length is 0, keeps some pairs; `seed` decides
    what the features leave open."""
    for attempt in range(100):
        p = build(device, random.Random(str((features, seed, attempt))), features, **sizes)
        if 0 in (p.batch, p.q_len, p.kv_len) or keeps_pairs(p):
            judge(p, backward)
            return
    raise AssertionError(f"no pair counts under {features} in 100 draws")


def keeps_pairs(p: Problem) -> bool:
    """Whether at least a tenth of the queries see a key, in every head."""
    sees = rows_that_see(request_of(*p.tensors(), **p.keywords()))
    return bool((sees.float().mean((0, 2)) > 0.1).all())


def lengths(device: torch.device, pair: tuple[int, int]) -> dict[str, int]:
    times = longer(device)
    return {"q_len": pair[0] * times, "kv_len": pair[1] * times}
