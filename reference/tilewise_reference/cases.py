"""Attention as real models run it: named shapes with their provenance, for tests, benchmarks and tuning.

``CASES`` lists models; ``paper_grid`` generates the grid on which FlashAttention's papers report speed;
``FEATURE_CASES`` are rows of it with one feature each, ``SHORT_CASES`` are shorter than it, ``LONG_CASES``
are for several GPUs. ``PACKED_CASES`` pack sequences one behind the other, ``CACHED_CASES`` read a cache:
cases_rows.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .case import Case, Features, Phase
from .case import make_case as _case
from .cases_rows import CACHED_CASES, LLAMA_8B, PACKED_CASES, long_tailed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "CACHED_CASES",
    "CASES",
    "FEATURE_CASES",
    "LONG_CASES",
    "PACKED_CASES",
    "SHORT_CASES",
    "Case",
    "Features",
    "Phase",
    "find_case",
    "long_tailed",
    "named_cases",
    "paper_grid",
]


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


_LLAMA_70B = "Llama 3 70B: 64 query and 8 key/value heads of 128, context 8192 (arXiv 2407.21783, table 3)"
_QWEN3_8B = "Qwen3-8B: 32 query and 8 key/value heads of 128, context 32768 (arXiv 2505.09388; config.json)"
_QWEN3_06B = "Qwen3-0.6B: 16 query and 8 key/value heads of 128 (arXiv 2505.09388; config.json)"
_GEMMA2_2B = "Gemma 2 2B: 8 query and 4 key/value heads of 256, softcap 50, context 8192 (config.json)"
_GEMMA2_27B = "Gemma 2 27B: 32 query and 16 key/value heads of 128, query_pre_attn_scalar 144 (config.json)"
_GPT_OSS = "gpt-oss-20b: 64 query and 8 key/value heads of 64, a sink per head, window 128 (config.json)"
_DEEPSEEK = "DeepSeek-V3: 128 heads, keys of 128 + 64 (rotary), values of 128 (arXiv 2412.19437, 4.2)"

CASES: tuple[Case, ...] = (
    _case("llama3-8b-prefill", LLAMA_8B, "prefill", heads=(32, 8), length=8192, head_dim=128,
          causal="bottom_right"),
    _case("llama3-8b-decode", LLAMA_8B, "decode", batch=16, heads=(32, 8), length=(1, 8192), head_dim=128,
          causal="bottom_right"),
    _case("llama3-8b-training", LLAMA_8B, "training", batch=2, heads=(32, 8), length=8192, head_dim=128,
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

LONG_CASES: tuple[Case, ...] = (
    _case("llama3-70b-prefill-128k", "Llama 3.1 70B: 64 query and 8 key/value heads of 128 (arXiv "
          "2407.21783, table 3), context 131072 (section 3.4.2; config.json)", "prefill", heads=(64, 8),
          length=131072, head_dim=128, causal="bottom_right"),
)  # fmt: skip


def named_cases(grid_dtype: str = "float16") -> dict[str, Case]:
    """Every case there is, by name; those of the papers' grid in this dtype."""
    every = (
        *CASES,
        *FEATURE_CASES,
        *SHORT_CASES,
        *LONG_CASES,
        *PACKED_CASES,
        *CACHED_CASES,
        *paper_grid(dtype=grid_dtype),
    )
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
