"""cuDNN's attention as JAX calls it: jax.nn.dot_product_attention(implementation="cudnn").

JAX computes on a stream of its own. The exchange by DLPack makes each side wait for the other on the GPU:
from_dlpack(torch tensor) lets JAX's stream wait for PyTorch's, from_dlpack(JAX array) the other way round. So
the arrays are exchanged within the call, which copies nothing, and CUDA events on PyTorch's stream enclose
what JAX does. Its memory is not PyTorch's, and is not measured.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

from ..results import Work
from .base import (
    Implementation,
    Prepared,
    is_backward,
    is_cosine,
    kept_pairs,
    learns,
    length_first,
    refusal,
    scale_of,
)
from .sdpa import added_scores

Tensor = torch.Tensor
REASONS = {
    "softcap": "jax.nn.dot_product_attention has no softcap",
    "sink": "jax.nn.dot_product_attention has no sink",
    "dropout": "jax.nn.dot_product_attention has no dropout",
    "cache": "jax.nn.dot_product_attention is set up here for dense tensors, not for a cache",
    "lengths": "jax.nn.dot_product_attention takes padded batches with their lengths, not packed sequences",
}


class JaxCudnn(Implementation):
    name = "jax cudnn"
    module = "jax"
    differentiates_once = "cuDNN's backward has no derivative in JAX, and its forward no forward mode"

    def unavailable(self, device: torch.device) -> str | None:
        # Else JAX takes three quarters of the GPU's memory when it is first used.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        reason = super().unavailable(device)
        if reason is None:
            jax: Any = importlib.import_module("jax")
            if jax.default_backend() != "gpu":
                return f"this JAX computes on {jax.default_backend()}, not on a GPU"
        return reason

    def unsupported(self, case: Case, work: Work) -> str | None:
        if case.dtype not in ("float16", "bfloat16"):
            return f"cuDNN's fused attention takes float16 and bfloat16, not {case.dtype}"
        if is_cosine(case):
            return "jax.nn.dot_product_attention has no cosine similarity"
        if case.head_dim != case.value_dim:
            return "jax.nn.dot_product_attention needs values of the shape of the keys"
        if learns(case, work):
            return "the bias is made ready in PyTorch before the call, and gets no gradient"
        return refusal(case, REASONS)

    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        jax: Any = importlib.import_module("jax")
        take = from_torch(jax)
        q, k, v = (length_first(x.detach()).contiguous() for x in inputs[:3])
        options, arrays = self.arguments(jax, case, inputs)

        # Arrays are arguments: what a compiled function closes over becomes a constant in its code.
        def attend(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
            return jax.nn.dot_product_attention(q, k, v, **arrays, **options)

        compiled = jax.jit(attend)

        def call() -> Tensor:
            return to_torch(compiled(take(q), take(k), take(v), arrays))

        if not is_backward(work):
            return Prepared(call, {}, length_first, length_first)

        def differentiate(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
            return jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)

        _, back = jax.jit(differentiate)(take(q), take(k), take(v), arrays)
        # What the forward keeps for the backward goes from one compiled function to the other.
        pull = jax.jit(lambda back, do: back(do))
        leaves = dict(q=q, k=k, v=v)
        return _Differentiable(call, leaves, length_first, length_first, pull=lambda do: pull(back, take(do)))

    @staticmethod
    def arguments(jax: Any, case: Case, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
        """The case in JAX's words: its options, and its arrays."""
        asks = case.features
        align, window = asks.get("causal"), asks.get("window")
        corner = align is not None and (case.q_len == case.kv_len or align == "top_left")
        dense = any(asks.get(name) for name in ("documents", "bool_mask")) or (
            align is not None and not corner
        )
        options: dict[str, Any] = dict(scale=scale_of(case), implementation="cudnn")
        arrays: dict[str, Any] = {}
        # cuDNN has windows to the left, within a causal mask.
        if corner and not dense and (window is None or (window[0] is not None and window[1] in (0, None))):
            options["is_causal"] = True
            if window is not None:
                options["local_window_size"] = (window[0], 0)
        else:
            keep = kept_pairs(case, inputs)
            if keep is not None:
                arrays["mask"] = from_torch(jax)(keep[None, None])
        with torch.no_grad():
            added = added_scores(case, inputs)
        if added is not None:
            added = added.to(inputs.q.dtype).reshape((1,) * (4 - added.dim()) + tuple(added.shape))
            arrays["bias"] = from_torch(jax)(added.contiguous())
        return options, arrays


class _Differentiable(Prepared):
    """With a backward by jax.vjp."""

    def __init__(self, *fields: Any, pull: Callable[[Tensor], Any]) -> None:
        super().__init__(*fields)
        self.pull = pull

    def backward(self, do: Tensor) -> Callable[[], Any]:
        do = self.native(do).contiguous()
        return lambda: [to_torch(x) for x in self.pull(do)]


def from_torch(jax: Any) -> Callable[[Tensor], Any]:
    """Arrays of JAX on the memory of tensors."""
    take: Callable[[Tensor], Any] = jax.dlpack.from_dlpack
    return lambda x: take(x.detach())


def to_torch(array: Any) -> Tensor:
    """A tensor on the memory of JAX's array."""
    found: Tensor = torch.utils.dlpack.from_dlpack(array)
    return found
