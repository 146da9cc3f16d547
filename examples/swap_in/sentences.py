"""Sentences as vectors, by the pretrained all-MiniLM-L6-v2 in Transformers' BertModel."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertModel

from tilewise.demo.model import load_config, model_folder, pad, split_into_pieces


def embeddings(sentences: list[str], implementation: str, device: str) -> Tensor:
    """[sentences, width] in fp32: the mean over a sentence's word pieces. Raises DemoError where the model's
    files are missing."""
    folder = model_folder()
    pieces = split_into_pieces(folder, sentences, load_config(folder).max_pieces)
    ids, lengths = pad(pieces, device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [sentences, longest]
    model = BertModel.from_pretrained(folder, attn_implementation=implementation).to(device).eval()
    with torch.inference_mode():
        states = model(ids, attention_mask=real.long()).last_hidden_state  # [sentences, longest, width]
    return (states * real[..., None]).sum(1) / lengths[:, None]
