"""Where do the queries stand among the keys? What masks and scores that count positions are made of.

    align              query row i of a sequence stands at the key position
    "bottom_right"     i + kv_len - q_len: the last query at the last key
    "top_left"         i: the first query at the first key
    a number           i + number; a tensor [batch] has one a sequence. Both may be below 0
    None               as "bottom_right"; refused where a sequence may end before the keys do, so that its
                       last key is not theirs: plan/rules/options.py

Packed sequences and those of a cache have lengths of their own, and so a corner each.
"""

from __future__ import annotations

from typing import Any

import torch

from .plug import Plug
from .shape import INTS, POSITIONS, Align, Shape, misfits


def check_align(align: Any) -> None:
    """Raise ValueError unless it is one of the above."""
    if align is None:
        return
    wanted = "must be 'bottom_right', 'top_left', an int, or an int32 or int64 tensor [batch]"
    if isinstance(align, torch.Tensor):
        if align.dtype not in INTS:
            raise ValueError(f"align.dtype={align.dtype}: align {wanted}, the key position of query 0")
    elif isinstance(align, int) and not isinstance(align, bool):
        if not -POSITIONS <= align <= POSITIONS:
            raise ValueError(f"{align=} must be from {-POSITIONS} to {POSITIONS}")
    elif not isinstance(align, str) or align not in ("bottom_right", "top_left"):
        raise ValueError(f"{align=} {wanted}, the key position of query 0")


class Aligned(Plug):
    """A mask or a score that counts positions; `align` is among its FIELDS."""

    align: Align

    def follows_the_default(self) -> bool:
        """Whether it asks for a corner and does not say which."""
        return self.align is None

    def tensors(self) -> dict[str, torch.Tensor]:
        align = {"align": self.align} if isinstance(self.align, torch.Tensor) else {}
        return {**super().tensors(), **align}

    def misfits(self, shape: Shape) -> list[str]:
        found = super().misfits(shape)
        if isinstance(self.align, torch.Tensor):
            found += misfits("align", self.align, (shape.batch,))
        return found

    def looks(self) -> Any:
        return super().looks(), self.follows_the_default()
