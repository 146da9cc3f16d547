"""A tiny Llama that learns a text character by character, with one attention or another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from train_gpt.settings import Settings
from train_gpt.text import Corpus, batch_of
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

IMPLEMENTATIONS = ("tilewise", "eager", "control")


def register_control() -> None:
    """Transformers' "eager" with every result moved at random by up to one rounding: as right as "eager" is,
    and how far its losses drift away is what rounding alone can do."""

    def control(*given: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = eager_attention_forward(*given, **options)
        noise = torch.rand(out.shape, generator=torch.Generator(out.device).manual_seed(0), device=out.device)
        return out * (1 + (2 * noise - 1) * torch.finfo(out.dtype).eps / 2), weights

    AttentionInterface.register("control", control)
    AttentionMaskInterface.register("control", eager_mask)


def build(implementation: str, vocabulary: int, settings: Settings) -> LlamaForCausalLM:
    """The same weights for every implementation: they depend on the seed alone."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=settings.context,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).to(settings.device)


def learn(
    implementation: str, corpus: Corpus, settings: Settings, after_step: Callable[[], None]
) -> list[float]:
    """The loss of every step, in nats a character."""
    model = build(implementation, len(corpus.vocabulary), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    losses = []
    for step in range(settings.steps):
        ids, targets = batch_of(corpus, settings, step)
        whole = torch.cat([ids, targets[:, -1:]], dim=1)  # Transformers moves the labels by one itself
        loss = model(input_ids=whole, labels=whole, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step()
    return losses


def draw(path: Path, losses: dict[str, list[float]]) -> None:
    """Both curves, as a PNG."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses["tilewise"], label="tilewise", color="#E8480C", linewidth=3)
    axes.plot(losses["eager"], label="eager", color="#0072B2", linewidth=1.2, linestyle="--")
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A tiny Llama in training")
    axes.legend()
    figure.savefig(path, dpi=150)
