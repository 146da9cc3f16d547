"""Attention on numbers of 8 bits, and what makes them: tilewise's, and FlashAttention 3's.

All multiply the same numbers, those of `tilewise.quantize` with a scale for each head, and are judged by what
these stand for. Made before the call they are not timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import tilewise
from tilewise.quantized import Quantized
from tilewise.tools.inputs import Inputs, case_inputs, fp8_shapes
from tilewise_reference.cases import Case

from ..results import Work
from .base import Implementation, Prepared, scale_of
from .flash import REASONS, Extra, FlashAttention
from .ours import Tilewise

Tensor = torch.Tensor
DTYPE = "float8_e4m3fn"


def numbers_of(inputs: Inputs, **how: Any) -> Quantized:
    with torch.no_grad():
        return tilewise.quantize(inputs.q, inputs.k, inputs.v, **how)


def bytes_of(numbers: Quantized) -> int:
    return sum(x.untyped_storage().nbytes() for x in (*numbers[:3], *numbers.scales[:3]))


def why_no_sequences(case: Case) -> str | None:
    if case.sequences is not None:
        return "fp8 is set up here for dense tensors, not for packed sequences or a cache"
    return None


class TilewiseFp8(Tilewise):
    """in_call: q, k and v come in 16 bits, and are made fp8 numbers each time."""

    only = ("fp8",)

    def __init__(self, impl: str, in_call: bool = False) -> None:
        super().__init__(impl)
        self.in_call, self.name = in_call, f"tilewise {impl}, fp8{' and quantize' if in_call else ''}"
        self.dtype = DTYPE

    def unavailable(self, device: torch.device) -> str | None:
        x = torch.empty(1, 1, 1, 16, device=device, dtype=torch.float16)
        *x8, scales = fp8_shapes(x, x, x)
        return "; ".join(tilewise.why_not(*x8, scales=scales, impl=self.impl)) or None

    def unsupported(self, case: Case, work: Work) -> str | None:
        if reason := why_no_sequences(case):
            return reason
        inputs = case_inputs(case, "meta")
        *x8, scales = fp8_shapes(*inputs[:3])
        found = tilewise.why_not(*x8, **inputs.arguments, scales=scales, impl=self.impl)
        return "; ".join(found) or None

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        numbers, options = numbers_of(inputs), dict(inputs.arguments, impl=self.impl)

        def attend(x: Quantized) -> Tensor:
            out: Tensor = tilewise.attention(*x[:3], scales=x.scales, **options)
            return out

        if self.in_call:
            return Prepared(lambda: attend(numbers_of(inputs)), numbers=numbers)
        return Prepared(lambda: attend(numbers), numbers=numbers, extra_bytes=bytes_of(numbers))


class Flash3(FlashAttention):
    """FlashAttention 3, for its fp8 alone: https://github.com/Dao-AILab/flash-attention, hopper/."""

    name = "flash_attn 3, fp8"
    module = "flash_attn_interface"
    dtype = DTYPE
    only = ("fp8",)
    reasons = REASONS | dict(
        dropout="has no dropout",
        alibi="has no ALiBi",
        sink="has no sink",
        documents="takes no documents here",
    )

    def unsupported(self, case: Case, work: Work) -> str | None:
        if reason := why_no_sequences(case):
            return reason
        if case.dtype != "bfloat16":
            return f"{self.name} returns bfloat16, not {case.dtype}"
        if case.q_heads != case.kv_heads:
            return f"{self.name} has a scale of q for each key head, not for each of the {case.q_heads} heads"
        if case.head_dim != case.value_dim or case.head_dim not in (64, 128, 256):
            return f"{self.name} is asked for dimensions of 64, 128 and 256, the same of keys and values"
        return super().unsupported(case, work)

    def options(self, case: Case, inputs: Inputs) -> Extra:
        left, right = case.features.get("window", (None, None))
        q_scale, k_scale, v_scale = inputs.arguments["scales"][:3]  # [batch, heads]
        return dict(
            q_descale=q_scale,
            k_descale=k_scale,
            v_descale=v_scale,
            softmax_scale=scale_of(case),
            causal="causal" in case.features,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=case.features.get("softcap", 0.0),
        )

    def finish(self, returned: Any, case: Case, inputs: Inputs) -> Tensor:
        return returned[0] if isinstance(returned, tuple) else returned  # with or without lse, by version

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        numbers = numbers_of(inputs)
        prepared = super().prepare(case, Inputs(*numbers[:3], dict(scales=numbers.scales), {}), work)
        return replace(prepared, numbers=numbers, extra_bytes=bytes_of(numbers))


class Quantize(Implementation):
    """`tilewise.quantize` of q, k and v. What it returns is judged, not an attention."""

    needs_gpu = False
    only = ("quantize",)

    def __init__(self, impl: str, rotate: bool = False) -> None:
        self.impl, self.rotate = impl, rotate
        self.name = f"tilewise {impl} quantize{', rotated' if rotate else ''}"

    def unavailable(self, device: torch.device) -> str | None:
        return TilewiseFp8(self.impl).unavailable(device)

    def unsupported(self, case: Case, work: Work) -> str | None:
        return why_no_sequences(case)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        return Prepared(lambda: numbers_of(inputs, rotate=self.rotate, impl=self.impl))
