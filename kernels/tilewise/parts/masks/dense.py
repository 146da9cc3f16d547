"""Dense: a bool tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise_reference.positions import lookup

from ..addressing import load_pairs
from ..hints import shape_hint, with_hint
from ..shape import Shape, broadcast_strides, common_limits, misfits, pair_limits
from .mask import MEANINGS, BoundMask, Mask, Twin


@triton.jit
def dense_keep(q_idx, kv_idx, batch, head, args):
    ptr, strides, limits = args
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]
    return load_pairs(ptrs, q_idx, kv_idx, limits, 0) != 0


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Dense(Mask):
    """A bool tensor that broadcasts to [batch, q_heads, q_len, kv_len], True where the pair counts. No tile
    is skipped: combine it with a structured mask (`Causal() & tensor`) where one bounds it."""

    has_gaps = True
    FIELDS = ("mask",)

    def __init__(self, mask: torch.Tensor) -> None:
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"{mask=} must be a tensor of dtype torch.bool")
        if mask.dtype in INTEGERS:
            raise ValueError(
                f"mask.dtype={mask.dtype} must be torch.bool: give mask.bool(), True where a pair counts; "
                "where 1 means a real key, [batch, kv_len], tilewise.Padding(mask.sum(1)) skips the others"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask.dtype={mask.dtype} must be torch.bool; pass an additive mask as bias=")
        self.mask = mask

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mask": self.mask}

    def misfits(self, shape: Shape) -> list[str]:
        return [
            with_hint(misfit, shape_hint("mask", tuple(self.mask.shape), shape))
            for misfit in misfits("mask", self.mask, shape.fitted)
        ]

    def rules_out(self) -> bool:
        return False

    def called(self, name: str = "") -> str:
        return "mask" if name else "mask (the bool tensor)"

    def bind(self, shape: Shape) -> BoundMask:
        strides, limits = broadcast_strides(self.mask, shape.fitted), common_limits(shape.fitted, self.mask)
        return BoundMask(None, dense_keep, (self.mask.view(torch.uint8), strides, limits))

    def extents(self, shape: Shape) -> tuple[int, int]:
        return pair_limits(self.mask)

    def twin(self, shape: Shape) -> Twin:
        return lambda *index: lookup(self.mask, *index)


MEANINGS.append((torch.Tensor, Dense))
