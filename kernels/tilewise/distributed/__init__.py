"""Attention over several GPUs, on PyTorch's own process groups and device meshes."""

from .sequence import join, positions, split

__all__ = ["join", "positions", "split"]
