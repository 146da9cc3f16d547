"""Results over disjoint keys, joined: what prefix sharing and ring attention end with."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The out and lse of attention over the keys of a and those of b together, from what it gave over each
    (`return_lse=True`): the merge of two states of the softmax (arXiv 1805.02867).

        lse = ln(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    out_a, out_b: [..., q_len, value_dim], of one shape, in any float dtype; computed in fp32 at least.
    lse_a, lse_b: [..., q_len], of one shape: [batch, q_heads, q_len], or [q_heads, tokens] beside
        out.transpose(0, 1) of packed sequences. A row without a key has -inf.

    Returns out in the dtype of out_a and lse in fp32 (fp64 if that is theirs); rows without a key in either
    give 0 and -inf. Associative and commutative up to rounding. A sink belongs to one of the two alone.
    Differentiable, as often as PyTorch is; NaN in what has lse = -inf stays out. Raises ValueError for shapes
    that do not fit.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"out_a.shape={tuple(out_a.shape)} and out_b.shape={tuple(out_b.shape)} must be equal, and "
            f"lse_a.shape={tuple(lse_a.shape)} and lse_b.shape={tuple(lse_b.shape)} the same without the "
            "last dimension"
        )
    dtype = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    has_a, has_b = lse_a != -torch.inf, lse_b != -torch.inf
    # Where there is no key, a number stands in for -inf, so that no derivative is -inf - -inf.
    a, b = lse_a.masked_fill(~has_a, 0.0), lse_b.masked_fill(~has_b, 0.0)
    both = torch.logaddexp(a, b)
    lse = torch.where(has_a & has_b, both, torch.where(has_a, a, torch.where(has_b, b, -torch.inf)))
    base = lse.masked_fill(~(has_a | has_b), 0.0)
    parts = []
    for out, part, has in ((out_a, a, has_a), (out_b, b, has_b)):
        weight = torch.exp(torch.where(has, part - base, 0.0)).masked_fill(~has, 0.0)
        parts.append(weight[..., None] * out.to(dtype).masked_fill(~has[..., None], 0.0))
    return (parts[0] + parts[1]).to(out_a.dtype), lse
