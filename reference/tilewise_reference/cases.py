"""Attention as real models run it: named shapes with their provenance, for tests, benchmarks and tuning.

``CASES`` lists models; ``paper_grid`` generates the grid on which FlashAttention's papers report speed;
``FEATURE_CASES`` are rows of it with one feature each, ``SHORT_CASES`` are shorter than it. ``PACKED_CASES``
pack sequences one behind the other, beside dense cases of the same sizes.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, TypedDict

import torch

from .attention import Similarity
from .positions import Align, shift

if TYPE_CHECKING:
    from typing_extensions import Unpack

Phase = Literal["prefill", "decode", "training", "encoder"]


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


@dataclass(frozen=True)
class Case:
    """One attention call: q [batch, q_heads, q_len, head_dim] against k and v [batch, kv_heads, kv_len, ...].

    dtype: the name of a torch dtype. phase: what the model is doing. provenance: the model and the source of
    the numbers. A window without ``causal`` puts the queries at the end of the keys (``"bottom_right"``).

    With ``lengths`` the sequences are packed, q [tokens, q_heads, head_dim]: batch is their number, and q_len
    and kv_len are the length of the longest.
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
        lengths = self.lengths
        if lengths is None:
            return
        longest = max(lengths, default=0)
        if min(lengths, default=0) < 1 or (self.batch, self.q_len, self.kv_len) != (
            len(lengths), longest, longest,
        ):  # fmt: skip
            raise ValueError(
                f"{self.name}: {lengths=} must be 1 or more each, as many as batch={self.batch}, the longest "
                f"as long as q_len={self.q_len} and kv_len={self.kv_len}"
            )

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Of packed sequences; None where the tensors are dense."""
        return self.features.get("lengths")

    @property
    def tokens(self) -> int:
        """Queries of all sequences."""
        return self.batch * self.q_len if self.lengths is None else sum(self.lengths)

    def sequence(self, length: int) -> Case:
        """One packed sequence by itself: a dense case with a batch of 1."""
        asks = self.features.copy()
        del asks["lengths"]
        return replace(self, batch=1, q_len=length, kv_len=length, features=asks)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys lo[i] <= j < hi[i] that query i sees under causal, window and documents: int64 tensors
        [q_len]. A dense mask counts in full: no kernel can leave out single pairs."""
        if self.lengths is not None:
            raise ValueError(f"{self.name} packs sequences, each with intervals of its own: ask sequence()")
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
        """How many pairs count in all sequences, per head: of packed ones as many as each has by itself."""
        if self.lengths is None:
            return self.batch * self.pairs()
        return sum(count * self.sequence(length).pairs() for length, count in Counter(self.lengths).items())

    def flops(self, pass_: Literal["forward", "backward"] = "forward") -> int:
        """Multiplications and additions of the matmuls over the pairs that count.

        Forward, two matmuls: S = QKᵀ and O = PV. Backward, five: S again, dP = dO Vᵀ, dV = Pᵀ dO, dQ = dS K
        and dK = dSᵀ Q, which is 2.5 times the forward where value_dim = head_dim. As in the papers, softmax
        and recomputation beyond S do not count.
        """
        per_pair = {
            "forward": self.head_dim + self.value_dim,
            "backward": 3 * self.head_dim + 2 * self.value_dim,
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
        if self.lengths is not None:
            counts = Counter(self.lengths).items()
            return sum(count * self.sequence(length).keys_seen() for length, count in counts)
        lo, hi = self.intervals()
        sees = lo < hi
        # Neighbouring rows' intervals overlap or touch, so the keys seen by any row are one interval.
        return self.batch * int(hi[sees].max() - lo[sees].min()) if bool(sees.any()) else 0


def paper_grid(
    head_dims: tuple[int, ...] = (64, 128, 256),
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384),
    dtype: str = "float16",
) -> Iterator[Case]:
    """Full and causal self-attention with 16k tokens a batch and heads x head_dim = 2048."""
    for head_dim in head_dims:
        for causal in (False, True):
            for length in lengths:
                heads = 2048 // head_dim
                yield Case(
                    name=f"paper-d{head_dim}-{'causal' if causal else 'full'}-{length}",
                    batch=16384 // length, q_heads=heads, kv_heads=heads, q_len=length, kv_len=length,
                    head_dim=head_dim, value_dim=head_dim, dtype=dtype, phase="training",
                    provenance="FlashAttention-2 (arXiv 2307.08691), section 4.1; head_dim 256 as in "
                    "FlashAttention-3 (arXiv 2407.08608)",
                    features={"causal": "bottom_right"} if causal else {},
                )  # fmt: skip


def _case(
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


_LLAMA_8B = "Llama 3 8B: 32 query and 8 key/value heads of 128, context 8192 (arXiv 2407.21783, table 3)"
_LLAMA_70B = "Llama 3 70B: 64 query and 8 key/value heads of 128, context 8192 (arXiv 2407.21783, table 3)"
_QWEN3_8B = "Qwen3-8B: 32 query and 8 key/value heads of 128, context 32768 (arXiv 2505.09388; config.json)"
_QWEN3_06B = "Qwen3-0.6B: 16 query and 8 key/value heads of 128 (arXiv 2505.09388; config.json)"
_GEMMA2_2B = "Gemma 2 2B: 8 query and 4 key/value heads of 256, softcap 50, context 8192 (config.json)"
_GEMMA2_27B = "Gemma 2 27B: 32 query and 16 key/value heads of 128, query_pre_attn_scalar 144 (config.json)"
_GPT_OSS = "gpt-oss-20b: 64 query and 8 key/value heads of 64, a sink per head, window 128 (config.json)"
_DEEPSEEK = "DeepSeek-V3: 128 heads, keys of 128 + 64 (rotary), values of 128 (arXiv 2412.19437, 4.2)"

CASES: tuple[Case, ...] = (
    _case("llama3-8b-prefill", _LLAMA_8B, "prefill", heads=(32, 8), length=8192, head_dim=128,
          causal="bottom_right"),
    _case("llama3-8b-decode", _LLAMA_8B, "decode", batch=16, heads=(32, 8), length=(1, 8192), head_dim=128,
          causal="bottom_right"),
    _case("llama3-8b-training", _LLAMA_8B, "training", batch=2, heads=(32, 8), length=8192, head_dim=128,
          causal="bottom_right"),
    _case("llama3-70b-prefill", _LLAMA_70B, "prefill", heads=(64, 8), length=8192, head_dim=128,
          causal="bottom_right"),
    _case("llama3-70b-chunk", _LLAMA_70B + "; a chunk of 512 after a cache", "prefill", heads=(64, 8),
          length=(512, 8192), head_dim=128, causal="bottom_right"),
    _case("llama3-70b-decode", _LLAMA_70B, "decode", batch=16, heads=(64, 8), length=(1, 8192), head_dim=128,
          causal="bottom_right"),
    _case("qwen3-8b-prefill", _QWEN3_8B, "prefill", heads=(32, 8), length=32768, head_dim=128,
          causal="bottom_right"),
    _case("qwen3-0.6b-prefill", _QWEN3_06B, "prefill", heads=(16, 8), length=4096, head_dim=128,
          causal="bottom_right"),
    _case("gemma2-2b-global", _GEMMA2_2B, "prefill", heads=(8, 4), length=8192, head_dim=256,
          causal="bottom_right", softcap=50.0),
    # The models' window counts the query's own position: 4096 keys are 4095 to its left and itself.
    _case("gemma2-2b-local", _GEMMA2_2B + ", window 4096", "prefill", heads=(8, 4), length=8192, head_dim=256,
          causal="bottom_right", window=(4095, 0), softcap=50.0),
    _case("gemma2-27b-local", _GEMMA2_27B, "prefill", heads=(32, 16), length=8192, head_dim=128,
          causal="bottom_right", window=(4095, 0), softcap=50.0, scale=1 / 12),
    _case("gpt-oss-20b-local", _GPT_OSS, "prefill", heads=(64, 8), length=8192, head_dim=64,
          causal="bottom_right", window=(127, 0), sink=True),
    _case("gpt-oss-20b-global", _GPT_OSS, "prefill", heads=(64, 8), length=8192, head_dim=64,
          causal="bottom_right", sink=True),
    _case("gpt-oss-20b-local-decode", _GPT_OSS, "decode", batch=16, heads=(64, 8), length=(1, 8192),
          head_dim=64, causal="bottom_right", window=(127, 0), sink=True),
    _case("deepseek-v3-prefill", _DEEPSEEK, "prefill", heads=128, length=4096, head_dim=192, value_dim=128,
          causal="bottom_right"),
    _case("falcon-7b-prefill", "Falcon-7B: 71 query heads of 64 on one key/value head, context 2048 "
          "(arXiv 2311.16867; config.json)", "prefill", heads=(71, 1), length=2048, head_dim=64,
          causal="bottom_right"),
    _case("bloom-7b1-training", "BLOOM-7B1: 32 heads of 128, ALiBi, context 2048 (arXiv 2211.05100; "
          "config.json)", "training", batch=8, heads=32, length=2048, head_dim=128,
          causal="bottom_right", alibi=True),
    _case("minilm-l6-encoder", "all-MiniLM-L6-v2: 12 heads of 32, up to 256 tokens (config.json, "
          "sentence_bert_config.json)", "encoder", batch=32, heads=12, length=256, head_dim=32,
          dtype="float32"),
    _case("vit-l16-encoder", "ViT-L/16: 16 heads of 64; (224 / 16)² patches and the class token "
          "(arXiv 2010.11929, table 1)", "encoder", batch=64, heads=16, length=197, head_dim=64),
    _case("swinv2-b-window16", "Swin-v2-B at 256 x 256, first stage: 16 windows of 16 x 16 an image (8 "
          "images), 4 heads of 32, scaled cosine with a position bias (arXiv 2111.09883, section 3)",
          "encoder", batch=128, heads=4, length=256, head_dim=32, dtype="float16", similarity="cosine",
          temperature=True, bias=(1, 4, 256, 256)),
    _case("t5-base-encoder", "T5-base: 12 heads of 64, 32 relative buckets up to 128, no scale, 512 tokens "
          "(arXiv 1910.10683; config.json)", "encoder", batch=32, heads=12, length=512, head_dim=64,
          similarity="dot", relative_position=(32, 128, True)),
    _case("t5-base-decoder", "T5-base, the decoder's self-attention (arXiv 1910.10683; config.json)",
          "training", batch=32, heads=12, length=512, head_dim=64, causal="bottom_right", similarity="dot",
          relative_position=(32, 128, False)),
    _case("whisper-large-cross", "Whisper large: 20 heads of 64, up to 448 tokens against 1500 audio frames "
          "(arXiv 2212.04356, table 1; config.json)", "training", batch=8, heads=20, length=(448, 1500),
          head_dim=64, dtype="float16"),
    _case("dit-xl2-training", "DiT-XL/2 at 256 x 256: 16 heads of 72 on 16 x 16 patches of the latent image "
          "(arXiv 2212.09748, table 1)", "training", batch=256, heads=16, length=256, head_dim=72),
    _case("flux1-encoder", "FLUX.1 at 1024 x 1024: 24 heads of 128 on 64 x 64 patches and 512 text tokens "
          "(transformer/config.json)", "encoder", heads=24, length=4608, head_dim=128),
    _case("alphafold2-triangle", "AlphaFold 2, triangle attention on a crop of 256 residues: its rows are a "
          "batch and share a bias per head, 4 heads of 32 (Jumper et al. 2021, supplement, algorithm 13)",
          "training", batch=256, heads=4, length=256, head_dim=32, bias=(1, 4, 256, 256)),
    _case("beginner-article", "The usual first example of self-attention: an input [10, 512], projected to "
          "256 by three linear layers, one head", "encoder", heads=1, length=10, head_dim=256,
          dtype="float32"),
)  # fmt: skip

_FEATURE = "the papers' grid at 4096 tokens and head_dim 128, with one feature that many fast paths leave out"


def _feature_case(name: str, heads: int | tuple[int, int] = 16, **features: Unpack[Features]) -> Case:
    return _case(f"feature-{name}", _FEATURE, "training", batch=4, heads=heads, length=4096, head_dim=128,
                 **features)  # fmt: skip


FEATURE_CASES: tuple[Case, ...] = (
    _feature_case("bool-mask", bool_mask=True),
    _feature_case("bool-mask-grouped", heads=(16, 4), bool_mask=True),
    _feature_case("bias-gradient", bias=(1, 16, 4096, 4096), trained=True),
    _feature_case("documents", causal="bottom_right", documents=8),
    _feature_case("window", causal="bottom_right", window=(511, 0)),
    _feature_case("softcap", causal="bottom_right", softcap=50.0),
    _feature_case("sink", causal="bottom_right", sink=True, trained=True),
    _feature_case("alibi", causal="bottom_right", alibi=True),
    _feature_case("dropout", causal="bottom_right", dropout=0.1),
)

_SHORT = "a short sequence of the papers' width: heads x head_dim = 2048, 16k tokens a batch"

SHORT_CASES: tuple[Case, ...] = tuple(
    _case(f"short-d{head_dim}-{length}", _SHORT, "encoder", batch=16384 // length, heads=2048 // head_dim,
          length=length, head_dim=head_dim)
    for head_dim in (64, 128) for length in (64, 128, 256)
)  # fmt: skip

# ---- Packed sequences


def long_tailed(tokens: int, count: int, sigma: float = 1.2) -> tuple[int, ...]:
    """So many lengths, `tokens` together: quantiles of a log-normal distribution, short and long mixed."""
    normal = NormalDist()
    sizes = [math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [max(1, round(tokens * size / sum(sizes))) for size in sizes]
    lengths[-1] += tokens - sum(lengths)
    step = next(step for step in range(int(0.62 * count), count) if math.gcd(step, count) == 1)
    return tuple(lengths[i * step % count] for i in range(count))


def _packed(
    model: str, provenance: str, heads: int | tuple[int, int], head_dim: int, kinds: tuple[str, ...],
    **features: Unpack[Features],
) -> list[Case]:  # fmt: skip
    """Of these kinds: "equal", 16k tokens in sequences of 2048; "dense", the same batch without packing;
    "mixed", 32k tokens in long-tailed lengths."""
    mixed = long_tailed(32768, 64)
    of_kind: dict[str, tuple[int, str, tuple[int, ...] | None]] = {
        "equal": (8, "a training batch of 16k tokens, packed in equal lengths", (2048,) * 8),
        "dense": (8, "the batch of equal lengths as dense tensors", None),
        "mixed": (64, f"a packed training batch of 32k tokens, {_MIXED}", mixed),
    }
    found = []
    for kind in kinds:
        batch, words, lengths = of_kind[kind]
        asks = features.copy()
        if lengths is not None:
            asks["lengths"] = lengths
        found.append(
            _case(f"packed-{model}-{kind}", f"{provenance}; {words}", "training", batch=batch, heads=heads,
                  length=max(lengths or (2048,)), head_dim=head_dim, **asks)
        )  # fmt: skip
    return found


_MIXED = (
    "short and long mixed as in instruction tuning without padding (arXiv 2407.09105): quantiles of a "
    "log-normal distribution, of no particular data set"
)
_ALL = ("equal", "dense", "mixed")

PACKED_CASES: tuple[Case, ...] = (
    *_packed("llama3-8b", _LLAMA_8B, (32, 8), 128, _ALL, causal="bottom_right"),
    *_packed("llama2-7b", "Llama 2 7B: 32 heads of 128, context 4096 (arXiv 2307.09288; config.json)", 32,
             128, _ALL, causal="bottom_right"),
    *_packed("llama3.2-1b", "Llama 3.2 1B: 32 query and 8 key/value heads of 64 (config.json)", (32, 8), 64,
             _ALL, causal="bottom_right"),
    *_packed("modernbert-base", "ModernBERT-base, a global layer: 12 heads of 64, context 8192, no padding "
             "(arXiv 2412.13663; config.json)", 12, 64, ("mixed",)),
)  # fmt: skip


def named_cases(grid_dtype: str = "float16") -> dict[str, Case]:
    """Every case there is, by name; those of the papers' grid in this dtype."""
    every = (*CASES, *FEATURE_CASES, *SHORT_CASES, *PACKED_CASES, *paper_grid(dtype=grid_dtype))
    return {case.name: case for case in every}


def find_case(name: str, grid_dtype: str = "float16") -> Case:
    """The case of this name. Raises ValueError where there is none, with the nearest names."""
    cases = named_cases(grid_dtype)
    if name not in cases:
        alike = [each for each in cases if name.lower() in each.lower()]
        near = alike[:5] or difflib.get_close_matches(name, cases, n=5, cutoff=0.3) or [*cases][:5]
        raise ValueError(
            f"case {name!r} is not a named case; near it are {', '.join(near)}; `tilewise explain --list` "
            "shows all"
        )
    return cases[name]
