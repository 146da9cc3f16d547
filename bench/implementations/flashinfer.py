"""FlashInfer: its prefill over ragged batches, [tokens, heads, dim]; it has no backward.

A cache goes through its wrappers for pages, of decode where a sequence has one query: a contiguous one as
pages that follow each other, so that its keys can be split as those of any other.
"""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, is_backward, is_cosine, length_first, refusal, scale_of
from .flash import packing

Tensor = torch.Tensor
PAGE = 64  # rows of the pages that a contiguous cache is taken for
GROUP = 4  # query heads a key head from which its documentation advises tensor cores for decode
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
    differentiates_once = "flashinfer has no backward, and no forward mode"

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
        if case.cache is not None and case.head_dim != case.value_dim:
            return "flashinfer's caches have head_dim = value_dim"
        return refusal(case, REASONS)

    def cached_call(self, case: Case, inputs: Inputs) -> Prepared:
        module: Any = importlib.import_module(self.module)
        assert case.cache is not None
        asks, q = case.features, inputs.q
        k, v, size, pages = in_pages(case, inputs)
        used = [-(-length // size) for length in case.cache]
        indices = torch.cat([row[:count] for row, count in zip(pages, used, strict=True)])
        ends = torch.tensor([0, *accumulate(used)], dtype=torch.int32)
        last = torch.tensor([(length - 1) % size + 1 for length in case.cache], dtype=torch.int32)
        which = (ends.to(q.device), indices, last.to(q.device))
        heads = (case.q_heads, case.kv_heads, case.head_dim, size)
        left, _ = asks.get("window", (None, None))
        options: dict[str, Any] = dict(
            window_left=-1 if left is None else left, logits_soft_cap=asks.get("softcap"),
            sm_scale=scale_of(case), q_data_type=q.dtype,
        )  # fmt: skip
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
        if case.q_len == 1:
            cores = case.q_heads // case.kv_heads >= GROUP
            wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=cores)
            wrapper.plan(*which, *heads, **options)
        else:
            count = torch.arange(case.batch + 1, device=q.device, dtype=torch.int32)
            wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(count * case.q_len, *which, *heads, causal="causal" in asks, **options)
        rows = length_first(q).contiguous().flatten(0, 1)
        return Prepared(
            lambda: wrapper.run(rows, (k, v)),
            standard=lambda x: length_first(x.unflatten(0, (case.batch, -1))),
        )

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        if case.cache is not None:
            return self.cached_call(case, inputs)
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


def in_pages(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, int, Tensor]:
    """The cache as [pages, page_size, kv_heads, dim], the page_size, and which pages are whose."""
    k, v = inputs.k, inputs.v
    if case.page_size is not None:
        return k, v, case.page_size, inputs.arguments["pages"]
    pages = -(-case.kv_len // PAGE)
    room = pages * PAGE - case.kv_len
    k, v = (torch.nn.functional.pad(length_first(x), (0, 0, 0, 0, 0, room)) for x in (k, v))
    k, v = (x.contiguous().flatten(0, 1).unflatten(0, (-1, PAGE)) for x in (k, v))
    which = torch.arange(case.batch * pages, device=k.device, dtype=torch.int32)
    return k, v, PAGE, which.view(case.batch, pages)
