"""A length for all sequences, or one a sequence: what Prefix and Padding are made of."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..bounds import UNLIMITED, on_host
from ..shape import INTS, Shape, broadcast_strides, check_dtype, misfits
from .mask import Mask


class PerBatch(Mask):
    """A mask with one length for all sequences (an int), or one a sequence (an int tensor [batch])."""

    def __init__(self, name: str, lengths: int | torch.Tensor) -> None:
        self.name, self.lengths = name, lengths
        if isinstance(lengths, torch.Tensor):
            if lengths.dtype == torch.bool:
                raise ValueError(
                    f"{name}.dtype=torch.bool must be torch.int32 or torch.int64, a length a sequence: "
                    "of a bool tensor [batch, kv_len] give its sum(1)"
                )
            check_dtype(name, lengths, INTS)
        elif not isinstance(lengths, int) or lengths < 0:
            raise ValueError(f"{name}={lengths!r} must be an int, at least 0, or an int tensor [batch]")

    def given(self, name: str) -> Any:
        return self.lengths if name == self.name else super().given(name)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {self.name: self.lengths} if isinstance(self.lengths, torch.Tensor) else {}

    def misfits(self, shape: Shape) -> list[str]:
        if isinstance(self.lengths, torch.Tensor):
            return misfits(self.name, self.lengths, (shape.batch,))
        return []

    def length_args(self, shape: Shape) -> tuple[Any, ...]:
        """What `row_length` reads: a number, or an address and its stride."""
        if isinstance(self.lengths, torch.Tensor):
            return self.lengths, broadcast_strides(self.lengths, (shape.batch,))[0]
        return (min(self.lengths, UNLIMITED),)

    def host_lengths(self) -> torch.Tensor:
        """`row_length` of every sequence, int64, to broadcast to [batch, q_heads, q_len]."""
        return on_host(self.lengths)[..., None, None]


@triton.jit
def as_index(x):
    """x in 32 bits; what lies further out than any sequence is long stays further out."""
    return tl.minimum(tl.maximum(x, -(1 << 30)), 1 << 30).to(tl.int32)


@triton.jit
def row_length(batch, length_args):
    """The length that holds for this sequence."""
    if len(length_args) == 2:
        return as_index(tl.load(length_args[0] + batch.to(tl.int64) * length_args[1]))
    else:
        return length_args[0]
