"""FlashInfer: its prefill over ragged batches, [tokens, heads, dim]; it has no backward."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, is_backward, is_cosine, length_first, refusal, scale_of
from .flash import packing

Tensor = torch.Tensor
WORKSPACE = 256 << 20  # bytes; its documentation asks for 128 MB at least

REASONS = {
    "bias": "flashinfer takes no additive bias",
    "relative_position": "flashinfer takes no relative position bias",
    "alibi": "flashinfer's ALiBi has slopes and an alignment of its own",
    "dropout": "flashinfer has no dropout",
    "sink": "flashinfer's ragged prefill has no sink",
    "bool_mask": "flashinfer wants a dense mask written out for every sequence of the batch",
}


class FlashInfer(Implementation):
    name = "flashinfer"
    module = "flashinfer"

    def unsupported(self, case: Case, work: Work) -> str | None:
        asks = case.features
        if is_backward(work):
            return "flashinfer has no backward"
        if case.dtype not in ("float16", "bfloat16"):
            return f"flashinfer takes float16 and bfloat16, not {case.dtype}"
        if is_cosine(case):
            return "flashinfer has no cosine similarity"
        if "window" in asks and (asks["window"][1] != 0 or "causal" not in asks):
            return "flashinfer's window is causal"
        if asks.get("causal") == "top_left" and case.q_len != case.kv_len:
            return "flashinfer aligns causal masks to the bottom right"
        return refusal(case, REASONS)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        module: Any = importlib.import_module(self.module)
        device, asks = inputs.q.device, case.features
        packed = case.lengths is not None
        if packed or "documents" in asks:
            rows = keys = packing(case, device)["cu_seqlens_q"]
        else:
            count = torch.arange(case.batch + 1, device=device, dtype=torch.int32)
            rows, keys = count * case.q_len, count * case.kv_len
        left, _ = asks.get("window", (None, None))
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            rows,
            keys,
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            head_dim_vo=case.value_dim,
            causal="causal" in asks,
            window_left=-1 if left is None else left,
            logits_soft_cap=asks.get("softcap"),
            sm_scale=scale_of(case),
            q_data_type=inputs.q.dtype,
        )
        q, k, v = (x.detach() for x in inputs[:3])
        q, k, v = (
            x.contiguous() if packed else length_first(x).contiguous().flatten(0, 1) for x in (q, k, v)
        )

        def standard(x: Tensor) -> Tensor:
            return x if packed else length_first(x.unflatten(0, (case.batch, -1)))

        return Prepared(lambda: wrapper.run(q, k, v), {}, standard)
