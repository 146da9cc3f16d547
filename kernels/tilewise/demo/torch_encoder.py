"""The same encoder built from PyTorch's own layers: what the demo's embeddings are checked against.

It shares nothing with `encoder.py` but the checkpoint, so a mistake there cannot hide here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Config


def torch_embeddings(config: Config, weights: dict[str, Tensor], ids: Tensor, lengths: Tensor) -> Tensor:
    """ids [batch, length], lengths [batch] -> mean-pooled embeddings [batch, width] in the weights' dtype."""
    padding = torch.arange(ids.shape[1], device=ids.device)[None, :] >= lengths[:, None]

    def table(name: str) -> Tensor:
        return weights[f"embeddings.{name}_embeddings.weight"]

    x = table("word")[ids] + table("token_type")[0] + table("position")[: ids.shape[1]]
    x = F.layer_norm(
        x,
        (config.width,),
        weights["embeddings.LayerNorm.weight"],
        weights["embeddings.LayerNorm.bias"],
        config.norm_eps,
    )
    with torch.no_grad():
        for i in range(config.layers):
            x = _layer(config, weights, f"encoder.layer.{i}.")(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0)
        return x.sum(dim=1) / lengths[:, None]


def _layer(config: Config, weights: dict[str, Tensor], prefix: str) -> nn.TransformerEncoderLayer:
    """PyTorch's own encoder layer with the weights of one BERT layer."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.mlp_width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.norm_eps,
            batch_first=True,
        )

    def both(ours: str, theirs: str) -> dict[str, Tensor]:
        return {f"{ours}.{kind}": weights[f"{prefix}{theirs}.{kind}"] for kind in ("weight", "bias")}

    def joined(kind: str) -> Tensor:
        return torch.cat([weights[f"{prefix}attention.self.{n}.{kind}"] for n in ("query", "key", "value")])

    state = {"self_attn.in_proj_weight": joined("weight"), "self_attn.in_proj_bias": joined("bias")}
    state |= both("self_attn.out_proj", "attention.output.dense")
    state |= both("norm1", "attention.output.LayerNorm")
    state |= both("linear1", "intermediate.dense")
    state |= both("linear2", "output.dense")
    state |= both("norm2", "output.LayerNorm")
    layer.load_state_dict(state, assign=True)
    return layer.eval()
