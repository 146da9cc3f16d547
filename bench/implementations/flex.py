"""PyTorch's FlexAttention: torch.compile(flex_attention), with a block mask and score functions.

On a CPU it runs uncompiled and only forward, which checks the set-up and times nothing. A sink is what its
users make of it: the result times sigmoid(lse - sink), compiled together with the rest. Packed sequences are
one long sequence under a block mask of documents, a contiguous cache is dense, under a mask of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config  # not imported with torch
import torch.nn.attention.flex_attention as module
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import (
    STATISTICS,
    Implementation,
    Known,
    Prepared,
    UnsupportedError,
    dense_mask,
    is_backward,
    is_cosine,
    normalized,
    refusal,
    relative_buckets,
    scale_of,
)
from .caches import is_even, why_no_cache

Tensor = torch.Tensor
Rule = Callable[..., Tensor]


class Flex(Implementation):
    name = "flex"
    needs_gpu = False
    statistics = ("max_logit",)  # the max scores of its auxiliary output
    differentiates_once = "flex_attention's backward has no derivative, and its forward no forward mode"

    def unsupported(self, case: Case, work: Work) -> str | None:
        return refusal(case, {"dropout": "flex_attention has no dropout"}) or why_no_cache(
            case, work, self.name, pages="flex_attention's own pages are an experiment, and are not asked for"
        )

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        q, k, v = inputs[:3]
        packed = case.lengths is not None
        on_gpu = q.device.type == "cuda"
        if is_backward(work) and not on_gpu:
            raise UnsupportedError("flex_attention has no backward on a CPU")
        if work in STATISTICS and not on_gpu:
            raise UnsupportedError("flex_attention returns no max scores on a CPU")
        if is_backward(work):
            # The same graph is walked many times, so that no buffer of it may be given away.
            torch._functorch.config.donated_buffer = False
        run = attend(case, inputs, work)
        if on_gpu:
            # A new shape must not turn into a dynamic one, which would be slower.
            run = torch.compile(run, dynamic=False, fullgraph=True)
        else:
            run = uncompiled(run)
        leaves = {name: x for name, x in dict(q=q, k=k, v=v, **inputs.learned).items() if x.requires_grad}
        if packed:
            return Prepared(lambda: run(*map(as_one, (q, k, v)))[0].transpose(0, 1), leaves)
        return Prepared(lambda: run(q, k, v), leaves)


def as_one(x: Tensor) -> Tensor:
    """[tokens, heads, dim] as one sequence [1, heads, tokens, dim]."""
    return x.transpose(0, 1)[None]


def attend(case: Case, inputs: Inputs, work: Work = "forward") -> Callable[[Tensor, Tensor, Tensor], Any]:
    """The case in FlexAttention's words, as f(q, k, v): out, or Known with the largest scores."""
    score, mask, scale = score_mod(case, inputs), block_mask(case, inputs), scale_of(case)
    grouped, cosine = case.q_heads != case.kv_heads, is_cosine(case)
    temperature = inputs.learned.get("temperature")
    sink, wants_max = inputs.learned.get("sink"), work in STATISTICS

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if cosine:
            q, k = normalized(q, k, temperature)
        options: dict[str, Any] = dict(score_mod=score, block_mask=mask, scale=scale, enable_gqa=grouped)
        if sink is None and not wants_max:
            return flex_attention(q, k, v, **options)
        wanted = AuxRequest(lse=sink is not None, max_scores=wants_max)
        out, aux = flex_attention(q, k, v, **options, return_aux=wanted)
        if sink is not None:
            share = torch.sigmoid(aux.lse - sink.float()[:, None])
            out = (out * share[..., None]).to(out.dtype)
        return Known(out, aux.max_scores) if wants_max else out

    return run


def uncompiled(run: Rule) -> Rule:
    """Without the compiler, which flex_attention calls by itself where nobody else does."""
    switch = patch.object(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def call(*tensors: Tensor) -> Tensor:
        with switch:
            return run(*tensors)

    return call


def block_mask(case: Case, inputs: Inputs) -> BlockMask | None:
    rules = mask_rules(case, inputs)
    if not rules:
        return None

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = rules[0](b, h, i, j)
        for rule in rules[1:]:
            keep = keep & rule(b, h, i, j)
        return keep

    # Queries and keys of packed sequences are as many.
    q_len, kv_len = (case.q_len, case.kv_len) if case.lengths is None else (case.tokens, case.tokens)
    batch = None if is_even(case) else case.batch
    return create_block_mask(mask_mod, batch, None, q_len, kv_len, device=inputs.q.device)


def mask_rules(case: Case, inputs: Inputs) -> list[Rule]:
    asks = case.features
    if not is_even(case):
        return filled_rules(case, inputs)
    moved = case.kv_len - case.q_len if asks.get("causal", "bottom_right") == "bottom_right" else 0
    left, right = asks.get("window", (None, None))
    rules: list[Rule] = []
    if "causal" in asks:
        rules.append(lambda b, h, i, j: j <= i + moved)
    if left is not None:
        rules.append(lambda b, h, i, j: j >= i + moved - left)
    if right is not None:
        rules.append(lambda b, h, i, j: j <= i + moved + right)
    if "documents" in asks:
        ids = case.document_ids().to(inputs.q.device)
        rules.append(lambda b, h, i, j: ids[i] == ids[j])
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths)
        of = torch.repeat_interleave(torch.arange(case.batch), lengths).to(inputs.q.device)
        rules.append(lambda b, h, i, j: of[i] == of[j])
    if asks.get("bool_mask"):
        dense = dense_mask(inputs)
        rules.append(lambda b, h, i, j: dense[i, j])
    return rules


def filled_rules(case: Case, inputs: Inputs) -> list[Rule]:
    """Of sequences that fill a cache to lengths that differ."""
    asks, lengths, q_len = case.features, inputs.arguments["kv_lens"], case.q_len
    left, right = asks.get("window", (None, None))
    rules: list[Rule] = [lambda b, h, i, j: j < lengths[b]]
    if "causal" in asks:
        rules.append(lambda b, h, i, j: j <= i + lengths[b] - q_len)
    if left is not None:
        rules.append(lambda b, h, i, j: j >= i + lengths[b] - q_len - left)
    if right is not None:
        rules.append(lambda b, h, i, j: j <= i + lengths[b] - q_len + right)
    return rules


def score_mod(case: Case, inputs: Inputs) -> Rule | None:
    """The modifiers in tilewise's order: relative position, ALiBi, softcap, bias."""
    asks, learned = case.features, inputs.learned
    moved = case.kv_len - case.q_len
    steps: list[Rule] = []
    if "relative_position" in asks:
        table = learned["table"]
        buckets, most = relative_buckets(inputs)
        steps.append(
            lambda s, b, h, i, j: s + table[h, buckets[torch.clamp(j - i - moved, -most, most) + most]]
        )
    if asks.get("alibi"):
        slopes = learned["slopes"]
        steps.append(lambda s, b, h, i, j: s - slopes[h] * torch.abs(j - i - moved))
    if "softcap" in asks:
        cap = asks["softcap"]
        steps.append(lambda s, b, h, i, j: cap * torch.tanh(s / cap))
    if "bias" in asks:
        bias = learned["bias"]
        steps.append(bias_rule(bias))
    if not steps:
        return None

    def modify(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for step in steps:
            s = step(s, b, h, i, j)
        return s

    return modify


def bias_rule(bias: Tensor) -> Rule:
    """s + bias, whose dimensions of size 1 have one index."""
    by_batch, by_head, by_row, by_key = (size > 1 for size in bias.shape)
    return lambda s, b, h, i, j: s + bias[b * by_batch, h * by_head, i * by_row, j * by_key]
