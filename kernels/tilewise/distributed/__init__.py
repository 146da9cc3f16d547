"""Attention over several GPUs, on PyTorch's own process groups and device meshes."""

from .attention import context_parallel_attention
from .sequence import join, positions, split
from .tensor_parallel import HeadParallel, tensor_parallel

__all__ = [
    "HeadParallel",
    "context_parallel_attention",
    "join",
    "positions",
    "split",
    "tensor_parallel",
]
