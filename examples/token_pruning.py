"""Token pruning: keep the keys that the last queries look at (SnapKV, arXiv 2404.14469; H2O, arXiv
2306.14048).

    python examples/token_pruning.py

The mass of a key is the weight that it receives. That of the last 16 queries says which 1 in 4 of a long
prompt's keys each head keeps for what is still to come.
"""

import torch

import tilewise as tw

torch.manual_seed(0)
q = torch.randn(1, 8, 256, 32) + 1  # queries have something in common
k, v = torch.randn(2, 1, 2, 256, 32)
k[:, :, ::16] += 1  # which some of the keys have, too
last = torch.arange(256) >= 240
_, found = tw.attention(q, k, v, mask=tw.Causal(), return_stats=tw.Stats(key_mass=last))
kept = found.key_mass.topk(64, dim=2).indices.sort(dim=2).values  # [batch, kv_heads, 64]
few_k, few_v = (x.gather(2, kept[..., None].expand(-1, -1, -1, 32)) for x in (k, v))

query = q[:, :, -1:]
whole, pruned = tw.attention(query, k, v), tw.attention(query, few_k, few_v)
share = found.key_mass.gather(2, kept).sum() / found.key_mass.sum()
off = (whole - pruned).norm() / whole.norm()
print(f"64 of 256 keys have {share:.0%} of the mass; the next result is off by {off:.0%}")
