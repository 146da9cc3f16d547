"""Entropy regularisation: keep attention from collapsing onto one key while a layer trains.

    python examples/entropy_regularisation.py

The entropy of each row's weights comes out of the same kernel as the result, and its gradient out of the same
backward: a penalty on rows below a target costs no matrix of weights.
"""

import torch

import tilewise as tw

torch.manual_seed(0)
target, heads, dim = 3.0, 4, 16
to_qkv = torch.nn.Parameter(torch.randn(3, heads, dim, heads * dim) / 5)
optimizer = torch.optim.Adam([to_qkv], lr=0.01)
x = torch.randn(2, 48, heads * dim)
wanted = x.unflatten(2, (heads, dim)).transpose(1, 2)

for step in range(10):
    q, k, v = torch.einsum("nld,thed->tnhle", x, to_qkv)
    out, found = tw.attention(q, k, v, return_stats=tw.Stats(entropy=True))
    penalty = (target - found.entropy).clamp(min=0).square().mean()
    loss = (out - wanted).square().mean() / 100 + penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 3 == 0:
        print(f"step {step}: entropy {found.entropy.mean():.2f} nats, loss {loss:.3f}")
