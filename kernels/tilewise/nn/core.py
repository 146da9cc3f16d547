"""Attention between heads, with the parts of it that are learned. No projections: those are around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..api import attention, refuse_unknown
from ..parts.masks.mask import Mask
from ..parts.scores.score import Score
from ..parts.similarity import Cosine
from ..parts.stats import Stats
from .rotary import Rotary
from .sharded import check_norms

MaskLike = Mask | Tensor | Any  # Any: a @triton.jit function
ScoreLike = Score | Sequence[Score] | Any
Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values -> all so far
CALL_ARGUMENTS = ("mask", "bias", "score", "return_stats")  # that a module's forward takes besides tensors
QK_NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class AttentionCore(nn.Module):
    """softmax(scale · similarity(Q, K)) V for all heads: `tilewise.attention` with learned parts.

    A module of its own so that a forward hook on it sees the queries, keys, values and results of a model.

    heads, kv_heads: query heads, and key/value heads that divide them (`heads` if None).
    head_dim: the width of a head's queries and keys.
    qk_norm: None, "rms" or "layer": normalises each head's queries and keys, with a learned weight
        [head_dim] for each of the two (arXiv 2302.05442, section 2; RMS norm: arXiv 1910.07467).
    rotary: None, or a `Rotary` that turns queries and keys by their positions, after the norm.
    similarity: "dot", "scaled_dot", "cosine" or `Cosine(temperature)`, where a tensor temperature is [heads].
    scale: a float or a 0-d tensor; the similarity's own if None.
    sink: learn a logit a head, from 0, that takes weight and adds no value.
    dropout: the probability that a weight is dropped while the module trains, from 0 to 1.
    impl, deterministic: as in `tilewise.attention`.
    device, dtype: of the learned parts.

    A tensor given as scale or temperature becomes a buffer of the module, and is trained if it is an
    `nn.Parameter`. Raises ValueError where an argument is not one of these.
    """

    scale: float | Tensor | None
    temperature: float | Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
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
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        if heads % kv_heads:
            raise ValueError(f"{heads=} must be a multiple of {kv_heads=}")
        if not isinstance(similarity, Cosine) and similarity not in ("dot", "scaled_dot", "cosine"):
            raise ValueError(f"{similarity=} must be 'dot', 'scaled_dot', 'cosine' or a tilewise.Cosine")
        if qk_norm is not None and qk_norm not in QK_NORMS:
            raise ValueError(f"{qk_norm=} must be None, 'rms' or 'layer'")
        if rotary is not None and not isinstance(rotary, Rotary):
            raise ValueError(f"{rotary=} must be None or a tilewise.nn.Rotary")
        if rotary is not None and rotary.head_dim != head_dim:
            raise ValueError(f"rotary.head_dim={rotary.head_dim} must be the module's {head_dim=}")
        if not isinstance(deterministic, bool):
            raise ValueError(f"{deterministic=} must be True or False")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{dropout=} must be from 0 to 1")
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, head_dim, dropout
        self.qk_norm, self.impl, self.deterministic = qk_norm, impl, deterministic
        self.similarity = "cosine" if isinstance(similarity, Cosine) else similarity
        self._hold("temperature", similarity.temperature if isinstance(similarity, Cosine) else 1.0)
        self._hold("scale", scale)
        self.q_norm = self._norm(device, dtype)
        self.k_norm = self._norm(device, dtype)
        self.rotary = rotary
        self.sink = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype)) if sink else None

    def _hold(self, name: str, value: float | Tensor | None) -> None:
        """Keep a setting so that a tensor moves with the module and is saved with it."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def _norm(self, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module | None:
        if self.qk_norm is None:
            return None
        return QK_NORMS[self.qk_norm](self.head_dim, eps=1e-6, device=device, dtype=dtype)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: MaskLike | None = None,
        bias: Tensor | None = None,
        score: ScoreLike | None = None,
        positions: int | Tensor | None = None,
        cache: Cache | None = None,
        return_stats: Stats | None = None,
        **unknown: Any,
    ) -> Any:  # a Tensor; with return_stats (Tensor, Statistics)
        """q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim],
        v [batch, kv_heads, kv_len, value_dim] -> [batch, heads, q_len, value_dim].

        mask, bias, score, and all errors: as in `tilewise.attention`.
        positions: of the rows of q and k, as in `Rotary.forward`.
        cache: called with k (after norm and rotation) and v, it returns those to attend to in their place: in
            generation all so far, which it keeps.
        return_stats: as in `tilewise.attention`: then (out, `Statistics`).
        Raises ValueError for positions that have no effect, and where they are missing beside a cache.
        """
        if unknown:
            refuse_unknown("forward", unknown, (*CALL_ARGUMENTS, "positions", "cache"))
        if positions is not None and self.rotary is None:
            raise ValueError("positions= has no effect without rotary=; make the module with one")
        check_norms(q, self.q_norm, self.k_norm)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions)
        if self.qk_norm is not None:  # which returns fp32 under autocast, beside values in the narrow type
            q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = self._with_earlier(k, v, positions, cache)
        similarity = Cosine(self.temperature) if self.similarity == "cosine" else self.similarity
        asked: Any = return_stats
        return attention(
            q, k, v, mask=mask, bias=bias, score=score,
            scale=self.scale, similarity=similarity, sink=self.sink,
            dropout_p=self.dropout if self.training else 0.0, impl=self.impl,
            deterministic=self.deterministic, return_stats=asked,
        )  # fmt: skip

    def _with_earlier(
        self, k: Tensor, v: Tensor, positions: int | Tensor | None, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """All keys and values that the cache has after these."""
        all_k, all_v = cache(k, v)
        if self.rotary is not None and positions is None and all_k.shape[2] != k.shape[2]:
            raise ValueError(
                f"positions must be given: the cache returned {all_k.shape[2]} keys for {k.shape[2]} new "
                "ones, which then do not start at position 0"
            )
        return all_k, all_v

    def extra_repr(self) -> str:
        """The settings, those at their defaults left out."""
        shown = [f"heads={self.heads}", f"head_dim={self.head_dim}"]
        if self.kv_heads != self.heads:
            shown.append(f"kv_heads={self.kv_heads}")
        if self.similarity != "scaled_dot":
            shown.append(f"similarity={self.similarity!r}")
        if isinstance(self.temperature, Tensor) or self.temperature != 1.0:
            shown.append(f"temperature={_brief(self.temperature)}")
        if self.scale is not None:
            shown.append(f"scale={_brief(self.scale)}")
        if self.sink is not None:
            shown.append("sink=True")
        if self.dropout:
            shown.append(f"dropout={self.dropout}")
        if self.impl is not None:
            shown.append(f"impl={self.impl!r}")
        return ", ".join(shown)


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be an int of at least 1")


def _brief(value: float | Tensor) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else str(value)
