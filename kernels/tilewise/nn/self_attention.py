"""Attention of a sequence to itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..parts.similarity import Cosine
from .core import AttentionCore, MaskLike, ScoreLike, check_positive
from .sizes import check_input, join_heads, resolve_sizes, split_heads
from .weights import copy_out_projection, fuse_linears, head_sizes, multihead_linears


class SelfAttention(nn.Module):
    """Projects a sequence to queries, keys and values, attends, and optionally projects out.

        q, k, v = x Wqkv + b, split into heads                      one matmul
        out     = softmax(scale · similarity(q, k)) v               one kernel (arXiv 1706.03762)
        result  = heads side by side, or those times Wout + b

    x [length, input_dim] or [batch, length, input_dim] -> the same with output_dim in place of input_dim.

    output_dim: width of the result (input_dim if None). Without `out_projection` it is heads · value_dim.
    heads, kv_heads: query heads, and key/value heads that divide them (`heads` if None; 1 is multi-query).
    head_dim, value_dim: a head's width in queries and keys, and in values; output_dim / heads if None.
    bias: the projections have biases.
    out_projection: project the heads out with a Linear [heads · value_dim -> output_dim].
    qk_norm, similarity, scale, sink, dropout, impl: as in `AttentionCore`.
    device, dtype: of the weights.

    Raises ValueError where sizes do not fit together.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None = None,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        out_projection: bool = False,
        qk_norm: str | None = None,
        similarity: str | Cosine = "scaled_dot",
        scale: float | Tensor | None = None,
        sink: bool = False,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = resolve_sizes(input_dim, output_dim, heads, head_dim, value_dim, out_projection)
        self.core = AttentionCore(
            heads, sizes.head_dim, kv_heads=kv_heads, qk_norm=qk_norm, similarity=similarity, scale=scale,
            sink=sink, dropout=dropout, impl=impl, device=device, dtype=dtype,
        )  # fmt: skip
        self.input_dim = input_dim
        self.output_dim, self.head_dim, self.value_dim = sizes
        self.heads, self.kv_heads = heads, self.core.kv_heads
        self.qkv = nn.Linear(input_dim, sum(self.widths), bias=bias, device=device, dtype=dtype)
        self.out = (
            nn.Linear(heads * self.value_dim, self.output_dim, bias=bias, device=device, dtype=dtype)
            if out_projection
            else None
        )

    @property
    def widths(self) -> list[int]:
        """Rows of `qkv.weight` that make queries, keys and values."""
        return [
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.kv_heads * self.value_dim,
        ]

    @classmethod
    def from_linears(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        heads: int = 1,
        kv_heads: int | None = None,
        out: nn.Linear | None = None,
        **options: Any,
    ) -> SelfAttention:
        """The module that computes what three Linears and textbook attention compute.

        q: Linear [input_dim -> heads · head_dim]; k: [input_dim -> kv_heads · head_dim];
        v: [input_dim -> kv_heads · value_dim]; out: None, or [heads · value_dim -> output_dim].
        options: qk_norm, similarity, scale, sink, dropout, impl.

        Weights are copied; dtype and device are theirs. Where some of q, k, v have no bias, they get zeros.
        Raises ValueError where the four do not fit together.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(heads=heads, kv_heads=kv_heads)
        qkv = fuse_linears(q=q, k=k, v=v)
        head_dim, value_dim = head_sizes(q, k, v, heads, kv_heads)
        module = cls(
            q.in_features, None if out is None else out.out_features, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=value_dim, out_projection=out is not None,
            device=q.weight.device, dtype=q.weight.dtype, **options,
        )  # fmt: skip
        module.qkv = qkv
        if out is not None:
            module.out = copy_out_projection(q, out, heads * value_dim)
        return module

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> SelfAttention:
        """The module that computes what `mha(x, x, x, need_weights=False)[0]` does. Weights are copied.

        Input here is [batch, length, input_dim], whatever `mha.batch_first` says: transpose the input of a
        module with batch_first=False. Masks here are True where a pair counts: a boolean `attn_mask` of
        PyTorch's becomes `~attn_mask`, and a `key_padding_mask` is best given as `Padding(lengths)`.
        options: qk_norm, similarity, scale, sink, dropout, impl.

        Raises NotImplementedError for add_bias_kv and add_zero_attn; ValueError where kdim or
        vdim differ from embed_dim, which only cross-attention can use.
        """
        q, k, v, out = multihead_linears(mha)
        if not q.in_features == k.in_features == v.in_features:
            raise ValueError(
                f"mha.kdim={mha.kdim} and mha.vdim={mha.vdim} must equal mha.embed_dim={mha.embed_dim} for "
                "self-attention; use CrossAttention.from_multihead_attention"
            )
        options = {"dropout": mha.dropout} | options
        return cls.from_linears(q, k, v, heads=mha.num_heads, out=out, **options).train(mha.training)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, length, input_dim] -> q [batch, heads, length, head_dim], k [batch, kv_heads, length,
        head_dim], v [batch, kv_heads, length, value_dim]: views of one tensor."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)

    def forward(
        self,
        x: Tensor,
        *,
        mask: MaskLike | None = None,
        bias: Tensor | None = None,
        score: ScoreLike | None = None,
    ) -> Tensor:
        """x [length, input_dim] or [batch, length, input_dim] -> [length, output_dim] or
        [batch, length, output_dim], in x's dtype.

        mask, bias, score: as in `tilewise.attention`, for [batch, heads, length, length]; batch is 1 without
        a batch dimension. Raises ValueError where x does not fit the module.
        """
        check_input("x", x, self.input_dim, self.qkv.weight)
        batched = x if x.dim() == 3 else x.unsqueeze(0)
        out = join_heads(self.core(*self.project(batched), mask=mask, bias=bias, score=score))
        out = out if self.out is None else self.out(out)
        return out if x.dim() == 3 else out.squeeze(0)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, output_dim={self.output_dim}"
