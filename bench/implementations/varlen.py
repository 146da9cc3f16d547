"""PyTorch's varlen_attn: FlashAttention's kernels over packed sequences, [tokens, heads, dim].

PyTorch 2.11's takes as many key heads as query heads; later ones have enable_gqa.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, cannot_import, is_backward, is_cosine, refusal, scale_of

Tensor = torch.Tensor
REASONS = {
    "softcap": "varlen_attn has no softcap",
    "sink": "varlen_attn has no sink",
    "alibi": "varlen_attn has no ALiBi",
    "relative_position": "varlen_attn takes no relative position bias",
}
NEEDED = {"scale", "window_size"}


class Varlen(Implementation):
    name = "varlen_attn"
    module = "torch.nn.attention.varlen"
    differentiates_once = "varlen_attn's backward has no derivative, and its forward no forward mode"

    def function(self) -> Any:
        return importlib.import_module(self.module).varlen_attn

    def parameters(self) -> set[str]:
        """What this PyTorch's takes; nothing where it has none."""
        return set() if cannot_import(self.module) else {*inspect.signature(self.function()).parameters}

    def unsupported(self, case: Case, work: Work) -> str | None:
        if case.cache is not None:
            return "varlen_attn is set up here for packed sequences, not for a cache"
        if case.lengths is None:
            return "varlen_attn is for packed sequences; sdpa flash runs the same kernels on dense tensors"
        if case.dtype not in ("float16", "bfloat16"):
            return f"varlen_attn takes float16 and bfloat16, not {case.dtype}"
        if case.head_dim != case.value_dim:
            return f"varlen_attn needs head_dim = value_dim, not {case.head_dim} and {case.value_dim}"
        if is_cosine(case):
            return "varlen_attn has no cosine similarity"
        taken = self.parameters()
        if lacking := sorted(NEEDED - taken):
            return f"this PyTorch's varlen_attn takes no {' and no '.join(lacking)}"
        if case.q_heads != case.kv_heads and "enable_gqa" not in taken:
            return "this PyTorch's varlen_attn has no grouped heads"
        return refusal(case, REASONS)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        q, k, v = inputs[:3]
        function, offsets = self.function(), inputs.arguments["q_offsets"]
        options: dict[str, Any] = dict(scale=scale_of(case), window_size=window(case))
        if case.q_heads != case.kv_heads:
            options["enable_gqa"] = True

        def call() -> Tensor:
            out: Tensor = function(q, k, v, offsets, offsets, case.q_len, case.kv_len, **options)
            return out

        return Prepared(call, dict(q=q, k=k, v=v) if is_backward(work) else {})


def window(case: Case) -> tuple[int, int]:
    """Keys to the left and right of the query's own, -1 for no limit: causal is (-1, 0)."""
    left, right = case.features.get("window", (None, None))
    if "causal" in case.features:
        right = 0
    return -1 if left is None else left, -1 if right is None else right
