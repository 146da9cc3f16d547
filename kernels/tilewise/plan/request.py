"""The arguments of one call, in their final form, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..parts.dropout import Dropout
from ..parts.dtensors import is_dtensor
from ..parts.fp8 import FP8, Scales
from ..parts.masks.mask import Mask, as_mask
from ..parts.place import Place
from ..parts.scores.bias import Bias
from ..parts.scores.score import Score, as_scores
from ..parts.shape import Cache, Packing, Pages, Shape
from ..parts.similarity import Cosine, Similarity, similarity_scores
from .shards import agreed

Tensor = torch.Tensor


@dataclass(eq=False)
class Request:
    """The arguments of one call to `attention`, with mask and score in their final form. What follows from
    them is worked out when first asked for; by hand, for torch.compile cannot trace `cached_property`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    masks: tuple[Mask, ...]
    scores: tuple[Score, ...]
    scale: float | torch.Tensor | None
    similarity: str | Cosine
    sink: torch.Tensor | None
    impl: str | None
    dropout: Dropout | None = None
    strict: bool = False
    packing: Packing | None = None  # then q, and without a cache k and v, are [1, heads, tokens, dim]
    cache: Cache | None = None  # then k and v are [batch, heads, capacity, dim] or [pages, heads, size, dim]
    deterministic: bool = True  # of the backward
    # Where it lies in a larger call, whose masks, scores and dropout these are; else they are its own.
    place: Place | None = None
    scales: Scales | None = None  # then q, k and v are fp8
    _shape: Shape | None = field(default=None, init=False)
    _similarity_scores: Similarity | None = field(default=None, init=False)
    _other_tensors: list[tuple[str, torch.Tensor]] | None = field(default=None, init=False)
    look: Any = field(default=None, init=False)  # look.py; kept from the question to the answer

    @property
    def shape(self) -> Shape:
        if self._shape is None:
            (batch, q_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = self.q.shape, self.k.shape
            if self.packing is not None:
                batch = self.packing.batch
            if self.cache is not None and self.cache.pages is not None:
                kv_len = self.cache.pages.table.shape[1] * self.cache.pages.page_size
            sizes = (batch, q_heads, kv_heads, q_len, kv_len, head_dim, self.v.shape[3])
            self._shape = Shape(*sizes, self.packing, self.cache)
        return self._shape

    @property
    def whole(self) -> Shape:
        """The sizes that masks and scores are made for."""
        return self.shape if self.place is None else self.place.whole(self.shape)

    @property
    def plugs(self) -> tuple[Mask | Score, ...]:
        return (*self.masks, *self.scores)

    @property
    def similarity_scores(self) -> Similarity:
        if self._similarity_scores is None:
            in_natural_units = bool(self.scores) or self.sink is not None
            self._similarity_scores = similarity_scores(
                self.q, self.k, self.similarity, self.scale, in_natural_units, self.scales
            )
        return self._similarity_scores

    @property
    def chain(self) -> tuple[Score, ...]:
        """Every modifier that acts on the dot products, in order."""
        return (*self.similarity_scores.scores, *self.scores)

    @property
    def has_holes(self) -> bool:
        """Whether walks are over lists of tiles."""
        return any([mask.has_holes for mask in self.masks])

    def qkv(self) -> dict[str, torch.Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def other_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor besides q, k and v, with the name of its argument: first those of the call itself,
        then those of each part of `plugs`."""
        if self._other_tensors is not None:
            return self._other_tensors
        temperature = self.similarity.temperature if isinstance(self.similarity, Cosine) else None
        seed = None if self.dropout is None else self.dropout.seed
        q_offsets, kv_offsets = (None, None) if self.packing is None else self.packing
        kv_lens = None if self.cache is None else self.cache.kv_lens
        pages = None if self.cache is None else self.cache.pages
        table = None if pages is None else pages.table
        q_scale, k_scale, v_scale = self.scales[:3] if isinstance(self.scales, Scales) else (None,) * 3
        given = (
            ("scale", self.scale),
            ("temperature", temperature),
            ("sink", self.sink),
            ("dropout_seed", seed),
            ("q_offsets", q_offsets),
            ("kv_offsets", kv_offsets),
            ("kv_lens", kv_lens),
            ("pages", table),
            ("scales.q", q_scale),
            ("scales.k", k_scale),
            ("scales.v", v_scale),
        )
        found = [(name, value) for name, value in given if isinstance(value, torch.Tensor)]
        for part in self.plugs:
            found += [(part.called(name), t) for name, t in part.tensors().items()]
        self._other_tensors = found
        return found

    @property
    def out_dtype(self) -> torch.dtype:
        return self.q.dtype if self.scales is None else self.scales.dtype

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or any([tensor.requires_grad for _, tensor in self.other_tensors])
        )


def make_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Any = None,
    bias: Tensor | None = None,
    score: Any = None,
    scale: float | Tensor | None = None,
    similarity: str | Cosine = "scaled_dot",
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scales: Scales | None = None,
    impl: str | None = None,
    strict: bool = False,
    deterministic: bool = True,
    packing: Packing | None = None,
    cache: Cache | None = None,
) -> Request:
    """The arguments of `attention` in their final form: masks as a tuple, the bias as the last modifier, q, k
    and v in autocast's dtype, a seed. With a packing q, k and v are [1, heads, tokens, dim]; with a cache k
    and v are it, pages as [pages, heads, page_size, dim]."""
    masks = () if mask is None else as_mask(mask).parts()
    scores = as_scores(score) if bias is None else (*as_scores(score), Bias(bias))
    if cache is None and isinstance(q, Tensor) and is_autocast(q.device):  # a cache is not copied
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if is_cast(x) else x for x in (q, k, v))
    dropout = None
    if dropout_p != 0 and (dropout_seed is not None or isinstance(q, Tensor)):
        dropout = Dropout(dropout_p, seed_for(q) if dropout_seed is None else dropout_seed)
    return Request(
        q, k, v, masks, scores, scale, similarity, sink, impl, dropout, strict, packing, cache, deterministic,
        scales=scales,
    )  # fmt: skip


def as_heads(*tensors: Any) -> list[Any]:
    """[tokens, heads, dim] as [1, heads, tokens, dim]. Raises ValueError for others."""
    wrong = [
        f"{name}.shape={tuple(x.shape)}"
        for name, x in zip("qkv", tensors, strict=False)
        if isinstance(x, Tensor) and x.dim() != 3
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must have 3 dimensions, [tokens, heads, dim]")
    return [x.transpose(0, 1).unsqueeze(0) if isinstance(x, Tensor) else x for x in tensors]


def as_packing(q_offsets: Any, kv_offsets: Any) -> Packing:
    return Packing(q_offsets, None if kv_offsets is q_offsets else kv_offsets)


def request_of(
    q: Any, k: Any, v: Any, *, q_offsets: Any = None, kv_offsets: Any = None, **arguments: Any
) -> Request:
    """The request of `attention`; where q_offsets are given, of `packed_attention`, and where kv_lens are, of
    `cached_attention`."""
    if arguments.get("kv_lens") is not None:
        return cached_request(q, k, v, q_offsets=q_offsets, **arguments)
    if q_offsets is None:
        return make_request(q, k, v, **arguments)
    return make_request(*as_heads(q, k, v), **arguments, packing=as_packing(q_offsets, kv_offsets))


def cached_request(
    q: Any,
    cache_k: Any,
    cache_v: Any,
    *,
    kv_lens: Any,
    pages: Any = None,
    q_offsets: Any = None,
    split_size: int | None = None,
    **arguments: Any,
) -> Request:
    """The request of `cached_attention`, of what the cache holds already. Raises ValueError for what has not
    the dimensions to be looked at."""
    if q_offsets is not None:
        (q,) = as_heads(q)
    k, v, cache_pages = cache_k, cache_v, None
    if pages is not None:
        if not isinstance(pages, Tensor) or pages.dim() != 2:
            given = tuple(pages.shape) if isinstance(pages, Tensor) else pages
            raise ValueError(f"pages={given} must be a tensor [batch, max_pages]")
        for name, x in (("cache_k", cache_k), ("cache_v", cache_v)):
            if isinstance(x, Tensor) and x.dim() != 4:
                wanted = "[pages, page_size, kv_heads, dim]"
                raise ValueError(f"{name}.shape={tuple(x.shape)} must have 4 dimensions, {wanted}")
        k, v = (x.transpose(1, 2) if isinstance(x, Tensor) else x for x in (cache_k, cache_v))
        if isinstance(k, Tensor):
            cache_pages = Pages(pages, k.shape[2], k.shape[0])
    packing = None if q_offsets is None else Packing(q_offsets, None)
    return make_request(q, k, v, **arguments, packing=packing, cache=Cache(kv_lens, cache_pages, split_size))


def without_drawing(q: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `make_request` with a seed that stands in for one to be drawn: drawing would move
    PyTorch's generator on, and looking at a call must not."""
    if arguments.get("dropout_p", 0) == 0 or arguments.get("dropout_seed") is not None:
        return arguments
    device = q.device if isinstance(q, Tensor) else None
    return arguments | {"dropout_seed": torch.zeros(1, dtype=torch.int64, device=device)}


def is_cast(x: Any) -> bool:
    """Whether autocast casts x, by PyTorch's rule: floating point numbers, but for fp64; and for fp8, which
    without its scales is no number."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in (torch.float64, FP8)


def is_autocast(device: torch.device) -> bool:
    """Whether an autocast region of the device is entered; some devices (meta) know none."""
    return device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)


def seed_for(q: Tensor) -> Tensor:
    """A seed that is drawn for a call; ranks that share it, as DTensors, have one."""
    seed = draw_seed(q.device)
    return agreed(seed, q.device_mesh) if is_dtensor(q) else seed  # type: ignore[attr-defined]


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's generator: a CUDA graph draws another one at each replay."""
    return torch.randint(-(1 << 62), 1 << 62, (1,), dtype=torch.int64, device=device)
