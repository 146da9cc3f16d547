"""fp8 by its definition: rounding to e4m3, scales, the rotation, and attention whose weights are rounded too.

    y     = x R                            R: the rotation, or none
    scale = max |y| / 448                  of finite numbers, over a tile of rows, a head or the tensor
    x8    = e4m3(y / scale)

    s     = scores(scale_q scale_k · q8 k8^T)                       fp32
    p8    = e4m3(exp(s - row_max) · share · peak)                   share: scale_v / the largest of the head
    out   = (p8 v8) · largest / peak / sum_j exp(s_j - row_max)

e4m3: Micikevicius et al. 2022, arXiv 2209.05433. All of it in fp32, and dense.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .yardstick import _scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .yardstick import Given

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
MOST_COLUMNS = 128  # of a block that is rotated in itself


def e4m3(x: Tensor) -> Tensor:
    """x rounded to the nearest e4m3 number, ties to even; beyond ±448 it is ±448, and NaN stays NaN."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def rotation(dim: int) -> Tensor:
    """[dim, dim] in fp64, orthogonal: in blocks of the largest power of two that divides dim, at most 128,
    Hadamard's matrix of that size with signs that are a bent function of the row (Rothaus 1976)."""
    side = min(MOST_COLUMNS, dim & -dim)
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < side:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    pairs = torch.tensor([bin(i & (i >> 1) & 0x55).count("1") for i in range(side)])
    signed = block * (1 - 2 * (pairs % 2))[:, None] / math.sqrt(side)
    return torch.block_diag(*[signed] * (dim // side))


class Quantized(NamedTuple):
    """x8 [B, H, N, D] in e4m3, and scale in fp32: [1, 1], [B, H] or [B, H, tiles]."""

    x8: Tensor
    scale: Tensor


def quantize(x: Tensor, per: str | int = "head", rotate: bool = False) -> Quantized:
    """x [B, H, N, D] in fp16, bf16 or fp32. per: "tensor", "head", or the rows of a tile."""
    y = x.float()
    if rotate:
        # As hardware does: sums of exact products of x and ±1, rounded to fp32, and then the factor.
        side = min(MOST_COLUMNS, x.shape[3] & -x.shape[3])
        signs = (rotation(x.shape[3]) * math.sqrt(side)).round().to(x.device)
        y = (x.double() @ signs).float() * side**-0.5
    length = y.shape[2]
    rows = per if isinstance(per, int) else max(1, length)
    padded = torch.nn.functional.pad(y, (0, 0, 0, -length % rows))
    sizes = padded.abs().masked_fill(~padded.isfinite(), 0)
    most = sizes.unflatten(2, (-1, rows)).amax((3, 4)) if sizes.numel() else sizes.new_zeros(*y.shape[:2], 1)
    scale = (most * (1 / LARGEST)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(most > 0, scale, 1.0)  # [B, H, tiles]
    if per == "tensor":
        scale = scale.amax() if scale.numel() else scale.new_ones(())
        scale = scale.reshape(1, 1, 1)
    of_rows = scale.repeat_interleave(rows, 2)[:, :, :length, None]
    x8 = e4m3(y * (1 / of_rows))
    return Quantized(x8, scale if isinstance(per, int) else scale[:, :, 0])


def fp8_attention(
    q8: Tensor, k8: Tensor, v8: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype,
    **given: Unpack[Given],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, Hq, Nq, Dv] in ``dtype`` and lse [B, Hq, Nq] in fp32, as plain fp8 attention computes them: the
    yardstick of kernels that do. Scales are those of each row, [B, H, N or 1, 1]; ``given`` as in
    ``attention``.
    """
    group = q8.shape[1] // k8.shape[1]
    s, v, kept = _scores(q8.float() * q_scale, k8.float() * k_scale, v8.float(), **given)
    row_max = s.amax(3, keepdim=True) if s.shape[3] else s.new_zeros(*s.shape[:3], 1)
    row_max = row_max.masked_fill(row_max == -math.inf, 0)
    p = torch.exp(s - row_max)
    row_sum = p.sum(3, keepdim=True)
    weights = p[..., : v.shape[2]]
    weights = weights if kept is None else weights * kept
    most = float(kept.max()) if kept is not None and kept.numel() else 1.0
    peak = 2.0 ** math.floor(math.log2(LARGEST / most)) if most > 0 else 1.0
    shared = (
        v_scale.expand(*v_scale.shape[:2], v.shape[2], 1).repeat_interleave(group, 1).mT
    )  # [B, Hq, 1, Nk]
    largest = shared.amax(3, keepdim=True) if v.shape[2] else shared.new_ones(1, 1, 1, 1)
    p8 = e4m3(weights * (shared / largest) * peak)
    out = (p8.float() @ v) * (largest / peak / torch.where(row_sum == 0, 1.0, row_sum))
    lse = (row_max + torch.log(row_sum))[..., 0]
    return out.to(dtype), lse
