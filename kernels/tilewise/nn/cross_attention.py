"""Attention of one sequence to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..api import refuse_unknown
from ..parts.similarity import Cosine
from ..parts.stats import Stats
from .core import CALL_ARGUMENTS, MaskLike, ScoreLike, check_positive
from .projected import ProjectedAttention
from .sizes import check_input


class CrossAttention(ProjectedAttention):
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
    All else, and all errors: as in `SelfAttention`. No `rotary`: the two sequences share no positions.
    """

    q: nn.Linear
    kv: nn.Linear
    k: nn.Linear
    v: nn.Linear

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
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context_dim = input_dim if context_dim is None else context_dim
        self.values_dim = self.context_dim if values_dim is None else values_dim
        check_positive(context_dim=self.context_dim, values_dim=self.values_dim)
        self._build(
            {"q": input_dim, "k": self.context_dim, "v": self.values_dim},
            ("q", "kv") if self.values_dim == self.context_dim else ("q", "k", "v"), output_dim,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, bias=bias,
            out_projection=out_projection, qk_norm=qk_norm, similarity=similarity, scale=scale, sink=sink,
            dropout=dropout, impl=impl, deterministic=deterministic, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def widths(self) -> list[int]:
        """Rows of `kv.weight` that make keys and values."""
        return self._rows("kv")

    @staticmethod
    def _context_dims(k: nn.Linear, v: nn.Linear) -> dict[str, int]:
        return {"context_dim": k.in_features, "values_dim": v.in_features}

    def project(
        self, x: Tensor, context: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, q_len, input_dim], context [batch, kv_len, context_dim] and, if given, values [batch,
        kv_len, values_dim] -> q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim],
        v [batch, kv_heads, kv_len, value_dim]."""
        return self._heads(x, context, context if values is None else values)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        values: Tensor | None = None,
        mask: MaskLike | None = None,
        bias: Tensor | None = None,
        score: ScoreLike | None = None,
        return_stats: Stats | None = None,
        **unknown: Any,
    ) -> Any:  # a Tensor; with return_stats (Tensor, Statistics)
        """x [q_len, input_dim] and context [kv_len, context_dim] -> [q_len, output_dim], or all three with a
        leading batch dimension, in x's dtype.

        values: [kv_len, values_dim] (or with the batch dimension), to take values from another sequence than
            keys; None takes both from `context`.
        mask, bias, score: as in `tilewise.attention`, for [batch, heads, q_len, kv_len]; batch is 1 without a
        batch dimension. return_stats: as there: then (result, `Statistics`), without batch where x has none.
        Raises ValueError where an input does not fit the module or another input.
        """
        if unknown:
            refuse_unknown("forward", unknown, ("values", *CALL_ARGUMENTS))
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
        inputs = (x, context) if values is None else (x, context, values)
        return self._attend(*inputs, mask=mask, bias=bias, score=score, return_stats=return_stats)

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
