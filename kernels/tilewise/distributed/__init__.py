"""Attention over several GPUs, on PyTorch's own process groups and device meshes."""

from .attention import context_parallel_attention
from .sequence import join, positions, split

__all__ = ["context_parallel_attention", "join", "positions", "split"]
