"""FlashAttention: the package flash_attn 2, and its CuTe kernels, flash_attn.cute.

Both take [batch, length, heads, dim], given contiguous; packed sequences and documents go through the
functions for variable lengths as [tokens, heads, dim].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, is_backward, is_cosine, learns, length_first, refusal, scale_of
from .caches import why_no_cache

Tensor = torch.Tensor
Extra = dict[str, Any]

PAGE = 256  # rows that a page of flash_attn 2's must be a multiple of
REASONS = {
    "bool_mask": "takes no dense mask",
    "bias": "takes no additive bias",
    "relative_position": "takes no relative position bias",
}


class FlashAttention(Implementation):
    """What the two packages have in common."""

    reasons: dict[str, str] = REASONS
    no_cache: tuple[str, ...] = ()  # what `why_no_cache` says to pages and to lengths
    differentiates_once = "flash_attn's backward has no derivative, and its forward no forward mode"

    def unsupported(self, case: Case, work: Work) -> str | None:
        if case.dtype not in ("float16", "bfloat16"):
            return f"{self.name} takes float16 and bfloat16, not {case.dtype}"
        if is_cosine(case):
            return f"{self.name} has no cosine similarity"
        asked = refusal(case, self.reasons)
        if asked:
            return f"{self.name} {asked}"
        if reason := why_no_cache(case, work, self.name, *self.no_cache):
            return reason
        if "documents" in case.features and case.q_len != case.kv_len:
            return f"{self.name}: documents need q_len = kv_len"
        if case.features.get("causal") == "top_left" and case.q_len != case.kv_len:
            return f"{self.name} aligns causal masks to the bottom right"
        return None

    def function(self, packed: bool) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(
            importlib.import_module(self.module), "flash_attn_varlen_func" if packed else "flash_attn_func"
        )
        return found

    def options(self, case: Case, inputs: Inputs) -> Extra:
        raise NotImplementedError

    def finish(self, returned: Any, case: Case, inputs: Inputs) -> Tensor:
        """out, of what the function returned."""
        raise NotImplementedError

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        documents, packed = "documents" in case.features, case.lengths is not None
        options, function = self.options(case, inputs), self.function(documents or packed)

        def native(x: Tensor) -> Tensor:
            if packed:
                return x.contiguous()
            x = length_first(x).contiguous()
            return x.flatten(0, 1) if documents else x

        def standard(x: Tensor) -> Tensor:
            if packed:
                return x
            return length_first(x.unflatten(0, (case.batch, -1)) if documents else x)

        q, k, v = (native(x.detach()).requires_grad_(x.requires_grad) for x in inputs[:3])
        if documents or packed:
            options |= packing(case, q.device)
        leaves = dict(q=q, k=k, v=v, **{n: x for n, x in inputs.learned.items() if x.requires_grad})

        def call() -> Tensor:
            return self.finish(function(q, k, v, **options), case, inputs)

        return Prepared(call, leaves if is_backward(work) else {}, standard, native)


class Flash2(FlashAttention):
    """A cache is read by flash_attn_with_kvcache."""

    name = "flash_attn 2"
    module = "flash_attn"
    # The lse that it returns has no derivative, so that a sink stands outside of its backward.

    def unsupported(self, case: Case, work: Work) -> str | None:
        asks = case.features
        if case.head_dim != case.value_dim:
            return f"{self.name} needs head_dim = value_dim, not {case.head_dim} and {case.value_dim}"
        if asks.get("sink") and (is_backward(work) or "documents" in asks or case.lengths is not None):
            return f"{self.name} has no sink; rescaling by its lse has no derivative"
        if learns(case, work) and asks.get("alibi"):
            return f"{self.name} gives slopes no gradient"
        if (case.page_size or 0) % PAGE:
            return f"{self.name} takes pages of a multiple of {PAGE} rows, not of {case.page_size}"
        return super().unsupported(case, work)

    def options(self, case: Case, inputs: Inputs) -> Extra:
        asks = case.features
        left, right = asks.get("window", (None, None))
        return dict(
            dropout_p=asks.get("dropout", 0.0),
            softmax_scale=scale_of(case),
            causal="causal" in asks,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=asks.get("softcap", 0.0),
            alibi_slopes=inputs.learned["slopes"].detach() if asks.get("alibi") else None,
            return_attn_probs=bool(asks.get("sink")),
        )

    def finish(self, returned: Any, case: Case, inputs: Inputs) -> Tensor:
        if not case.features.get("sink"):
            return returned
        out, lse = returned[:2]  # [batch, length, heads, dim] and [batch, heads, length]
        share = torch.sigmoid(lse - inputs.learned["sink"].float()[:, None])
        return (out * share.transpose(1, 2)[..., None]).to(out.dtype)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        return super().prepare(case, inputs, work) if case.cache is None else self.cached_call(case, inputs)

    def cached_call(self, case: Case, inputs: Inputs) -> Prepared:
        function: Callable[..., Tensor] = importlib.import_module(self.module).flash_attn_with_kvcache
        options = self.options(case, inputs)
        for name in ("dropout_p", "return_attn_probs"):
            del options[name]
        q, k, v = inputs[:3]
        q = length_first(q).contiguous()
        if case.page_size is None:
            k, v = (length_first(x).contiguous() for x in (k, v))
        else:
            options["block_table"] = inputs.arguments["pages"]
        lengths = inputs.arguments["kv_lens"]
        return Prepared(lambda: function(q, k, v, cache_seqlens=lengths, **options), standard=length_first)


class FlashCute(FlashAttention):
    """A cache that every sequence fills is a dense call."""

    name = "flash_attn cute"
    no_cache = (
        "flash_attn cute is not asked for pages, which not all of its versions take",
        "flash_attn cute is not asked for the lengths of a cache, which not all of its versions take",
    )
    module = "flash_attn.cute.interface"
    reasons = REASONS | {"dropout": "has no dropout", "alibi": "has no ALiBi but as a CuTe function"}

    def unsupported(self, case: Case, work: Work) -> str | None:
        if learns(case, work) and case.features.get("sink"):
            return f"{self.name} gives a sink no gradient"
        return super().unsupported(case, work)

    def options(self, case: Case, inputs: Inputs) -> Extra:
        asks = case.features
        sink = inputs.learned.get("sink")
        return dict(
            softmax_scale=scale_of(case),
            causal="causal" in asks and "window" not in asks,
            # With a window, causal is a window of no key to the right.
            window_size=self.window(case),
            softcap=asks.get("softcap", 0.0),
            learnable_sink=None if sink is None else sink.detach().to(torch.bfloat16),
        )

    @staticmethod
    def window(case: Case) -> tuple[int | None, int | None]:
        left, right = case.features.get("window", (None, None))
        if "window" in case.features and "causal" in case.features:
            right = 0
        return left, right

    def finish(self, returned: Any, case: Case, inputs: Inputs) -> Tensor:
        return returned[0] if isinstance(returned, tuple) else returned  # with or without lse, by version


def packing(case: Case, device: torch.device) -> Extra:
    """Where each document begins, over all sequences of the batch, and the longest one; or where each packed
    sequence does."""
    if case.lengths is not None:
        offsets = torch.tensor([0, *accumulate(case.lengths)], device=device, dtype=torch.int32)
        return _packed(offsets, case.q_len)
    first, _ = case.document_bounds()
    starts = torch.unique(first)
    lengths = torch.diff(starts, append=torch.tensor([case.q_len]))
    offsets = torch.cat([starts + b * case.q_len for b in range(case.batch)])
    offsets = torch.cat([offsets, torch.tensor([case.batch * case.q_len])]).to(device, torch.int32)
    return _packed(offsets, int(lengths.max()))


def _packed(offsets: Tensor, longest: int) -> Extra:
    return dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest)
