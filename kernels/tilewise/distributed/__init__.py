"""Attention over several GPUs, on PyTorch's own process groups and device meshes."""
