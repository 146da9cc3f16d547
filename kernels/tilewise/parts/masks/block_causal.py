"""BlockCausal: keys up to the end of the row's own block, such as a frame of a video."""

from __future__ import annotations

import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import UNLIMITED, Bounds, positions
from ..sequences import row_shift
from ..shape import Align, Shape
from .mask import BoundMask, Mask, Twin

LARGEST = 1 << 28  # so that sums of positions and a block fit 32 bits


@triton.jit
def block_causal_interval(q_idx, batch, head, args):
    shift_args, block, before = args
    position = q_idx + row_shift(batch, shift_args)
    start = tl.maximum(position, 0) // block * block
    return start - before, tl.where(position < 0, 0, start + block), q_idx >= 0


class BlockCausal(Aligned, Mask):
    """Positions stand in blocks, and a query sees its own block and every block before it.

    block: positions of one, the tokens of a frame of a video or of a chunk of frames, as in autoregressive
    video diffusion (CausVid, arXiv 2412.07772). window: how many blocks a query sees, its own and those just
    before it; None for all. `align` as in Causal. In steps over a cache a whole block of queries comes at a
    time: a query sees the keys of its block as far as they are there.
    """

    # Ends rise by a block at a time, which a mask beside it may cut short in each.
    has_gaps = True
    FIELDS = ("block", "window", "align")

    def __init__(self, block: int, window: int | None = None, align: Align = None) -> None:
        check_align(align)
        if not (type(block) is int and 1 <= block <= LARGEST):
            raise ValueError(f"{block=} must be an int from 1 to {LARGEST}, the positions of a block")
        if window is not None and not (type(window) is int and window >= 1):
            raise ValueError(f"{window=} must be None (no limit) or an int, at least 1, the blocks seen")
        self.block, self.window, self.align = block, window, align

    def before(self) -> int:
        """How many keys before its own block a row sees at most."""
        return UNLIMITED if self.window is None else min((self.window - 1) * self.block, UNLIMITED)

    def bind(self, shape: Shape) -> BoundMask:
        args = (shape.shift_args(self.align), self.block, self.before())
        return BoundMask(block_causal_interval, None, args)

    def bounds(self, shape: Shape) -> Bounds:
        position = positions(shape, self.align)
        start = position.clamp(min=0) // self.block * self.block
        return Bounds(start - self.before(), (start + self.block).where(position >= 0, 0))

    def twin(self, shape: Shape) -> Twin:
        return dense.block_causal(self.block, self.window, shape.q_len, shape.kv_len, self.align)
