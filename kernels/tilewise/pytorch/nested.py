"""Jagged nested tensors: PyTorch's way to say that sequences are packed one behind the other.

Their layout holds `values`, all rows of all sequences, and `offsets`, where each sequence starts: what packed
attention takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..parts.hints import with_hint
from ..parts.shape import Packing

Tensor = torch.Tensor


def is_nested(*tensors: Any) -> bool:
    return any([isinstance(x, Tensor) and x.is_nested for x in tensors])


class Jagged(NamedTuple):
    """Jagged tensors as packed ones: q [1, q_heads, rows, head_dim], k and v [1, kv_heads, keys, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    packing: Packing

    def like_q(self, x: Tensor) -> Tensor:
        """[1, heads, rows, ...] as [batch, heads, *, ...], jagged as q was."""
        values = x.squeeze(0).transpose(0, 1)
        return torch.nested.nested_tensor_from_jagged(values, self.packing.q_offsets).transpose(1, 2)


def unpack(q: Any, k: Any, v: Any) -> Jagged:
    """q [batch, q_heads, *, head_dim], k and v [batch, kv_heads, *, dim], all jagged. Raises ValueError or
    NotImplementedError for others."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_jagged(name, x)
    if not same_offsets(k.offsets(), v.offsets()):
        raise ValueError(with_hint("k and v must have the same offsets", offsets_hint(k, v)))
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"batch sizes q: {q.shape[0]}, k: {k.shape[0]}, v: {v.shape[0]} must be equal")
    kv_offsets = None if same_offsets(q.offsets(), k.offsets()) else k.offsets()
    q_rows, k_rows, v_rows = (x.values().unsqueeze(0) for x in (q, k, v))
    return Jagged(q_rows, k_rows, v_rows, Packing(q.offsets(), kv_offsets))


def same_offsets(a: Tensor, b: Tensor) -> bool:
    """Whether two packings are one, by identity as in PyTorch: reading values would wait for the GPU."""
    return a is b or a.data_ptr() == b.data_ptr()


def offsets_hint(k: Any, v: Any) -> str:
    """How k and v come to one packing. Reads the offsets, so it is for a call that fails anyway."""
    a, b = k.offsets(), v.offsets()
    make = "make v with torch.nested.nested_tensor_from_jagged(values, k.offsets())"
    if a.shape == b.shape and bool((a.cpu() == b.cpu()).all()):
        return f"theirs are equal in value, but not one and the same tensor: {make}"
    return make


def check_jagged(name: str, x: Any) -> None:
    """Raise ValueError or NotImplementedError unless x is [batch, heads, *, dim] in the jagged layout."""
    if not (is_nested(x) and x.layout == torch.jagged):
        given = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} has {given}; q, k and v must all be nested tensors of layout torch.jagged, or none"
        )
    if x.dim() != 4 or x._ragged_idx != 2:
        raise ValueError(
            f"{name}.shape={tuple(x.shape)} must be [batch, heads, *, dim], with the lengths that differ in "
            "dimension 2: transpose(1, 2) a tensor [batch, *, heads, dim]"
        )
    if x.lengths() is not None:  # contiguous() would do, but has no gradient in PyTorch 2.13
        raise NotImplementedError(
            f"{name} has holes between its sequences, as torch.nested.narrow leaves them: make "
            "torch.nested.as_nested_tensor([*x.unbind()], layout=torch.jagged) of the tensor x that q, k and "
            "v are made of"
        )
