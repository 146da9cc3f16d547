"""UserMask: a function of the caller's own."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ..shape import Shape, tensors_within
from .mask import MEANINGS, BoundMask, Mask, Twin


class UserMask(Mask):
    """A mask from the caller's own module-level `@triton.jit` functions.

    keep(q_idx, kv_idx, batch, head, args) -> bool tile; indices as described at the head of mask.py.
    args: a tuple of tensors, ints and floats, handed on to every function.
    interval(q_idx, batch, head, args) -> lo, hi, whole, optional: keys outside lo..hi are not visited; where
        `whole` is true for all rows of a tile, `keep` is not asked inside it. Inside `|` and `~` q_idx may
        have keep's two dimensions, so go element by element.
    twin(batch, head, q_idx, kv_idx, *args) -> bool tensor, optional: the same rule in plain PyTorch, needed
        for CPU tensors outside the interpreter. Functions cannot close over values: pass them in args.
    """

    has_gaps = True
    FIELDS = ("keep", "args", "interval")

    def __init__(
        self, keep: Any, args: tuple[Any, ...] = (), *, interval: Any = None, twin: Twin | None = None
    ) -> None:
        self.keep, self.args, self.interval, self._twin = keep, tuple(args), interval, twin

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_within("args", self.args)

    def rules_out(self) -> bool:
        return self.interval is not None

    def looks(self) -> Any:
        return type(self), len(self.args), self._twin is None

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(self.interval, self.keep, self.args)

    def twin(self, shape: Shape) -> Twin:
        if self._twin is None:
            raise ValueError(
                f"UserMask({self.keep.__name__}) has no twin, which plain PyTorch needs: give "
                "UserMask(..., twin=f) with f(batch, head, q_idx, kv_idx, *args) -> bool tensor"
            )
        twin = self._twin
        return lambda batch, head, q_idx, kv_idx: twin(batch, head, q_idx, kv_idx, *self.args)


MEANINGS.append((triton.runtime.KernelInterface, UserMask))
