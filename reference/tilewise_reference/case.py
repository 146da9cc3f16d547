"""What is a case? One attention call as a model makes it: sizes, what it asks for, FLOPs, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypedDict

import torch

from .attention import Similarity
from .positions import Align, shift

if TYPE_CHECKING:
    from typing_extensions import Unpack

Phase = Literal["prefill", "decode", "training", "encoder"]
Pass = Literal["forward", "backward", "forward mode", "double backward"]


class Features(TypedDict, total=False):
    """What a case asks for beyond plain softmax attention. A key that is absent asks for nothing."""

    causal: Align
    window: tuple[int | None, int | None]  # keys to the left and right of the query's own; None = no limit
    softcap: float
    sink: bool  # a learned logit per query head
    similarity: Similarity
    temperature: bool  # a learned factor per query head on the cosine
    scale: float
    bias: tuple[int, int, int, int]  # shape of an additive bias, 1 where it broadcasts
    alibi: bool  # slopes [q_heads]
    relative_position: tuple[int, int, bool]  # T5: num_buckets, max_distance, bidirectional
    documents: int  # packed documents of equal length, which do not see each other
    bool_mask: bool  # a dense mask [q_len, kv_len] that keeps half of the pairs, at random
    dropout: float  # the probability that a pair is dropped
    trained: bool  # what is learned besides q, k and v (bias, sink, slopes, ...) gets a gradient
    lengths: tuple[int, ...]  # packed sequences: how long each is
    cache: tuple[int, ...]  # keys and values in a cache: how many rows of each sequence it holds
    page_size: int  # rows of a page, where the cache has pages


@dataclass(frozen=True)
class Case:
    """One attention call: q [batch, q_heads, q_len, head_dim] against k and v [batch, kv_heads, kv_len, ...].

    dtype: the name of a torch dtype. phase: what the model is doing. provenance: the model and the source of
    the numbers. A window without ``causal`` puts the queries at the end of the keys (``"bottom_right"``).

    With ``lengths`` the sequences are packed, q [tokens, q_heads, head_dim]: batch is their number, and q_len
    and kv_len are the length of the longest.

    With ``cache`` the keys and values stand in a cache with room for kv_len rows a sequence, as many as the
    fullest has; the q_len queries of a sequence belong to the last of its rows, which are in it already.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: str
    phase: Phase
    provenance: str
    features: Features = field(default_factory=Features, hash=False)

    def __post_init__(self) -> None:
        lengths, cache = self.lengths, self.cache
        if lengths is not None:
            longest = max(lengths, default=0)
            if min(lengths, default=0) < 1 or (self.batch, self.q_len, self.kv_len) != (
                len(lengths), longest, longest,
            ):  # fmt: skip
                raise ValueError(
                    f"{self.name}: {lengths=} must be 1 or more each, as many as batch={self.batch}, the "
                    f"longest as long as q_len={self.q_len} and kv_len={self.kv_len}"
                )
        if cache is not None:
            sizes = (len(cache), max(cache, default=0))
            if sizes != (self.batch, self.kv_len) or min(cache) < self.q_len or lengths is not None:
                raise ValueError(
                    f"{self.name}: {cache=} must be q_len={self.q_len} or more each, as many as "
                    f"batch={self.batch}, the largest kv_len={self.kv_len}, and without lengths"
                )
        if self.page_size is not None and (cache is None or self.page_size < 1):
            raise ValueError(f"{self.name}: page_size={self.page_size} must be 1 or more, of a cache")

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Of packed sequences; None where the tensors are dense."""
        return self.features.get("lengths")

    @property
    def cache(self) -> tuple[int, ...] | None:
        """Rows of each sequence that a cache holds; None where there is none."""
        return self.features.get("cache")

    @property
    def page_size(self) -> int | None:
        """Of a cache in pages."""
        return self.features.get("page_size")

    @property
    def sequences(self) -> tuple[int, ...] | None:
        """The keys of each sequence, packed or in a cache; None where the tensors are dense."""
        return self.lengths if self.cache is None else self.cache

    @property
    def tokens(self) -> int:
        """Queries of all sequences."""
        return self.batch * self.q_len if self.lengths is None else sum(self.lengths)

    def sequence(self, length: int) -> Case:
        """One sequence of so many keys by itself, packed or in a cache: a dense case with a batch of 1."""
        asks, q_len = self.features.copy(), length if self.cache is None else self.q_len
        for name in ("lengths", "cache", "page_size"):
            asks.pop(name, None)  # type: ignore[misc]
        return replace(self, batch=1, q_len=q_len, kv_len=length, features=asks)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys lo[i] <= j < hi[i] that query i sees under causal, window and documents: int64 tensors
        [q_len]. A dense mask counts in full: no kernel can leave out single pairs."""
        if self.sequences is not None:
            raise ValueError(f"{self.name} has sequences, each with intervals of its own: ask sequence()")
        causal, (left, right) = self.features.get("causal"), self.features.get("window", (None, None))
        position = torch.arange(self.q_len) + shift(self.q_len, self.kv_len, causal or "bottom_right")
        lo, hi = torch.zeros_like(position), torch.full_like(position, self.kv_len)
        if left is not None:
            lo = torch.maximum(lo, position - left)
        if right is not None:
            hi = torch.minimum(hi, position + right + 1)
        if causal is not None:
            hi = torch.minimum(hi, position + 1)
        if "documents" in self.features:
            first, stop = self.document_bounds()
            lo, hi = torch.maximum(lo, first), torch.minimum(hi, stop)
        return lo, torch.maximum(lo, hi)

    def document_ids(self) -> torch.Tensor:
        """Which document each position belongs to, int64 [q_len]; q_len = kv_len."""
        return torch.arange(self.q_len) * self.features["documents"] // self.q_len

    def document_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first key of each position's document and the key after its last, int64 [q_len] each."""
        ids = self.document_ids()
        return torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)

    def pairs(self) -> int:
        """How many pairs of query and key count, per batch element and head."""
        lo, hi = self.intervals()
        return int((hi - lo).sum())

    def all_pairs(self) -> int:
        """How many pairs count in all sequences, per head: of packed ones, and of those in a cache, as many
        as each has by itself."""
        if self.sequences is None:
            return self.batch * self.pairs()
        return sum(count * self.sequence(length).pairs() for length, count in Counter(self.sequences).items())

    def flops(self, pass_: Pass = "forward") -> int:
        """Multiplications and additions of the matmuls over the pairs that count.

        Forward, two matmuls: S = QKᵀ and O = PV. Backward, five: S again, dP = dO Vᵀ, dV = Pᵀ dO, dQ = dS K
        and dK = dSᵀ Q, which is 2.5 times the forward where value_dim = head_dim. As in the papers, softmax
        and recomputation beyond S do not count.

        Forward mode, six: S and O, and their tangents tQ Kᵀ + Q tKᵀ and tP V + P tV. Double backward,
        twelve: S, dP, these tangents, dO tVᵀ, tPᵀ dO, tdS K + dS tK and tdSᵀ Q + dSᵀ tQ.
        """
        per_pair = {
            "forward": self.head_dim + self.value_dim,
            "backward": 3 * self.head_dim + 2 * self.value_dim,
            "forward mode": 3 * self.head_dim + 3 * self.value_dim,
            "double backward": 7 * self.head_dim + 5 * self.value_dim,
        }
        return 2 * self.q_heads * self.all_pairs() * per_pair[pass_]

    def bytes(self) -> int:
        """The least memory traffic of the forward: each of q, the keys and values that some query sees, the
        bias, the mask, the table, the slopes and the sink read once (all but the mask in ``dtype``), out
        written once."""
        rows = self.q_heads * self.tokens + self.kv_heads * self.keys_seen()
        extra = 0.0
        if "bias" in self.features:
            b, h, i, j = self.features["bias"]
            extra += b * h * i * j
        if self.features.get("bool_mask"):
            extra += self.q_len * self.kv_len / self.torch_dtype.itemsize  # one byte each
        if "relative_position" in self.features:
            extra += self.q_heads * self.features["relative_position"][0]
        per_head = (self.features.get(name, False) for name in ("sink", "temperature", "alibi"))
        extra += self.q_heads * sum(bool(used) for used in per_head)
        return round((rows * (self.head_dim + self.value_dim) + extra) * self.torch_dtype.itemsize)

    def keys_seen(self) -> int:
        """How many keys some query sees, in all sequences."""
        if self.sequences is not None:
            counts = Counter(self.sequences).items()
            return sum(count * self.sequence(length).keys_seen() for length, count in counts)
        lo, hi = self.intervals()
        sees = lo < hi
        # Neighbouring rows' intervals overlap or touch, so the keys seen by any row are one interval.
        return self.batch * int(hi[sees].max() - lo[sees].min()) if bool(sees.any()) else 0


def make_case(
    name: str, provenance: str, phase: Phase, *, batch: int = 1, heads: int | tuple[int, int],
    length: int | tuple[int, int], head_dim: int, value_dim: int | None = None, dtype: str = "bfloat16",
    **features: Unpack[Features],
) -> Case:  # fmt: skip
    """A case whose heads are (q_heads, kv_heads) or both, and likewise its lengths."""
    q_heads, kv_heads = (heads, heads) if isinstance(heads, int) else heads
    q_len, kv_len = (length, length) if isinstance(length, int) else length
    return Case(
        name=name, batch=batch, q_heads=q_heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len,
        head_dim=head_dim, value_dim=head_dim if value_dim is None else value_dim, dtype=dtype, phase=phase,
        provenance=provenance, features=features,
    )  # fmt: skip
