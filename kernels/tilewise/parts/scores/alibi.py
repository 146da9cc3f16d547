"""ALiBi: a penalty that grows with the distance between query and key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise_reference.scores as dense

from ..aligned import Aligned, check_align
from ..numerics import widen
from ..sequences import row_shift
from ..shape import PARAMETERS, Align, Shape, broadcast_strides, check_dtype, misfits
from .score import BoundScore, Parameter, Score, Twin, padded_sizes


@triton.jit
def alibi_score(s, batch, head, q_idx, kv_idx, args):
    slopes_ptr, strides, shift_args = args
    slope = tl.load(slopes_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1])
    distance = kv_idx - q_idx - row_shift(batch, shift_args)
    return s - widen(slope) * tl.abs(distance).to(tl.float32)


@triton.jit
def alibi_by_slope(s, batch, head, q_idx, kv_idx, args):
    return -tl.abs(kv_idx - q_idx - row_shift(batch, args[2])).to(tl.float32)


class ALiBi(Aligned, Score):
    """s becomes s - slope · |key position - query position| (arXiv 2108.12409).

    slopes: tensor [q_heads] or [batch, q_heads]; `alibi_slopes(q_heads)` gives the paper's.
    align: where the queries stand among the keys, as in `Causal`.
    """

    FIELDS = ("slopes", "align")

    def __init__(self, slopes: torch.Tensor, align: Align = None) -> None:
        check_align(align)
        if isinstance(slopes, int):
            raise ValueError(f"{slopes=} must be a tensor [q_heads]: ALiBi(tilewise.alibi_slopes({slopes}))")
        check_dtype("slopes", slopes, PARAMETERS)
        self.slopes, self.align = slopes, align

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"slopes": self.slopes, **super().tensors()}

    def misfits(self, shape: Shape) -> list[str]:
        return misfits("slopes", self.slopes, shape.scores[:2]) + super().misfits(shape)

    def bind(self, shape: Shape) -> BoundScore:
        strides = broadcast_strides(self.slopes, shape.scores[:2])
        return BoundScore(alibi_score, (self.slopes, strides, shape.shift_args(self.align)))

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        return {"slopes": Parameter(alibi_by_slope, padded_sizes(self.slopes[..., None, None]))}

    def twin(self, shape: Shape) -> Twin:
        return dense.alibi(self.slopes, shape.q_len, shape.kv_len, self.align)


def alibi_slopes(q_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The slopes of the ALiBi paper (section 3), [q_heads] fp32: 2^(-8/n), 2^(-16/n), … for n heads; where n
    is no power of two, those of the power of two below it and every other one of the power above."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 1 << (q_heads.bit_length() - 1)
    slopes = geometric(below) + geometric(2 * below)[::2][: q_heads - below]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
