"""Blocks: a pattern of whole blocks of pairs, given as data.

Counted along the blocks of keys, the pattern tells in two loads how many of a run of blocks count: none, so
that tiles are left out; all, so that they need no mask. The counts, and where the blocks of a row begin and
end, are made once, on the device, when the mask is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..addressing import load_pairs, load_within
from ..bounds import Bounds
from ..dtensors import whole_of
from ..shape import ANY, FAR, Shape, broadcast_strides, ceil_div, misfits
from .mask import BoundMask, Mask, Twin


@triton.jit
def blocks_interval(q_idx, batch, head, args):
    hull_ptr, strides = args[1]  # [.., q_blocks, 3]: first block, last block + 1, whether all between count
    (block_q, block_kv), limits = args[3], args[4]
    q_block = q_idx // block_q
    ptrs = hull_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs += q_block.to(tl.int64) * strides[2]
    first, stop = load_within(ptrs, q_block, limits, 0), load_within(ptrs + 1, q_block, limits, 0)
    return first * block_kv, stop * block_kv, load_within(ptrs + 2, q_block, limits, 0) != 0


@triton.jit
def blocks_keep(q_idx, kv_idx, batch, head, args):
    pattern_ptr, strides = args[0]
    (block_q, block_kv), limits = args[3], args[4]
    q_block, kv_block = q_idx // block_q, kv_idx // block_kv
    ptrs = pattern_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = ptrs + q_block.to(tl.int64) * strides[2] + kv_block.to(tl.int64) * strides[3]
    return load_pairs(ptrs, q_block, kv_block, limits, 0) != 0


@triton.jit
def blocks_coverage(q_idx, kv_first, kv_last, batch, head, args):
    count_ptr, strides = args[2]  # [.., q_blocks, kv_blocks + 1]: how many blocks of a row count before each
    (block_q, block_kv), limits, kv_blocks = args[3], args[4], args[5]
    q_block, first, stop = q_idx // block_q, kv_first // block_kv, kv_last // block_kv + 1
    ptrs = count_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = ptrs + q_block.to(tl.int64) * strides[2]
    before = load_within(ptrs + tl.minimum(first, kv_blocks), q_block, limits, 0)
    count = load_within(ptrs + tl.minimum(stop, kv_blocks), q_block, limits, 0) - before
    return (count > 0).to(tl.int32) + (count == stop - first).to(tl.int32)


class Blocks(Mask):
    """Pairs count in whole blocks: query i sees key j where pattern[.., i div block_q, j div block_kv] is
    True. Tiles in which no block counts are never visited, forward and backward, whatever the pattern is.

    pattern: bool tensor that broadcasts to [batch, q_heads, ceil(q_len / block_q), ceil(kv_len / block_kv)].
        It is read on the device alone, so that another one of the same shape compiles nothing anew; it must
        not change once the mask is made. In packed sequences and in a cache it counts from the beginning of
        each sequence, and what lies beyond it is not seen.
    block: the rows and keys of a block, or a pair (block_q, block_kv); any number from 1 on. Tiles are
        skipped best where it is a multiple of theirs, as 128 is of most.

    Raises ValueError for another dtype, fewer than two dimensions, or a block below 1. Patterns of this kind:
    block-sparse FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.3), BigBird (Zaheer et al. 2020,
    arXiv 2007.14062).
    """

    has_gaps = True
    has_holes = True
    FIELDS = ("pattern", "block", "hulls", "counts")

    def __init__(self, pattern: torch.Tensor, block: int | tuple[int, int] = 128) -> None:
        if not isinstance(pattern, torch.Tensor) or pattern.dtype != torch.bool:
            given = pattern.dtype if isinstance(pattern, torch.Tensor) else repr(pattern)
            raise ValueError(
                f"pattern={given} must be a tensor of dtype torch.bool, True where a block counts"
            )
        if pattern.dim() < 2:
            raise ValueError(f"pattern.shape={tuple(pattern.shape)} must end with [q_blocks, kv_blocks]")
        sides = block if isinstance(block, (tuple, list)) else (block, block)
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= FAR for side in sides):
            raise ValueError(f"{block=} must be a number from 1 on, or a pair (block_q, block_kv) of them")
        self.pattern, self.block = whole_of(pattern), (sides[0], sides[1])
        self.hulls, self.counts = hulls_and_counts(self.pattern)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"pattern": self.pattern, "hulls": self.hulls, "counts": self.counts}

    def misfits(self, shape: Shape) -> list[str]:
        *lead, q_len, kv_len = shape.fitted
        pairs = zip((q_len, kv_len), self.block, strict=True)
        blocks = [ANY if length == ANY else ceil_div(length, side) for length, side in pairs]
        return misfits("pattern", self.pattern, (*lead, *blocks))

    def sides(self) -> tuple[int, int]:
        """The rows and keys of a block; along a dimension that is broadcast there is one block, of all."""
        q_side, kv_side = (
            FAR if n == 1 else n_side for n, n_side in zip(self.pattern.shape[-2:], self.block, strict=True)
        )
        return q_side, kv_side

    def bind(self, shape: Shape) -> BoundMask:
        of_any = (ANY, ANY, ANY, ANY)
        pattern = self.pattern.view(torch.uint8)
        arrays = [(x, broadcast_strides(x, of_any)) for x in (pattern, self.hulls, self.counts)]
        q_blocks, kv_blocks = self.pattern.shape[-2:]
        args = (*arrays, self.sides(), () if shape.is_dense else (q_blocks, kv_blocks), kv_blocks)
        return BoundMask(blocks_interval, blocks_keep, args, blocks_coverage)

    def extents(self, shape: Shape) -> tuple[int, int]:
        q_extent, kv_extent = (
            n * side for n, side in zip(self.pattern.shape[-2:], self.sides(), strict=True)
        )
        return q_extent, kv_extent

    def bounds(self, shape: Shape) -> Bounds:
        q_side, kv_side = self.sides()
        hulls = self.hulls.to("cpu", torch.int64)
        q_block = torch.arange(shape.q_len, device="cpu") // q_side
        inside = q_block < hulls.shape[-2]
        rows = hulls.index_select(-2, torch.where(inside, q_block, 0)) if hulls.shape[-2] else hulls
        first, stop, whole = rows.unbind(-1)
        return Bounds(first * kv_side, torch.where(inside, stop * kv_side, 0), whole != 0)

    def twin(self, shape: Shape) -> Twin:
        return dense.blocks(self.pattern, self.block)


def hulls_and_counts(pattern: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pattern [.., q_blocks, kv_blocks] -> int32 [.., q_blocks, 3]: the first block of each row that counts,
    the last one + 1, and whether all between do; and [.., q_blocks, kv_blocks + 1]: how many count before
    each. No host synchronisation."""
    counts = torch.nn.functional.pad(pattern.cumsum(-1, dtype=torch.int32), (1, 0))
    total = counts[..., -1:]
    stop = (counts < total).sum(-1)  # the place at which the last one is counted
    first = (counts == 0).sum(-1) - 1
    first = torch.where(total[..., 0] == 0, stop, first)
    hulls = torch.stack([first, stop, stop - first == total[..., 0]], -1).to(torch.int32)
    return hulls, counts
