"""Attention of one sequence to another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.similarity import Cosine
from .core import AttentionCore, MaskLike, ScoreLike, check_positive
from .sizes import check_input, join_heads, resolve_sizes, split_heads
from .weights import check_linears, copy_out_projection, fuse_linears, head_sizes, multihead_linears


class CrossAttention(nn.Module):
    """Projects one sequence to queries and another to keys and values, attends, optionally projects out.

        q    = x Wq + b                                             one matmul
        k, v = context Wkv + b                                      one matmul
        out  = softmax(scale · similarity(q, k)) v                  one kernel (arXiv 1706.03762)
        result = heads side by side, or those times Wout + b

    x [q_len, input_dim] and context [kv_len, context_dim], both with a leading batch dimension or neither
    -> [q_len, output_dim], with the batch dimension if there was one.

    context_dim: width of the context (input_dim if None).
    values_dim: width of a second context that brings the values, if it differs from context_dim. Keys and
        values then have projections of their own, and `forward` needs `values`.
    All else, and all errors: as in `SelfAttention`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None = None,
        *,
        context_dim: int | None = None,
        values_dim: int | None = None,
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
        self.input_dim = input_dim
        self.context_dim = input_dim if context_dim is None else context_dim
        self.values_dim = self.context_dim if values_dim is None else values_dim
        check_positive(context_dim=self.context_dim, values_dim=self.values_dim)
        self.core = AttentionCore(
            heads, sizes.head_dim, kv_heads=kv_heads, qk_norm=qk_norm, similarity=similarity, scale=scale,
            sink=sink, dropout=dropout, impl=impl, device=device, dtype=dtype,
        )  # fmt: skip
        self.output_dim, self.head_dim, self.value_dim = sizes
        self.heads, self.kv_heads = heads, self.core.kv_heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q = linear(input_dim, heads * self.head_dim)
        key_width, value_width = self.widths
        if self.values_dim == self.context_dim:
            self.kv = linear(self.context_dim, key_width + value_width)
        else:
            self.k = linear(self.context_dim, key_width)
            self.v = linear(self.values_dim, value_width)
        self.out = linear(heads * self.value_dim, self.output_dim) if out_projection else None

    @property
    def widths(self) -> list[int]:
        """Rows of `kv.weight` that make keys and values."""
        return [self.kv_heads * self.head_dim, self.kv_heads * self.value_dim]

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
    ) -> CrossAttention:
        """As `SelfAttention.from_linears`; k may read another width than q, and v another than k."""
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(heads=heads, kv_heads=kv_heads)
        check_linears(q=q, k=k, v=v)
        head_dim, value_dim = head_sizes(q, k, v, heads, kv_heads)
        module = cls(
            q.in_features, None if out is None else out.out_features,
            context_dim=k.in_features, values_dim=v.in_features, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=value_dim, out_projection=out is not None,
            device=q.weight.device, dtype=q.weight.dtype, **options,
        )  # fmt: skip
        module.q = fuse_linears(q=q)
        if k.in_features == v.in_features:
            module.kv = fuse_linears(k=k, v=v)
        else:
            module.k, module.v = fuse_linears(k=k), fuse_linears(v=v)
        if out is not None:
            module.out = copy_out_projection(q, out, heads * value_dim)
        return module

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> CrossAttention:
        """The module that computes what `mha(query, key, value, need_weights=False)[0]` does, called as
        module(query, key, values=value), or module(query, context) where key and value are one.

        `kdim` and `vdim` become context_dim and values_dim. All else as in
        `SelfAttention.from_multihead_attention`.
        """
        q, k, v, out = multihead_linears(mha)
        options = {"dropout": mha.dropout} | options
        return cls.from_linears(q, k, v, heads=mha.num_heads, out=out, **options).train(mha.training)

    def project(
        self, x: Tensor, context: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, q_len, input_dim], context [batch, kv_len, context_dim] and, if given, values [batch,
        kv_len, values_dim] -> q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim],
        v [batch, kv_heads, kv_len, value_dim]."""
        if values is None:
            k, v = self.kv(context).split(self.widths, dim=-1)
        elif self.values_dim == self.context_dim:  # one Linear, half of it for each context
            key_weight, value_weight = self.kv.weight.split(self.widths)
            key_bias, value_bias = (None, None) if self.kv.bias is None else self.kv.bias.split(self.widths)
            k, v = F.linear(context, key_weight, key_bias), F.linear(values, value_weight, value_bias)
        else:
            k, v = self.k(context), self.v(values)
        return (
            split_heads(self.q(x), self.heads),
            split_heads(k, self.kv_heads),
            split_heads(v, self.kv_heads),
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        values: Tensor | None = None,
        mask: MaskLike | None = None,
        bias: Tensor | None = None,
        score: ScoreLike | None = None,
    ) -> Tensor:
        """x [q_len, input_dim] and context [kv_len, context_dim] -> [q_len, output_dim], or all three with a
        leading batch dimension, in x's dtype.

        values: [kv_len, values_dim] (or with the batch dimension), to take values from another sequence than
            keys; None takes both from `context`.
        mask, bias, score: as in `tilewise.attention`, for [batch, heads, q_len, kv_len]; batch is 1 without a
        batch dimension. Raises ValueError where an input does not fit the module or another input.
        """
        check_input("x", x, self.input_dim, self.q.weight)
        check_input("context", context, self.context_dim, self.q.weight)
        if values is not None:
            check_input("values", values, self.values_dim, self.q.weight)
        elif self.values_dim != self.context_dim:
            raise ValueError(
                f"values must be given: this module's values_dim={self.values_dim} differs from its "
                f"context_dim={self.context_dim}"
            )
        self._check_agree(x, context, values)
        if x.dim() == 2:
            lone_values = None if values is None else values[None]
            return self._attend(x[None], context[None], lone_values, mask, bias, score).squeeze(0)
        return self._attend(x, context, values, mask, bias, score)

    def _attend(
        self,
        x: Tensor,
        context: Tensor,
        values: Tensor | None,
        mask: MaskLike | None,
        bias: Tensor | None,
        score: ScoreLike | None,
    ) -> Tensor:
        """`forward` on inputs with a batch dimension."""
        q, k, v = self.project(x, context, values)
        out = join_heads(self.core(q, k, v, mask=mask, bias=bias, score=score))
        return out if self.out is None else self.out(out)

    @staticmethod
    def _check_agree(x: Tensor, context: Tensor, values: Tensor | None) -> None:
        if x.shape[:-2] != context.shape[:-2]:
            raise ValueError(
                f"x.shape={tuple(x.shape)} and context.shape={tuple(context.shape)} must have the same batch "
                "dimension, or both none"
            )
        if values is not None and values.shape[:-1] != context.shape[:-1]:
            raise ValueError(
                f"values.shape={tuple(values.shape)} must equal context.shape={tuple(context.shape)} in all "
                "but the last dimension"
            )

    def extra_repr(self) -> str:
        shown = f"input_dim={self.input_dim}, context_dim={self.context_dim}"
        if self.values_dim != self.context_dim:
            shown += f", values_dim={self.values_dim}"
        return shown + f", output_dim={self.output_dim}"
