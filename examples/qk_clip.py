"""QK-clip: keep attention's logits below a limit while a layer trains (MuonClip, Kimi K2, arXiv 2507.20534).

    python examples/qk_clip.py

After each step, a head whose largest logit has passed the limit has its query and key weights multiplied by
the square root of limit / largest: its logits shrink by limit / largest.
"""

import torch

import tilewise as tw

torch.manual_seed(0)
heads, dim, limit = 4, 16, 6.0
to_qkv = torch.nn.Parameter(torch.randn(3, heads, dim, heads * dim) / 4)
optimizer = torch.optim.Adam([to_qkv], lr=0.01)
x = torch.randn(2, 48, heads * dim)

for step in range(5):
    q, k, v = torch.einsum("nld,thed->tnhle", x, to_qkv)
    out, found = tw.attention(q, k, v, mask=tw.Causal(), return_stats=tw.Stats(max_logit=True))
    optimizer.zero_grad()
    (out - x.unflatten(2, (heads, dim)).transpose(1, 2)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        largest = found.max_logit.amax((0, 2))  # [heads]
        to_qkv[:2] *= (limit / largest).clamp(max=1.0).sqrt()[:, None, None]
    print(f"step {step}: largest logit of each head {[round(x, 1) for x in largest.tolist()]}")
