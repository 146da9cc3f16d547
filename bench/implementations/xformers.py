"""xFormers' memory_efficient_attention, which chooses among its own kernels; [batch, length, heads, dim].

Packed sequences and documents are one sequence of all tokens, [1, tokens, heads, dim], under its block
diagonal mask.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import (
    Implementation,
    Prepared,
    is_backward,
    is_cosine,
    learns,
    length_first,
    refusal,
    scale_of,
    written_out,
)
from .sdpa import attn_mask

Tensor = torch.Tensor
REASONS = {
    "softcap": "xformers has no softcap",
    "sink": "xformers has no sink",
    "cache": "xformers takes a cache as padded keys under masks of their own, which are not set up here",
}
DENSE = ("bias", "alibi", "relative_position", "bool_mask")


class XFormers(Implementation):
    name = "xformers"
    module = "xformers.ops"
    differentiates_once = "xformers' backward has no derivative, and its forward no forward mode"

    def unsupported(self, case: Case, work: Work) -> str | None:
        if is_cosine(case):
            return "xformers has no cosine similarity"
        if case.q_heads != case.kv_heads and is_backward(work):
            return "xformers has no backward for grouped heads"
        if case.lengths is not None and not _is_packed(case):
            return "xformers is asked for packed sequences with a causal mask or none, and nothing else"
        if learns(case, work):
            return "xformers is given biases made ready before the call, which get no gradient"
        return refusal(case, REASONS)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        module: Any = importlib.import_module(self.module)
        packed, group = _is_packed(case), case.q_heads // case.kv_heads

        def native(x: Tensor) -> Tensor:
            if case.lengths is not None:
                return x.contiguous()[None]
            x = length_first(x).contiguous()
            return x.flatten(0, 1)[None] if packed else x

        def standard(x: Tensor) -> Tensor:
            if case.lengths is not None:
                return x[0]
            return length_first(x[0].unflatten(0, (case.batch, -1)) if packed else x)

        q, k, v = (native(x.detach()).requires_grad_(x.requires_grad) for x in inputs[:3])
        leaves = dict(q=q, k=k, v=v) if is_backward(work) else {}
        bias = attn_bias(module.fmha.attn_bias, case, inputs)
        if group > 1:  # [batch, length, key heads, group, dim], key heads repeated by a stride of 0
            q = q.unflatten(2, (case.kv_heads, group))
            k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
        options = dict(attn_bias=bias, p=case.features.get("dropout", 0.0), scale=scale_of(case))

        def call() -> Tensor:
            out = module.memory_efficient_attention(q, k, v, **options)
            return out.flatten(2, 3) if group > 1 else out

        return Prepared(call, leaves, standard, native, extra_bytes=written_out(bias, inputs))


def _is_packed(case: Case) -> bool:
    asks = case.features
    blocks = "documents" in asks or case.lengths is not None
    return blocks and "window" not in asks and not any(asks.get(name) for name in DENSE)


def document_lengths(case: Case) -> list[int]:
    """Of all sequences of the batch."""
    first, stop = case.document_bounds()
    return [int(n) for n in (stop - first)[torch.unique(first)]] * case.batch


def attn_bias(kinds: Any, case: Case, inputs: Inputs) -> Any:
    """One of its own objects where one says the case, else a dense tensor."""
    asks = case.features
    align, window = asks.get("causal"), asks.get("window")
    if _is_packed(case):
        lengths = [*case.lengths] if case.lengths is not None else document_lengths(case)
        blocks = kinds.BlockDiagonalMask.from_seqlens(lengths)
        return blocks if align is None else blocks.make_causal()
    if align is not None and not any(asks.get(name) for name in (*DENSE, "documents")):
        top_left = align == "top_left" or case.q_len == case.kv_len
        if window is None:
            return kinds.LowerTriangularMask() if top_left else kinds.LowerTriangularFromBottomRightMask()
        if window[0] is not None and align == "bottom_right":  # its window counts the query's own position
            return kinds.LowerTriangularFromBottomRightMask().make_local_attention(window[0] + 1)
    dense = attn_mask(case, inputs)
    if dense is None:
        return None
    if dense.dtype == torch.bool:
        dense = torch.zeros_like(dense, dtype=inputs.q.dtype).masked_fill(~dense, -torch.inf)
    # Its kernels want rows that begin at multiples of 16 bytes: a slice of a wider tensor.
    width = -(-case.kv_len // 8) * 8
    wide = torch.zeros(*dense.shape[:-1], width, dtype=dense.dtype, device=dense.device)
    wide[..., : case.kv_len] = dense
    return wide[..., : case.kv_len].expand(case.batch, case.q_heads, case.q_len, case.kv_len)
