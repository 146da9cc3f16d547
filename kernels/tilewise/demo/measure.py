"""What the kernel did inside each layer: its error beside PyTorch's own, and the time of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import tilewise_reference

from ..api import attention
from ..nn import AttentionCore
from .encoder import Encoder


@dataclass
class LayerReport:
    """One layer over all batches: largest absolute errors against float64, and seconds."""

    kernel_error: float = 0.0
    torch_error: float = 0.0
    kernel_seconds: float = 0.0
    torch_seconds: float = 0.0


Seen = Callable[[int, Tensor, Tensor], None]


@contextmanager
def watch(encoder: Encoder, reports: list[LayerReport], seen: Seen) -> Iterator[None]:
    """While it lasts, add what every attention layer of `encoder` does to its entry in `reports`, and call
    `seen(layer, q, k)` with each layer's queries and keys [batch, heads, length, head_dim]."""
    hooks = []
    cores = [module for module in encoder.modules() if isinstance(module, AttentionCore)]
    for i, core in enumerate(cores):
        observer = _Observer(i, reports[i], seen)
        hooks.append(core.register_forward_pre_hook(observer.before))
        hooks.append(core.register_forward_hook(observer.after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Observer:
    """The two hooks of one layer."""

    def __init__(self, layer: int, report: LayerReport, seen: Seen) -> None:
        self.layer, self.report, self.seen = layer, report, seen
        self.started = 0.0

    def before(self, core: AttentionCore, inputs: tuple[Tensor, ...]) -> None:
        self.started = time.perf_counter()

    def after(
        self, core: AttentionCore, inputs: tuple[Tensor, ...], options: dict[str, Any], out: Tensor
    ) -> None:
        elapsed = time.perf_counter() - self.started
        q, k, v = inputs
        mask = options["mask"]
        kv_len = k.shape[2]
        keep = (torch.arange(kv_len, device=k.device) < mask.lengths[:, None])[:, None, None]  # [B, 1, 1, Nk]

        def by_torch() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

        padding = tilewise_reference.masks.padding(mask.lengths, kv_len)
        exact = tilewise_reference.attention(q, k, v, mask=padding, dtype=torch.float64)
        report = self.report
        report.kernel_error = max(report.kernel_error, largest_difference(out, exact))
        report.torch_error = max(report.torch_error, largest_difference(by_torch(), exact))
        # On a GPU a call returns before its work is done, and the first one compiles: time it anew there.
        report.kernel_seconds += seconds(lambda: core.forward(q, k, v, **options)) if q.is_cuda else elapsed
        report.torch_seconds += seconds(by_torch)
        self.seen(self.layer, q, k)


def largest_difference(out: Tensor, exact: Tensor) -> float:
    """max |out - exact|, as a Python float."""
    return (out.double() - exact).abs().max().item()


def seconds(run: Callable[[], Tensor]) -> float:
    """The time of one call: the median of many on a GPU, of a single one on a CPU."""
    if torch.cuda.is_available() and run().is_cuda:
        return float(triton.testing.do_bench(run, return_mode="median")) / 1000
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def attention_weights(q: Tensor, k: Tensor, impl: str) -> Tensor:
    """softmax(q kᵀ / √head_dim) [length, length] of one head, q and k [length, head_dim], fp32.

    Computed by the kernel itself: with V = identity, row i of the output is row i of the weights.
    """
    identity = torch.eye(k.shape[0], dtype=q.dtype, device=q.device)
    weights = attention(q[None, None], k[None, None], identity[None, None], impl=impl)
    return weights[0, 0].float()


def similarities(embeddings: Tensor) -> dict[str, Tensor]:
    """[n, width] -> the three similarities between all pairs, each [n, n], fp64."""
    e = embeddings.double()
    unit = F.normalize(e, dim=-1)
    dot = e @ e.T
    return {"dot": dot, "scaled dot": dot / e.shape[1] ** 0.5, "cosine": unit @ unit.T}
