"""A sentence encoder built from `tilewise.nn`: BERT (arXiv 1810.04805) in the small form of all-MiniLM-L6-v2.

x = norm(words + positions)
x = norm(x + attention(x));  x = norm(x + mlp(x))           six times
embedding = the mean of x over the sentence's word pieces
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import SelfAttention
from ..parts.masks.padding import Padding
from .model import Config


class Layer(nn.Module):
    """x [batch, length, width] -> the same: attention, then an MLP, a norm after each."""

    def __init__(self, config: Config, impl: str | None) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, heads=config.heads, out_projection=True, impl=impl)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor, mask: Padding) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """ids [batch, length] int64, padded on the right to lengths [batch] -> embeddings [batch, width] fp32.

    The embeddings are not normalised: their dot products and their cosines are different things to look at.
    impl: as in `tilewise.attention`.
    """

    def __init__(self, config: Config, impl: str | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList([Layer(config, impl) for _ in range(config.layers)])

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(position))
        mask = Padding(lengths)
        for layer in self.layers:
            x = layer(x, mask)
        is_piece = position < lengths[:, None]
        return (x.float() * is_piece[..., None]).sum(dim=1) / lengths[:, None]


def build_encoder(config: Config, weights: dict[str, Tensor], impl: str | None = None) -> Encoder:
    """The encoder with a BERT checkpoint's weights, in their dtype, on their device and in their memory."""
    with torch.device("meta"):  # sizes only: every tensor is about to be replaced
        encoder = Encoder(config, impl)
    encoder.load_state_dict(rename(weights, config.layers), assign=True)
    return encoder.eval().requires_grad_(False)


LAYER_NAMES = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def rename(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A BERT checkpoint's weights under the names of `Encoder`, the three input projections as one."""
    # Every token here is of type 0, so that type's vector joins the positions.
    token_type = weights["embeddings.token_type_embeddings.weight"][0]
    renamed = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "positions.weight": weights["embeddings.position_embeddings.weight"] + token_type,
    }
    for kind in ("weight", "bias"):
        renamed[f"norm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for i in range(layers):
            theirs = f"encoder.layer.{i}"
            qkv = [weights[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"layers.{i}.attention.qkv.{kind}"] = torch.cat(qkv)
            for name, their_name in LAYER_NAMES.items():
                renamed[f"layers.{i}.{name}.{kind}"] = weights[f"{theirs}.{their_name}.{kind}"]
    return renamed
