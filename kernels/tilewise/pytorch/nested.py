"""Jagged nested tensors: sequences of different lengths, packed one behind the other without padding.

PyTorch's jagged layout holds `values`, all rows of all sequences, and `offsets`, where each sequence starts.
That is one long sequence whose rows see only a stretch of the keys, so it needs no kernel of its own:
`Intervals` says which stretch, and the tiles outside are never visited.

    row i of sequence b sees the keys kv_offsets[b] ≤ j < kv_offsets[b + 1]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..parts.hints import with_hint
from ..parts.masks.causal import Causal
from ..parts.masks.intervals import Intervals
from ..parts.masks.mask import Mask, as_mask
from ..parts.masks.window import Window
from ..parts.scores.alibi import ALiBi
from ..parts.scores.relative_position import RelativePosition
from ..parts.scores.score import Score, as_scores
from ..parts.scores.softcap import Softcap

Tensor = torch.Tensor
# What depends on nothing but how far a key stands from the query means the same in the packed sequence.
RELATIVE = (Causal, Window, ALiBi, RelativePosition, Softcap)


def is_nested(*tensors: Any) -> bool:
    return any([isinstance(x, Tensor) and x.is_nested for x in tensors])


class Packed(NamedTuple):
    """Jagged tensors as one sequence: q [1, q_heads, rows, head_dim], k and v [1, kv_heads, keys, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    score: tuple[Score, ...]
    offsets: Tensor  # of q

    def jagged(self, x: Tensor) -> Tensor:
        """[1, heads, rows, ...] as [batch, heads, *, ...], jagged as q was."""
        nested = torch.nested.nested_tensor_from_jagged(x.squeeze(0).transpose(0, 1), self.offsets)
        return nested.transpose(1, 2)


def pack(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, score: Any = None) -> Packed:
    """q [batch, q_heads, *, head_dim], k and v [batch, kv_heads, *, dim], all jagged, and what acts on them.
    Raises NotImplementedError for a mask, score or bias that speaks of padded positions."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_jagged(name, x)
    if not same_offsets(k.offsets(), v.offsets()):
        raise ValueError(with_hint("k and v must have the same offsets", offsets_hint("k", k, v)))
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"batch sizes q: {q.shape[0]}, k: {k.shape[0]}, v: {v.shape[0]} must be equal")
    packed_alike = same_offsets(q.offsets(), k.offsets())
    masks, scores = () if mask is None else as_mask(mask).parts(), as_scores(score)
    wanted = RELATIVE if packed_alike else (Softcap,)
    unbuilt = [] if bias is None else ["bias"]
    unbuilt += [type(part).__name__ for part in (*masks, *scores) if not isinstance(part, wanted)]
    if unbuilt:
        reason = (
            f"{' and '.join(unbuilt)} with nested tensors is not built: padded ones with Padding take all, "
            f"nested ones {'of one packing' if packed_alike else 'packed differently in q and k'} take "
            f"{', '.join(cls.__name__ for cls in wanted)}"
        )
        raise NotImplementedError(with_hint(reason, "" if packed_alike else offsets_hint("q", q, k)))
    within: Mask = sequences(q.offsets(), k.offsets(), q.values().shape[1])
    for part in masks:
        within = within & part
    q_rows, k_rows, v_rows = (x.values().unsqueeze(0) for x in (q, k, v))
    return Packed(q_rows, k_rows, v_rows, within, scores, q.offsets())


def sequences(q_offsets: Tensor, kv_offsets: Tensor, rows: int) -> Intervals:
    """The mask by which rows see the keys of their own sequence; rows behind the last one see none."""
    row = torch.arange(rows, device=q_offsets.device)
    sequence = torch.searchsorted(q_offsets, row, right=True) - 1
    last = q_offsets.shape[0] - 1
    return Intervals(kv_offsets[sequence], kv_offsets[(sequence + 1).clamp(max=last)])


def same_offsets(a: Tensor, b: Tensor) -> bool:
    """Whether two packings are one, by identity as in PyTorch: reading values would wait for the GPU."""
    return a is b or a.data_ptr() == b.data_ptr()


def offsets_hint(name: str, x: Any, other: Any) -> str:
    """How x and k or v come to one packing. Reads the offsets, so it is for a call that fails anyway."""
    a, b = x.offsets(), other.offsets()
    of = "k" if name == "q" else "v"
    make = f"torch.nested.nested_tensor_from_jagged(values, {name}.offsets())"
    if a.shape == b.shape and bool((a.cpu() == b.cpu()).all()):
        return f"theirs are equal in value, but not one and the same tensor: make {of} with {make}"
    return f"make {of} with {make}" if name == "k" else ""


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
    if x.lengths() is not None:
        raise NotImplementedError(
            f"{name} has holes between its sequences; make it contiguous with contiguous()"
        )
