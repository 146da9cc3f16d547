"""What other libraries call an argument: names that `attention` does not have, and what to give instead.

From torch.nn.functional.scaled_dot_product_attention, torch.nn.MultiheadAttention, FlexAttention,
flash-attn, xformers, JAX, transformers and Triton's tutorial.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from inspect import signature

from .request import make_request

CAUSAL = (
    "give mask=tilewise.Causal(), the last query at the last key (the first at the first, as PyTorch's "
    "is_causal: Causal('top_left'))"
)
TRUE_COUNTS = (
    "give mask=, a bool tensor, True where the pair counts, or bias=, a tensor that is added to scores"
)
PADDED = (
    "give mask=tilewise.Padding(lengths), or mask=keep[:, None, None, :] with keep [batch, kv_len] True at "
    "real keys"
)
WINDOW = "give mask=tilewise.Window(left, right), None for no limit; `&` combines it with tilewise.Causal()"
PACKED = (
    "call tilewise.packed_attention(q, k, v, q_offsets=..., kv_offsets=...), with q, k and v [tokens, heads, "
    "dim], or tilewise.compat.flash_attn_varlen_func, which has FlashAttention's names"
)
LONGEST = "leave it out: tilewise.packed_attention(q, k, v, q_offsets=...) does not need the longest length"
IDS = (
    "give mask=tilewise.Documents(ids), an id a token; of offsets, call tilewise.packed_attention(q, k, v, "
    "q_offsets=...)"
)
DROPPED = "give dropout_p=, and 0.0 where nothing is to be dropped"
SEED = "give dropout_seed=, a tensor of one int64 on q's device"
WEIGHTS = (
    "give return_stats=tilewise.Stats(rows=...) for those of chosen rows: the whole matrix is never stored"
)
SCALE = "give scale="
CAP = "give score=tilewise.Softcap(cap)"
ALIBI = "give score=tilewise.ALiBi(slopes)"
MODIFIER = (
    "give score=, a modifier of tilewise or a @triton.jit function score(s, batch, head, q_idx, kv_idx, args)"
)
RULE = "give mask=, a mask of tilewise or a @triton.jit function keep(q_idx, kv_idx, batch, head, args)"
GROUPED = "leave it out: fewer heads in k and v than in q are grouped by themselves"
LAYOUT = (
    "leave it out: q, k and v are [batch, heads, length, dim], in any memory order; transpose(1, 2) is free"
)
IMPL = "give impl=, one of 'portable', 'hopper' and 'torch', or leave it out"
LSE = "give return_lse=True"
SCALES = "give scales=tilewise.Scales(q, k, v), which tilewise.quantize(q, k, v) makes with the numbers"
SINK = "give sink=, a logit a head"
CACHED = (
    "call tilewise.cached_attention(q, cache_k, cache_v, kv_lens=..., pages=...), or "
    "tilewise.compat.flash_attn_with_kvcache, which has FlashAttention's names"
)

ELSEWHERE = {
    "is_causal": CAUSAL, "causal": CAUSAL, "use_causal_mask": CAUSAL, "causal_mask": CAUSAL,
    "attn_mask": TRUE_COUNTS, "attention_mask": TRUE_COUNTS, "mask_type": TRUE_COUNTS,
    "key_padding_mask": PADDED, "src_key_padding_mask": PADDED, "padding_mask": PADDED, "lengths": PADDED,
    "kv_lens": PADDED, "seqlens": PADDED, "seq_lens": PADDED, "seqlens_k": PADDED, "cache_seqlens": PADDED,
    "seqused_k": PADDED, "key_value_seq_lengths": PADDED, "query_seq_lengths": PADDED,
    "window_size": WINDOW, "window": WINDOW, "sliding_window": WINDOW, "local_window_size": WINDOW,
    "window_left": WINDOW,
    "cu_seqlens": PACKED, "cu_seqlens_q": PACKED, "cu_seqlens_k": PACKED, "cu_seq_q": PACKED,
    "cu_seq_k": PACKED, "max_seqlen": LONGEST, "max_seqlen_q": LONGEST, "max_seqlen_k": LONGEST,
    "document_ids": IDS, "segment_ids": IDS,
    "block_mask": RULE, "mask_mod": RULE,
    "score_mod": MODIFIER,
    "dropout": DROPPED, "dropout_rate": DROPPED, "p": DROPPED, "training": DROPPED, "inference": DROPPED,
    "seed": SEED, "generator": SEED, "dropout_key": SEED, "rng_state": SEED,
    "softmax_scale": SCALE, "sm_scale": SCALE, "scaling": SCALE, "scale_factor": SCALE,
    "temperature": "give similarity=tilewise.Cosine(temperature) for cosine similarity, else scale=",
    "softcap": CAP, "soft_cap": CAP, "logits_soft_cap": CAP, "logit_cap": CAP,
    "alibi": ALIBI, "alibi_slopes": ALIBI,
    "attn_bias": "give bias=, a tensor that is added to scores, or a structured mask=",
    "attention_bias": "give bias=", "position_bias": "give bias=, or score=tilewise.RelativePosition(table)",
    "enable_gqa": GROUPED, "num_kv_heads": GROUPED, "pack_gqa": GROUPED, "n_rep": GROUPED,
    "need_weights": WEIGHTS, "average_attn_weights": WEIGHTS, "return_attn_probs": WEIGHTS,
    "return_weights": WEIGHTS, "return_attention": WEIGHTS, "output_attentions": WEIGHTS,
    "return_softmax": WEIGHTS,
    "return_logsumexp": LSE, "return_softmax_lse": LSE, "return_residual": LSE,
    "sinks": SINK, "learnable_sink": SINK, "s_aux": SINK, "attention_sink": SINK,
    "q_descale": SCALES, "k_descale": SCALES, "v_descale": SCALES, "descale_q": SCALES, "descale_k": SCALES,
    "descale_v": SCALES, "q_scale": SCALES, "k_scale": SCALES, "v_scale": SCALES,
    "layout": LAYOUT, "tensor_layout": LAYOUT, "qkv_format": LAYOUT, "batch_first": LAYOUT,
    "backend": IMPL, "implementation": IMPL, "op": IMPL, "attn_implementation": IMPL,
    "block_table": CACHED, "page_table": CACHED, "k_cache": CACHED, "v_cache": CACHED,
    "query": "the tensors are called q, k and v", "key": "the tensors are called q, k and v",
    "value": "the tensors are called q, k and v",
    "kernel_options": "leave it out; tilewise.tiles.use(tilewise.tiles.Tile(...)) chooses tiles by hand",
}  # fmt: skip

# Every argument of `attention` besides q, k and v.
ARGUMENTS = [
    name for name in signature(make_request).parameters if name not in ("q", "k", "v", "packing", "cache")
]
RETURNED = ("return_lse", "return_stats")
ARGUMENTS[ARGUMENTS.index("impl") : ARGUMENTS.index("impl")] = RETURNED
OFFSETS = ("q_offsets", "kv_offsets")
PACKED_ARGUMENTS = (*OFFSETS, *ARGUMENTS)  # of `packed_attention`
CACHE = ("kv_lens", "pages", "q_offsets", "split_size")  # of `cached_attention`, that a request has
NEW = ("new_k", "new_v", "rotary")  # that it writes into the cache first
# A cache has no backward, whose order of sums it would be about.
CACHED_ARGUMENTS = (*CACHE, *NEW, *(name for name in ARGUMENTS if name != "deterministic"))


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str] = ARGUMENTS) -> None:
    """Raise TypeError where there are such names."""
    if found := unknown_names(function, given, known):
        raise TypeError("; ".join(found))


def unknown_names(function: str, given: Iterable[str], known: Iterable[str] = ARGUMENTS) -> list[str]:
    """For every name that `function` does not have, that it has none and what to give instead."""
    known = list(known)
    return [f"{function}() has no {name}=: {instead(name, known)}" for name in given if name not in known]


def instead(name: str, known: list[str]) -> str:
    """What another library's name is here, as far as `known` has it; else the nearest of what is taken."""
    remedy = ELSEWHERE.get(name.lower(), "")
    wanted = re.match(r"give (\w+)=", remedy)
    if remedy and (wanted is None or wanted[1] in known):
        return remedy
    near = difflib.get_close_matches(name.lower(), known, 1, 0.6)
    takes = f"it takes {', '.join(known)}"
    return f"did you mean {near[0]}=? {takes}" if near else takes
