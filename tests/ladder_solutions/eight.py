import torch


def exercise(out_a, lse_a, out_b, lse_b):
    lse_max = torch.maximum(lse_a, lse_b)
    base = torch.where(lse_max == float("-inf"), 0.0, lse_max)
    a, b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = torch.where(a + b == 0.0, 1.0, a + b)
    return (out_a * a[:, None] + out_b * b[:, None]) / total[:, None], lse_max + torch.log(total)
