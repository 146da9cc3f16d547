"""PyTorch's scaled_dot_product_attention, one backend at a time: it may not choose another in silence.

Masks and biases are handed over as attn_mask, made ready outside of what is timed unless something in them is
learned. The cosine is computed by normalising q and k within the call, for there is no other way to have it.
Packed sequences are nested tensors: jagged.py. A contiguous cache is a dense call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import (
    Implementation,
    Prepared,
    UnsupportedError,
    is_backward,
    is_cosine,
    kept_pairs,
    learns,
    normalized,
    refusal,
    relative_buckets,
    scale_of,
    written_out,
)
from .caches import filled, is_even, why_no_cache
from .jagged import jagged_call, why_not_jagged

Tensor = torch.Tensor
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REASONS = {
    "softcap": "scaled_dot_product_attention has no softcap, and an attn_mask cannot say it",
    "sink": "scaled_dot_product_attention has no sink, and returns no lse to add one with",
}
NO_MASK = "the flash backend takes no attn_mask, which this case needs"
ADDED = ("bias", "alibi", "relative_position")  # scores that add to s, in an attn_mask


class Sdpa(Implementation):
    def __init__(self, backend: str | None) -> None:
        """None: the backend that PyTorch chooses by itself, as in its users' code."""
        self.backend = backend
        self.name = f"sdpa {backend}" if backend else "sdpa"
        self.needs_gpu = backend not in (None, "math")
        if backend not in (None, "math"):
            self.differentiates_once = (
                f"PyTorch has no derivative of the {backend} backend's backward, and no forward mode of it"
            )

    def unsupported(self, case: Case, work: Work) -> str | None:
        reason = refusal(case, REASONS) or why_no_cache(
            case, work, self.name, pages="scaled_dot_product_attention takes no pages",
            lengths=NO_MASK if self.backend == "flash" else "",
        )  # fmt: skip
        if reason is None and case.lengths is not None:
            return why_not_jagged(case, self.backend)
        if reason is None and self.backend == "flash" and _others(case):
            return NO_MASK
        return reason

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        if case.lengths is None:
            attend, extra = self.dense_call(case, inputs, work)
        else:
            attend, extra = jagged_call(case, inputs), 0

        def call() -> Tensor:
            if self.backend is None:
                return attend()
            with sdpa_kernel(BACKENDS[self.backend]):
                return attend()

        with torch.set_grad_enabled(is_backward(work)):
            _try(call, self.name)
        learned = dict(zip("qkv", inputs[:3], strict=True)) | inputs.learned
        leaves = {name: x for name, x in learned.items() if x.requires_grad}
        return Prepared(call, leaves, extra_bytes=extra)

    def dense_call(self, case: Case, inputs: Inputs, work: Work) -> tuple[Callable[[], Tensor], int]:
        """The call, and the bytes of what was made ready for it."""
        asks, (q, k, v) = case.features, inputs[:3]
        options: dict[str, Any] = dict(
            scale=scale_of(case), dropout_p=asks.get("dropout", 0.0), enable_gqa=case.q_heads != case.kv_heads
        )
        mask: Callable[[], Any] = lambda: None  # noqa: E731
        extra = 0
        if not is_even(case):
            made = filled(case, inputs)
            mask = lambda: made  # noqa: E731
            extra = written_out(made, inputs)
        elif _is_triangle(case):
            options["is_causal"] = True
        elif _is_lower_right(case) and self.backend in ("flash", "efficient"):
            lower_right = causal_lower_right(case.q_len, case.kv_len)
            mask = lambda: lower_right  # noqa: E731
        elif learns(case, work) and any(asks.get(name) for name in ADDED):
            mask = lambda: attn_mask(case, inputs)  # noqa: E731
        else:
            with torch.no_grad():
                ready = attn_mask(case, inputs)
            mask = lambda: ready  # noqa: E731
            extra = written_out(ready, inputs)
        cosine, temperature = is_cosine(case), inputs.learned.get("temperature")

        def attend() -> Tensor:
            a, b = normalized(q, k, temperature) if cosine else (q, k)
            return F.scaled_dot_product_attention(a, b, v, attn_mask=mask(), **options)

        return attend, extra


def _try(call: Callable[[], Any], name: str) -> None:
    """Run once; where the backend turns the case down, say why in its own words: it warns them."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            words = [str(warning.message).split(" (Triggered")[0].strip() for warning in heard]
            # The other backends' warnings say only that they were switched off.
            said = [text for text in words if "disabled" not in text and "because:" not in text]
            raise UnsupportedError("; ".join(dict.fromkeys(said)) or f"{name}: {error}") from None


def _is_triangle(case: Case) -> bool:
    """Whether the case is what is_causal=True means, alone: aligned to the top left."""
    asks = case.features
    if _others(case) or "causal" not in asks:
        return False
    return case.q_len == case.kv_len or asks["causal"] == "top_left"


def _is_lower_right(case: Case) -> bool:
    """Whether the case is causal, aligned to the bottom right, and masks something: one query sees all."""
    return "causal" in case.features and not _others(case) and not _is_triangle(case) and case.q_len > 1


def _others(case: Case) -> bool:
    """Whether an attn_mask must say something besides causal."""
    asks = case.features
    return any(asks.get(name) for name in (*ADDED, "bool_mask", "documents", "window"))


def attn_mask(case: Case, inputs: Inputs) -> Tensor | None:
    """The masks, as bool [q_len, kv_len]; with something added, all in one tensor of q's dtype; None where
    nothing is masked or added."""
    keep, added = kept_pairs(case, inputs), added_scores(case, inputs)
    if added is None:
        return keep
    if keep is not None:
        added = added.masked_fill(~keep, -math.inf)
    return added.to(inputs.q.dtype)


def added_scores(case: Case, inputs: Inputs) -> Tensor | None:
    """What is added to the scores, broadcastable to [batch, q_heads, q_len, kv_len]; differentiable."""
    asks, learned = case.features, inputs.learned
    terms: list[Tensor] = []
    # Both align to the bottom right by default, as case_inputs leaves them.
    row = torch.arange(case.q_len, device=inputs.q.device)[:, None] + case.kv_len - case.q_len
    distance = torch.arange(case.kv_len, device=inputs.q.device) - row
    if "relative_position" in asks:
        buckets, most = relative_buckets(inputs)
        terms.append(learned["table"][:, buckets[distance.clamp(-most, most) + most].long()])
    if asks.get("alibi"):
        terms.append(-learned["slopes"][:, None, None] * distance.abs())
    if "bias" in asks:
        terms.append(learned["bias"])
    if not terms:
        return None
    return terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])
