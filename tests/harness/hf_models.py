"""Tiny models of Transformers' real classes, with random weights, and inputs for them."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import tilewise

hf.logging.set_verbosity_error()
tilewise.integrations.transformers.register()

Tensor = torch.Tensor
Sizes = dict[str, Any]
VOCABULARY, LENGTH, PADDED = 67, 11, 4
TEXT: Sizes = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED: Sizes = dict(**TEXT, num_key_value_heads=2)
SLIDING: Sizes = dict(
    **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
)
VISION: Sizes = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24,
    patch_size=8,
)  # fmt: skip
T5: Sizes = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=16, pad_token_id=0, eos_token_id=2,
)  # fmt: skip
WHISPER: Sizes = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, pad_token_id=0,
    max_source_positions=LENGTH, max_target_positions=64, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip


class Model(NamedTuple):
    """A model's class and configuration by their names in Transformers; of what kind it is; and what its
    attention has, besides a scaled dot product."""

    model: str
    config: str
    sizes: Sizes
    kind: str  # "decoder", "encoder", "encoder and decoder", "vision", "text and vision"
    has: str


MODELS: dict[str, Model] = {
    "Llama": Model("LlamaForCausalLM", "LlamaConfig", GROUPED, "decoder", "grouped heads"),
    "Qwen3": Model("Qwen3ForCausalLM", "Qwen3Config", GROUPED | dict(head_dim=12), "decoder",
                   "grouped heads, normed queries and keys"),
    "Gemma 2": Model("Gemma2ForCausalLM", "Gemma2Config",
                     SLIDING | dict(attn_logit_softcapping=5.0, query_pre_attn_scalar=8), "decoder",
                     "softcap, windows in some layers, its own scale"),
    "Gemma 3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING | dict(query_pre_attn_scalar=8),
                     "decoder", "windows in some layers, normed queries and keys"),
    "gpt-oss": Model("GptOssForCausalLM", "GptOssConfig",
                     SLIDING | dict(num_local_experts=4, num_experts_per_tok=2), "decoder",
                     "sinks, windows in some layers"),
    "Mistral": Model("MistralForCausalLM", "MistralConfig", GROUPED | dict(sliding_window=4), "decoder",
                     "windows in all layers"),
    "Phi-3": Model("Phi3ForCausalLM", "Phi3Config", GROUPED | dict(sliding_window=None), "decoder",
                   "grouped heads"),
    "BERT": Model("BertForMaskedLM", "BertConfig", TEXT, "encoder", ""),
    "ModernBERT": Model("ModernBertForMaskedLM", "ModernBertConfig",
                        TEXT | dict(local_attention=4, cls_token_id=1, sep_token_id=2,
                                    layer_types=["full_attention", "sliding_attention"]), "encoder",
                        "windows to both sides in some layers"),
    "T5": Model("T5ForConditionalGeneration", "T5Config", T5, "encoder and decoder",
                "position bias with its gradient, no scale"),
    "ViT": Model("ViTForImageClassification", "ViTConfig", VISION, "vision", ""),
    "Whisper": Model("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "encoder and decoder",
                     "cross-attention"),
    "CLIP": Model("CLIPModel", "CLIPConfig",
                  dict(text_config=TEXT, vision_config=VISION, projection_dim=16), "text and vision",
                  "causal text"),
}  # fmt: skip
DECODERS = [name for name, model in MODELS.items() if model.kind == "decoder"]
INTERPRETED = ["Gemma 2", "gpt-oss", "ModernBERT", "T5"]  # softcap, sinks, windows to both sides, a bias
GENERATING = [name for name, model in MODELS.items() if "decoder" in model.kind]


def make(name: str, implementation: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model, in evaluation mode: the same weights for every implementation, whatever the dtype."""
    model = MODELS[name]
    config = getattr(hf, model.config)(**model.sizes | changes)
    config._experts_implementation = "eager"  # the others have no float64
    torch.manual_seed(0)
    made = getattr(hf, model.model)._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in made.parameters():  # sinks, biases and norms are not 0 or 1 either
            parameter += 0.05 * torch.randn_like(parameter)
    assert made.config._attn_implementation == implementation
    return made.to(dtype).eval()


class InFloat64(TorchFunctionMode):
    """Inside, whatever asks for float32 gets float64: models of Transformers go through float32 in softmax,
    norms and rotary positions, whatever their dtype, and would be no exact reference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = tree_map(in_double, (args, kwargs or {}))
        return func(*given, **named).double() if func is Tensor.float else func(*given, **named)


def in_double(given: Any) -> Any:
    return torch.float64 if given is torch.float32 else given


def exactly(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """What a model of this dtype runs in: one of float64 computes in it everywhere."""
    return InFloat64() if dtype == torch.float64 else contextlib.nullcontext()


def tokens(rows: int = 2) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def padded(side: str) -> Tensor:
    """attention_mask of two rows, of which the second has padding, on the left, on the right, or on both
    sides with a hole between."""
    real = torch.ones(2, LENGTH, dtype=torch.int64)
    if side == "left":
        real[1, :PADDED] = 0
    elif side == "right":
        real[1, -PADDED:] = 0
    elif side == "torn":
        real[1, [0, 5, 6, LENGTH - 1]] = 0
    return real


def inputs(name: str, side: str = "left") -> dict[str, Tensor]:
    """What the model's forward takes. Decoders are padded on `side`, encoders on the right."""
    kind, noise = MODELS[name].kind, torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, VISION["image_size"], VISION["image_size"], generator=noise)
    if kind == "vision":
        return dict(pixel_values=pixels)
    if name == "Whisper":
        features = torch.randn(2, WHISPER["num_mel_bins"], 2 * LENGTH, generator=noise)
        return dict(input_features=features, decoder_input_ids=tokens())
    given = dict(input_ids=tokens(), attention_mask=padded(side if kind == "decoder" else "right"))
    if kind == "encoder and decoder":
        given["decoder_input_ids"] = tokens()[:, :7]
    if kind == "text and vision":
        given["pixel_values"] = pixels
    return given


def in_dtype(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}


def logits_of(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    """Its logits; of padding, where they mean nothing, 0."""
    dtype = next(model.parameters()).dtype
    with exactly(dtype):
        result = model(**in_dtype(given, dtype), **options)
    logits = result.logits if hasattr(result, "logits") else result.logits_per_text
    real = given.get("attention_mask")
    return logits * real[..., None] if real is not None and real.shape == logits.shape[:2] else logits


def gradients_of(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """The gradient of every trained parameter, for the same gradient of the logits in each dtype."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(logits, list(named.values()), noise.to(logits), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
