"""Window: keys near the row's own position."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function

import tilewise_reference.masks as dense

from ..aligned import Aligned, check_align
from ..bounds import UNLIMITED, Bounds, positions
from ..sequences import row_shift
from ..shape import Align, Shape
from .mask import BoundMask, Mask, Twin


@triton.jit
def window_interval(q_idx, batch, head, args):
    shift_args, left, right = args
    position = q_idx + row_shift(batch, shift_args)
    return position - left, position + right + 1, q_idx >= 0


class Window(Aligned, Mask):
    """A query sees `left` keys before its own position, that position, and `right` keys after it.

    None sets no limit on that side; Window(w - 1, 0) is a causal window of w keys. Source: Longformer
    (arXiv 2004.05150). `align` as in Causal.
    """

    FIELDS = ("left", "right", "align")

    def __init__(self, left: int | None, right: int | None, align: Align = None) -> None:
        check_align(align)
        for name, size in (("left", left), ("right", right)):
            if size is not None and not (isinstance(size, int) and 0 <= size < UNLIMITED):
                wanted = f"None (no limit) or an int from 0 to {UNLIMITED - 1}"
                raise ValueError(f"{name}={size!r} must be {wanted}")
        self.left, self.right, self.align = left, right, align

    def follows_the_default(self) -> bool:
        return self.align is None and (self.left, self.right) != (None, None)

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(window_interval, None, (shape.shift_args(self.align), *self.reach()))

    def bounds(self, shape: Shape) -> Bounds:
        (left, right), row = self.reach(), positions(shape, self.align)
        return Bounds(row - left, row + right + 1)

    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own position a row sees at most."""
        left, right = (UNLIMITED if size is None else size for size in (self.left, self.right))
        return left, right

    def twin(self, shape: Shape) -> Twin:
        return dense.window(self.left, self.right, shape.q_len, shape.kv_len, self.align)
