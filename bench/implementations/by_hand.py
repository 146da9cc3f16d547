"""PyTorch as a user writes it who wants to see the weights: all scores in memory, and statistics of them.

The matmuls are in the dtype of the case, the softmax and what is taken from it in fp32, as in models' eager
attention. Scores are computed once: out comes from the weights that the statistics come from.
"""

from __future__ import annotations

import math

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import STATISTICS, Implementation, Known, Prepared, is_cosine, refusal, scale_of, written_out
from .sdpa import attn_mask

Tensor = torch.Tensor
REASONS = {
    name: f"the scores by hand are set up for masks and what is added, not for {words}"
    for name, words in dict(
        softcap="a softcap", sink="a sink", dropout="dropout", lengths="packed sequences", cache="a cache"
    ).items()
}


class ByHand(Implementation):
    name = "pytorch by hand"
    needs_gpu = False
    statistics = STATISTICS["statistics"]

    def unsupported(self, case: Case, work: Work) -> str | None:
        if work not in STATISTICS:
            return "the scores by hand are written for their statistics alone"
        if is_cosine(case):
            return "the scores by hand are products, not cosines"
        return refusal(case, REASONS)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        q, k, v = inputs[:3]
        mask, scale, wants_all = attn_mask(case, inputs), scale_of(case), work == "statistics"

        def call() -> Known:
            grouped = (q * scale).unflatten(1, (case.kv_heads, -1))
            s = (grouped @ k[:, :, None].mT).flatten(1, 2)  # [batch, q_heads, q_len, kv_len]
            if mask is not None:
                s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
            p = torch.softmax(s, dim=3, dtype=torch.float32)
            weights = p.to(v.dtype).unflatten(1, (case.kv_heads, -1))
            out = (weights @ v[:, :, None]).flatten(1, 2)
            max_logit = s.amax(3).float()
            if not wants_all:
                return Known(out, max_logit)
            entropy = torch.special.entr(p).sum(3)
            key_mass = p.sum(2).unflatten(1, (case.kv_heads, -1)).sum(2)
            return Known(out, max_logit, entropy, key_mass)

        return Prepared(call, extra_bytes=written_out(mask, inputs))
