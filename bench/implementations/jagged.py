"""Packed sequences as scaled_dot_product_attention takes them: nested tensors in the jagged layout.

Their shortest and longest lengths are given, so that nothing waits for the GPU to tell them. They have no
grouped heads: keys and values are repeated within the call, for there is no other way to have them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from .base import is_cosine, scale_of

Tensor = torch.Tensor
MASKED = ("window", "alibi", "relative_position")  # what an attn_mask would have to say


def why_not_jagged(case: Case, backend: str | None) -> str | None:
    """Why nested tensors cannot do this; None if they can."""
    if any(case.features.get(name) for name in MASKED):
        return "nested tensors take no attn_mask, which this case needs"
    if is_cosine(case):
        return "nested tensors are not normalised here, and have no cosine similarity"
    if backend == "math" and "causal" in case.features:
        return "the math backend has no causal mask for nested tensors"
    return None


def jagged_call(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """A call from [tokens, heads, dim] to [tokens, heads, dim]."""
    assert case.lengths is not None
    q, k, v = inputs[:3]
    offsets, ends = inputs.arguments["q_offsets"], (min(case.lengths), max(case.lengths))
    causal, scale, group = "causal" in case.features, scale_of(case), case.q_heads // case.kv_heads

    def nested(x: Tensor) -> Tensor:
        sequences: Tensor = torch.nested.nested_tensor_from_jagged(
            x, offsets, min_seqlen=ends[0], max_seqlen=ends[1]
        )
        return sequences.transpose(1, 2)

    def repeated(x: Tensor) -> Tensor:
        return x if group == 1 else x.repeat_interleave(group, dim=1)

    def call() -> Tensor:
        a, b, c = nested(q), nested(repeated(k)), nested(repeated(v))
        out = F.scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale)
        return out.transpose(1, 2).values()

    return call
