"""Attention of a sequence to itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..api import refuse_unknown
from ..parts.similarity import Cosine
from ..parts.stats import Stats
from .core import CALL_ARGUMENTS, Cache, MaskLike, ScoreLike
from .projected import ProjectedAttention
from .rotary import Rotary
from .sizes import check_input

if TYPE_CHECKING:
    from typing_extensions import Self


class SelfAttention(ProjectedAttention):
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
    qk_norm, rotary, similarity, scale, sink, dropout, impl, deterministic: as in `AttentionCore`.
    device, dtype: of the weights.

    Raises ValueError where sizes do not fit together.
    """

    qkv: nn.Linear

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
        rotary: Rotary | None = None,
        similarity: str | Cosine = "scaled_dot",
        scale: float | Tensor | None = None,
        sink: bool = False,
        dropout: float = 0.0,
        impl: str | None = None,
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._build(
            dict.fromkeys("qkv", input_dim), ("qkv",), output_dim, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=value_dim, bias=bias, out_projection=out_projection,
            qk_norm=qk_norm, rotary=rotary, similarity=similarity, scale=scale, sink=sink, dropout=dropout,
            impl=impl, deterministic=deterministic, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def widths(self) -> list[int]:
        """Rows of `qkv.weight` that make queries, keys and values."""
        return self._rows("qkv")

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> Self:
        """As `ProjectedAttention.from_multihead_attention`; kdim and vdim must be embed_dim."""
        if isinstance(mha, nn.MultiheadAttention) and not mha.embed_dim == mha.kdim == mha.vdim:
            raise ValueError(
                f"mha.kdim={mha.kdim} and mha.vdim={mha.vdim} must equal mha.embed_dim={mha.embed_dim} for "
                "self-attention; use CrossAttention.from_multihead_attention"
            )
        return super().from_multihead_attention(mha, **options)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, length, input_dim] -> q [batch, heads, length, head_dim], k [batch, kv_heads, length,
        head_dim], v [batch, kv_heads, length, value_dim]: views of one tensor. Norm and rotation come after,
        in the core."""
        return self._heads(x, x, x)

    def forward(
        self,
        x: Tensor,
        *,
        mask: MaskLike | None = None,
        bias: Tensor | None = None,
        score: ScoreLike | None = None,
        positions: int | Tensor | None = None,
        cache: Cache | None = None,
        return_stats: Stats | None = None,
        **unknown: Any,
    ) -> Any:  # a Tensor; with return_stats (Tensor, Statistics)
        """x [length, input_dim] or [batch, length, input_dim] -> [length, output_dim] or
        [batch, length, output_dim], in x's dtype.

        mask, bias, score: as in `tilewise.attention`, for [batch, heads, length, kv_len]; batch is 1 without
            a batch dimension. kv_len is length unless a cache has more.
        positions: where x stands, for `rotary`: an int, the position of its first row, or ints [length] or
            [batch, length]. From 0 if None.
        cache: a function of new k [batch, kv_heads, length, head_dim] and v that returns those to attend to,
            which are all so far. Then `Causal()`, aligned at the bottom right, is the mask for generation.
        return_stats: as in `tilewise.attention`: then (result, `Statistics`), without batch where x has none.
        Raises ValueError where an input does not fit the module.
        """
        if unknown:
            refuse_unknown("forward", unknown, (*CALL_ARGUMENTS, "positions", "cache"))
        check_input("x", x, self.input_dim, getattr(self, self.fused[0]).weight)
        given = dict(mask=mask, bias=bias, score=score, positions=positions, cache=cache)
        return self._attend(x, **given, return_stats=return_stats)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, output_dim={self.output_dim}"
