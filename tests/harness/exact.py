"""Small float64 tensors for the tests of the oracle."""

import torch

F64 = torch.float64


def column(*numbers):
    """One batch element, one head, a row per number, head_dim 1."""
    return torch.tensor(numbers, dtype=F64).reshape(1, 1, -1, 1)


def random_qkv(
    batch=2, q_heads=4, kv_heads=2, q_len=5, kv_len=7, head_dim=3, value_dim=4, seed=0, grad=False
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, q_heads, q_len, head_dim),
        (batch, kv_heads, kv_len, head_dim),
        (batch, kv_heads, kv_len, value_dim),
    )
    return [torch.randn(s, dtype=F64, generator=generator).requires_grad_(grad) for s in shapes]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
