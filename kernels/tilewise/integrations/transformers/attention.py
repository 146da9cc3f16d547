"""The attention function of "tilewise" in Transformers."""

from __future__ import annotations

from typing import Any

import torch

from ...api import attention
from ...packed import packed_attention
from ...parts.masks.causal import Causal
from ...parts.masks.dense import Dense
from ...parts.masks.mask import Mask
from ...parts.scores.bias import Bias
from ...parts.scores.score import Score
from ...parts.scores.softcap import Softcap
from ...parts.stats import Stats
from .masks import ModelMask
from .rows import is_asked, rows_for

Tensor = torch.Tensor
# What models hand through to every attention function and no weight depends on: what they have done with it
# already, and what is for others.
WITHOUT_EFFECT = {
    "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch", "logits_to_keep", "seq_idx", "max_length_q",
    "max_length_k",
}  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What AttentionInterface asks for: out [batch, q_len, heads, value_dim], and no weights; but inside
    `attention_rows` those of the rows that it names, [batch, heads, rows, kv_len] in query's dtype.

    query [batch, heads, q_len, head_dim], key and value [batch, kv_heads, kv_len, dim]. attention_mask: what
    `model_mask` made; a tensor that broadcasts to [batch, heads, q_len, kv_len], bool (True = may attend) or
    added to the scores; None: causal as the module or is_causal says, as Transformers' "sdpa" takes it.
    sliding_window is in the mask already. cu_seq_lens_q, cu_seq_lens_k: the offsets of packed sequences, of
    one row of the batch. deterministic: None is True, as in tilewise.

    Raises TypeError for an argument that it does not know, ValueError for what cannot be.
    """
    asked = rows_for(module, query)
    refuse(module, others, output_attentions, is_asked())
    scores: list[Score] = [] if softcap is None else [Softcap(softcap)]
    if position_bias is not None:
        scores.append(Bias(position_bias))
    options: dict[str, Any] = dict(score=scores, scale=scaling, sink=s_aux, dropout_p=dropout)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if deterministic is not None:
        options["deterministic"] = deterministic
    if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(
            f"{sliding_window=} with attention_mask=None: the window is in the mask that Transformers makes "
            "for attn_implementation='tilewise'"
        )
    if cu_seq_lens_q is not None:
        if asked is not None:
            raise ValueError(
                "attention_rows goes with no cu_seq_lens_q: give the sequences as a padded batch"
            )
        if position_bias is not None:
            raise ValueError("position_bias goes with no cu_seq_lens_q: it has no place for packed sequences")
        options |= dict(q_offsets=cu_seq_lens_q, mask=mask_inside(attention_mask, causal))
        q, k, v = rows_of(query, key, value)
        rows: Tensor = packed_attention(q, k, v, kv_offsets=cu_seq_lens_k, **options)
        return rows[None], None
    if isinstance(attention_mask, Tensor) and attention_mask.dtype != torch.bool:
        options["bias"] = attention_mask
    options["mask"] = mask_of(attention_mask, causal, query, key)
    if asked is not None:
        out, found = attention(query, key, value, **options, return_stats=Stats(rows=asked))
        return out.transpose(1, 2), found.weights.to(query.dtype)
    return attention(query, key, value, **options).transpose(1, 2), None


def refuse(
    module: torch.nn.Module, others: dict[str, Any], output_attentions: bool | None, has_rows: bool
) -> None:
    """Raise for what would be ignored."""
    layer = type(module).__name__
    if output_attentions and not has_rows:
        raise ValueError(
            f"{output_attentions=}: tilewise does not store the weights; give attn_implementation='eager', "
            "or ask for rows of layers: with tilewise.integrations.transformers.attention_rows(rows, layers)"
        )
    unknown = [name for name, value in others.items() if name not in WITHOUT_EFFECT and value is not None]
    if unknown:
        raise TypeError(
            f"{layer} gives its attention {', '.join(unknown)}=, which tilewise does not know: give this "
            "model another attn_implementation"
        )


def mask_of(given: ModelMask | Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Mask | None:
    """The mask of a dense call; a tensor that is added to the scores is none."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(given, ModelMask):
        if given.shape[2:] != (q_len, kv_len):
            raise ValueError(
                f"attention_mask was made for {given.shape[2]} queries and {given.shape[3]} keys, and there "
                f"are {q_len} and {kv_len}"
            )
        return given.mask
    if isinstance(given, Tensor):
        if given.dim() != 4:
            raise ValueError(
                f"attention_mask.shape={tuple(given.shape)} must have 4 dimensions, [batch, heads, q_len, "
                "kv_len]: a mask [batch, length] is given to the model, not to its layers"
            )
        return Dense(given) if given.dtype == torch.bool else None
    return Causal("top_left") if causal and q_len > 1 else None


def mask_inside(given: ModelMask | Tensor | None, causal: bool) -> Mask | None:
    """The mask inside each of the sequences that offsets name."""
    if isinstance(given, Tensor) or (isinstance(given, ModelMask) and given.unfit):
        what = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else ", ".join(given.unfit)
        raise ValueError(
            f"cu_seq_lens_q goes with causal masks and windows, and attention_mask has {what}: leave one of "
            "the two away"
        )
    if isinstance(given, ModelMask):
        return given.inside
    return Causal() if causal else None


def rows_of(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """[1, heads, tokens, dim] as [tokens, heads, dim]."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q goes with one row of packed tokens, and the batch has {len(query)}")
    return [x[0].transpose(0, 1) for x in (query, key, value)]
