"""What attention modules share: projections around a core, and taking over the weights of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..parts.stats import Statistics, of_packed
from .core import AttentionCore, check_positive
from .sharded import check_plain, on_devices
from .sizes import join_heads, resolve_sizes, split_heads
from .weights import (
    apply_fused,
    check_linears,
    copy_out_projection,
    fuse_linears,
    head_sizes,
    multihead_linears,
    split_linear,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class ProjectedAttention(nn.Module):
    """Projections to queries, keys and values; the core between heads; optionally a projection out.

    Where several of q, k and v read one sequence, one Linear makes them. It is named after what it makes:
    `qkv`; or `q` and `kv`; or `q`, `k` and `v`. `fused` lists these names.

    A subclass calls `_build` in its constructor, has a `project` and a `forward` of its own, and names in
    `_context_dims` what its constructor must know of the inputs of k and v.
    """

    core: AttentionCore
    out: nn.Linear | None
    project: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def _build(
        self,
        input_dims: dict[str, int],
        fused: tuple[str, ...],
        output_dim: int | None,
        *,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        bias: bool,
        out_projection: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **core: Any,
    ) -> None:
        """Make all parts. input_dims: the widths that q, k and v read, by these names. core: options of
        `AttentionCore`."""
        sizes = resolve_sizes(input_dims["q"], output_dim, heads, head_dim, value_dim, out_projection)
        self.core = AttentionCore(
            heads, sizes.head_dim, kv_heads=kv_heads, device=device, dtype=dtype, **core
        )
        self.input_dim, self.fused, self._fusable = input_dims["q"], fused, fused
        self.output_dim, self.head_dim, self.value_dim = sizes
        self.heads, self.kv_heads = heads, self.core.kv_heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        for parts in fused:
            setattr(self, parts, linear(input_dims[parts[0]], sum(self._rows(parts))))
        self.out = linear(heads * self.value_dim, self.output_dim) if out_projection else None

    def _rows(self, parts: str) -> list[int]:
        """How many rows of a Linear make each of these parts: "kv" -> rows for keys, rows for values."""
        rows = {
            "q": self.heads * self.head_dim,
            "k": self.kv_heads * self.head_dim,
            "v": self.kv_heads * self.value_dim,
        }
        return [rows[part] for part in parts]

    @staticmethod
    def _context_dims(k: nn.Linear, v: nn.Linear) -> dict[str, int]:
        return {}

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
    ) -> Self:
        """The module that computes what three Linears and textbook attention compute.

        q: Linear [input_dim -> heads · head_dim]; k: [input_dim -> kv_heads · head_dim];
        v: [input_dim -> kv_heads · value_dim]; out: None, or [heads · value_dim -> output_dim]. In a
        CrossAttention k may read another width than q, and v another than k.
        options: those of `AttentionCore`, as qk_norm, scale or impl.

        Weights are copied; dtype and device are theirs. Where some of those that become one have no bias,
        they get zeros. Raises ValueError where the four do not fit together.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        check_positive(heads=heads, kv_heads=kv_heads)
        check_linears(q=q, k=k, v=v)
        head_dim, value_dim = head_sizes(q, k, v, heads, kv_heads)
        module = cls(
            q.in_features, None if out is None else out.out_features, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=value_dim, out_projection=out is not None,
            device=q.weight.device, dtype=q.weight.dtype, **cls._context_dims(k, v), **options,
        )  # fmt: skip
        linears = {"q": q, "k": k, "v": v}
        for parts in module.fused:
            setattr(module, parts, fuse_linears(**{part: linears[part] for part in parts}))
        if out is not None:
            module.out = copy_out_projection(q, out, heads * value_dim)
        return module

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, **options: Any) -> Self:
        """The module that computes what `mha(query, key, value, need_weights=False)[0]` does: a SelfAttention
        as module(x), where the three are one; a CrossAttention as module(query, key, values=value), or as
        module(query, context) where key and value are one. Weights are copied; `kdim` and `vdim` become
        context_dim and values_dim.

        Input here is [batch, length, input_dim], whatever `mha.batch_first` says: transpose the input of a
        module with batch_first=False. Masks here are True where a pair counts: a boolean `attn_mask` of
        PyTorch's becomes `~attn_mask`, and a `key_padding_mask` is best given as `Padding(lengths)`.
        options: those of `AttentionCore`, as qk_norm, scale or impl.

        Raises NotImplementedError for add_bias_kv and add_zero_attn; ValueError where kdim or
        vdim differ from embed_dim, which only cross-attention can use.
        """
        q, k, v, out = multihead_linears(mha)
        options = {"dropout": mha.dropout} | options
        return cls.from_linears(q, k, v, heads=mha.num_heads, out=out, **options).train(mha.training)

    def split_projections(self) -> Self:
        """Give queries, keys and values a Linear each, named `q`, `k` and `v`, where one makes several of
        them: so that `ColwiseParallel` can cut each between heads. In place, with copies of the weights: make
        the optimizer afterwards. Returns the module; `fuse_projections` is the way back. Raises ValueError
        for weights that are cut already."""
        for parts in [each for each in self.fused if len(each) > 1]:
            linear = getattr(self, parts)
            check_plain(parts, linear)
            for part, made in zip(parts, split_linear(linear, self._rows(parts)), strict=True):
                setattr(self, part, made.train(linear.training))
            delattr(self, parts)
        self.fused = ("q", "k", "v")
        return self

    def fuse_projections(self) -> Self:
        """Let one Linear make all that reads one sequence, as when the module was made. In place, with copies
        of the weights. Returns the module. Raises ValueError for weights that are cut over devices."""
        if self.fused == self._fusable:
            return self
        for parts in [each for each in self._fusable if len(each) > 1]:
            linears = {part: getattr(self, part) for part in parts}
            for part, linear in linears.items():
                check_plain(part, linear)
            setattr(self, parts, fuse_linears(**linears).train(linears[parts[0]].training))
            for part in parts:
                delattr(self, part)
        self.fused = self._fusable
        return self

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What q, k and v are made from, [batch, length, width] each -> the three themselves, split into
        heads. One matmul for all that one Linear makes from one tensor."""
        inputs: dict[str, Tensor] = {"q": q, "k": k, "v": v}
        made: dict[str, Tensor] = {}
        for parts in self.fused:
            read, linear, rows = [inputs[part] for part in parts], getattr(self, parts), self._rows(parts)
            made |= zip(parts, apply_fused(parts, linear, rows, read), strict=True)
            if len(parts) == 1:
                heads = self.heads if parts == "q" else self.kv_heads
                made[parts] = on_devices(made[parts], parts, linear, heads, rows[0])
        return (
            split_heads(made["q"], self.heads),
            split_heads(made["k"], self.kv_heads),
            split_heads(made["v"], self.kv_heads),
        )

    def _attend(self, *inputs: Tensor, **core: Any) -> Tensor | tuple[Tensor, Statistics]:
        """From the inputs of `project`, all with a batch dimension or all without, to the result, and to what
        return_stats asks for, if anything."""
        batched = inputs[0].dim() == 3
        q, k, v = self.project(*(x if batched else x.unsqueeze(0) for x in inputs))
        result, found = self.core(q, k, v, **core), None
        if core.get("return_stats") is not None:
            result, found = result
        out = join_heads(result)
        out = out if self.out is None else self.out(out)
        out = out if batched else out.squeeze(0)
        if found is None:
            return out
        return out, found if batched else of_packed(found)
