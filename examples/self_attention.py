"""A first attention layer three ways: by the textbook, taken over by tilewise, and from scratch with heads.

    python examples/self_attention.py

Runs anywhere: on a GPU the fused kernel computes it, on a CPU plain PyTorch does.
"""

import torch
from torch import nn

import tilewise
from tilewise.nn import SelfAttention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x = torch.randn(10, 512, device=device)  # a sequence of 10 vectors, no batch dimension

# The textbook: three projections, then softmax(Q Kᵀ / √d) V.
to_q, to_k, to_v = (nn.Linear(512, 256, device=device) for _ in range(3))


def textbook(x: torch.Tensor) -> torch.Tensor:
    q, k, v = to_q(x), to_k(x), to_v(x)
    return torch.softmax(q @ k.T / 256**0.5, dim=-1) @ v


# The same weights in one module: one matmul for Q, K and V, one kernel for the rest.
attend = SelfAttention.from_linears(to_q, to_k, to_v)

with torch.no_grad():
    difference = (attend(x) - textbook(x)).abs().max().item()
print(attend)
print(f"largest difference from the textbook: {difference:.1e}")

# From scratch: a batch of 4, 8 query heads that share 2 heads of keys and values, no look ahead.
decoder = SelfAttention(512, heads=8, kv_heads=2, out_projection=True, qk_norm="rms", device=device)
with torch.no_grad():
    y = decoder(torch.randn(4, 10, 512, device=device), mask=tilewise.Causal())
print(f"grouped heads, causal: {tuple(y.shape)}")
