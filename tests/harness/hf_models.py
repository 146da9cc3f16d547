"""Tiny models of Transformers' real classes, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf

Tensor = torch.Tensor
VOCABULARY = 67
LENGTH = 11
# What the text models have in common.
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
GROUPED = TEXT | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)


def llama() -> Any:
    return hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=12)


def gemma2() -> Any:
    config = hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=8,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM, config


def gemma3() -> Any:
    config = hf.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.Gemma3ForCausalLM, config


def gpt_oss() -> Any:
    config = hf.GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.GptOssForCausalLM, config


def mistral() -> Any:
    return hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=4)


def phi3() -> Any:
    return hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED, sliding_window=None)


def bert() -> Any:
    return hf.BertForMaskedLM, hf.BertConfig(**TEXT)


def modernbert() -> Any:
    config = hf.ModernBertConfig(
        **GROUPED_WITHOUT_KV, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    return hf.ModernBertForMaskedLM, config


GROUPED_WITHOUT_KV = {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration, config


def vit() -> Any:
    return hf.ViTForImageClassification, hf.ViTConfig(**VISION)


def whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=12, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration, config


def clip() -> Any:
    config = hf.CLIPConfig(
        text_config=TEXT | dict(eos_token_id=2, bos_token_id=1, pad_token_id=0), vision_config=VISION, projection_dim=16
    )
    return hf.CLIPModel, config


MODELS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (
    llama, qwen3, gemma2, gemma3, gpt_oss, mistral, phi3, bert, modernbert, t5, vit, whisper, clip)}


def make(name: str, implementation: str, dtype=torch.float32) -> Any:
    cls, config = MODELS[name]()
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=implementation, dtype=dtype) if hasattr(cls, "_from_config") else cls(config)
    return model.eval()
