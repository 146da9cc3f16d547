"""Cases of sequences: packed one behind the other, and with keys and values in a cache.

``PACKED_CASES`` have dense cases of the same sizes beside them; ``CACHED_CASES`` caches in pages beside
contiguous ones.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from .case import Case, Features, Phase, make_case

if TYPE_CHECKING:
    from typing_extensions import Unpack

LLAMA_8B = "Llama 3 8B: 32 query and 8 key/value heads of 128, context 8192 (arXiv 2407.21783, table 3)"


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
            make_case(f"packed-{model}-{kind}", f"{provenance}; {words}", "training", batch=batch,
                      heads=heads, length=max(lengths or (2048,)), head_dim=head_dim, **asks)
        )  # fmt: skip
    return found


_MIXED = (
    "short and long mixed as in instruction tuning without padding (arXiv 2407.09105): quantiles of a "
    "log-normal distribution, of no particular data set"
)
_ALL = ("equal", "dense", "mixed")

PACKED_CASES: tuple[Case, ...] = (
    *_packed("llama3-8b", LLAMA_8B, (32, 8), 128, _ALL, causal="bottom_right"),
    *_packed("llama2-7b", "Llama 2 7B: 32 heads of 128, context 4096 (arXiv 2307.09288; config.json)", 32,
             128, _ALL, causal="bottom_right"),
    *_packed("llama3.2-1b", "Llama 3.2 1B: 32 query and 8 key/value heads of 64 (config.json)", (32, 8), 64,
             _ALL, causal="bottom_right"),
    *_packed("modernbert-base", "ModernBERT-base, a global layer: 12 heads of 64, context 8192, no padding "
             "(arXiv 2412.13663; config.json)", 12, 64, ("mixed",)),
)  # fmt: skip

# ---- Keys and values in a cache

_NARROW = "32 query and 4 key/value heads of 128, as Qwen3-30B-A3B has (arXiv 2505.09388; config.json)"
_LLAMA_31_8B = "Llama 3.1 8B: the sizes of Llama 3 8B, context 131072 (arXiv 2407.21783, section 3.4.2)"


def _cached(
    name: str, provenance: str, heads: tuple[int, int], cache: tuple[int, ...], q_len: int = 1
) -> list[Case]:
    """Contiguous, and in pages of 64 and of 16 rows."""
    phase: Phase = "decode" if q_len == 1 else "prefill"
    found = []
    for kind, page_size in (("", None), ("-pages64", 64), ("-pages16", 16)):
        asks: Features = {"cache": cache}
        if q_len > 1:  # one query sees all keys that there are
            asks["causal"] = "bottom_right"
        if page_size is not None:
            asks["page_size"] = page_size
        found.append(
            make_case(f"cached-{name}{kind}", provenance, phase, batch=len(cache), heads=heads,
                      length=(q_len, max(cache)), head_dim=128, **asks)
        )  # fmt: skip
    return found


CACHED_CASES: tuple[Case, ...] = (
    *_cached("llama3-8b-decode-32x4k", LLAMA_8B, (32, 8), (4096,) * 32),
    *_cached("llama3-8b-decode-8x32k", _LLAMA_31_8B, (32, 8), (32768,) * 8),
    *_cached("llama3-8b-decode-mixed", f"{_LLAMA_31_8B}; 128k rows in all, {_MIXED}", (32, 8),
             long_tailed(131072, 32, sigma=0.6)),
    *(case for size in (1, 4, 32, 128)
      for case in _cached(f"narrow-decode-1x{size}k", _NARROW, (32, 4), (size * 1024,))),
    *_cached("llama3-8b-drafts-32x4k", f"{LLAMA_8B}; 4 drafted tokens are verified at once", (32, 8),
             (4096,) * 32, q_len=4),
    *_cached("llama3-8b-chunk-1x8k", f"{LLAMA_8B}; a chunk of 512 rows at the end of a prompt", (32, 8),
             (8192,), q_len=512),
)  # fmt: skip
