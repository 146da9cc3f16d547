"""What "tilewise" has for a mask in Transformers: made once a forward, and handed to every layer.

a mask function's part             the mask of tilewise
causal_mask_function               Causal
sliding_window_overlay(w)          Window(w - 1, None)
sliding_window_bidirectional(w)    Window(w, w)
chunked_overlay(c, start)          Intervals: of each row, its chunk
packed_sequence_mask(ids)          Documents(ids)
attention_mask [batch, keys]       Padding at the left and right end; a bool [batch, 1, 1, keys] for holes
any other function                 a bool [batch, 1, q_len, kv_len]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...parts.masks.algebra import All
from ...parts.masks.causal import Causal
from ...parts.masks.dense import Dense
from ...parts.masks.documents import Documents
from ...parts.masks.intervals import Intervals
from ...parts.masks.mask import Mask
from ...parts.masks.padding import Padding
from ...parts.masks.window import Window
from ...parts.shape import Align
from .known import Pattern, pattern_of

Tensor = torch.Tensor
# What Transformers also says, for masks that are tensors: a dtype, and when there may be none.
OF_TENSORS = {
    "local_size", "allow_is_causal_skip", "allow_is_bidirectional_skip", "allow_torch_fix", "dtype", "config",
}  # fmt: skip


FIT_FOR_PACKED = (Causal, Window, Documents)


class ModelMask:
    """The mask of a model's layers, where Transformers has a tensor [batch, 1, q_len, kv_len].

    mask:   for a dense call, or None if every pair counts.
    inside: for packed sequences that the call itself names by offsets: without what keeps sequences apart.
    unfit:  what cannot be said of packed sequences, in words; empty if nothing.
    made_of: what `model_mask` made it of.
    """

    ndim = 4

    def __init__(
        self,
        mask: Mask | None,
        inside: Mask | None,
        unfit: tuple[str, ...],
        made_of: dict[str, Any],
    ) -> None:
        self.mask, self.inside, self.unfit, self.made_of = mask, inside, unfit, made_of
        self.device: torch.device = made_of["device"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.made_of["batch_size"], 1, self.made_of["q_length"], self.made_of["kv_length"]

    def to(self, device: torch.device | str, **_: Any) -> ModelMask:
        """The mask on another device, as a model that lies on several asks of what goes from layer to
        layer."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved: dict[str, Any] = {
            name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.made_of.items()
        }
        return model_mask(**moved | {"device": device})

    def __repr__(self) -> str:
        return f"ModelMask({self.mask!r}, shape={self.shape})"

    def refuse(self, *_: Any) -> Any:
        """What a model asks of a tensor that computes attention by itself."""
        raise TypeError(
            "this model reads its mask as a tensor: its layers do not take their attention from "
            "Transformers' AttentionInterface, so tilewise cannot answer them; give "
            "attn_implementation='eager'"
        )

    __getitem__ = __add__ = __radd__ = refuse


class Where(NamedTuple):
    """Lengths, and the positions of the first query and the first key; that of the query a tensor without
    dimensions in a static cache."""

    batch: int
    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | ModelMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> ModelMask:
    """What AttentionMaskInterface asks for: the mask that `mask_function` and the padding in attention_mask
    [batch, keys seen so far] mean, between q_length queries from position q_offset on and kv_length keys from
    kv_offset on. Raises TypeError for arguments that it does not know."""
    unknown = [name for name in others if name not in OF_TENSORS]
    if unknown:
        raise TypeError(f"Transformers gives a mask {', '.join(unknown)}=, which tilewise does not know")
    if isinstance(attention_mask, ModelMask):  # generate() makes it in advance for a static cache
        return attention_mask
    made_of = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap,
        device=torch.device(device),
    )  # fmt: skip
    where = Where(batch_size, q_length, kv_length, q_offset, kv_offset, torch.device(device))
    pattern = pattern_of(mask_function)
    parts = [*by_distance(pattern, align_of(where)), *by_place(pattern, where)]
    if attention_mask is not None:
        parts += padding(real_keys(attention_mask, where))
    if pattern.unknown:
        warn_of(pattern.unknown)
        without_padding = made_of | dict(attention_mask=None, allow_is_causal_skip=False)
        parts.append(Dense(sdpa_mask(**without_padding)))
    unfit = tuple([type(part).__name__ for part in parts if not isinstance(part, FIT_FOR_PACKED)])
    inside = together(by_distance(pattern, None))
    return ModelMask(together(parts), inside, unfit, made_of)


def together(parts: list[Mask]) -> Mask | None:
    return All(*parts) if parts else None


def by_distance(pattern: Pattern, align: Align) -> list[Mask]:
    """The rules that look at the distance of a query and a key."""
    causal: list[Mask] = [Causal(align)] if pattern.causal else []
    return causal + [Window(left, right, align) for left, right in pattern.windows]


def by_place(pattern: Pattern, where: Where) -> list[Mask]:
    """The rules that look at where a query and a key are."""
    parts: list[Mask] = [Documents(ids.to(where.device)) for ids in pattern.documents]
    for size, start in pattern.chunks:
        rows = torch.arange(where.q_len, device=where.device) + where.q_offset
        first = start[:, None].to(where.device)  # [batch, 1]
        begin = (rows - first) // size * size + first - where.kv_offset  # [batch, q_len]
        parts.append(Intervals(begin[:, None], begin[:, None] + size))
    return parts


def align_of(where: Where) -> Align:
    """Where query 0 stands among the keys."""
    shift = where.q_offset - where.kv_offset
    if isinstance(shift, Tensor):
        return shift.to(where.device, torch.int64).reshape(-1).expand(where.batch)
    if shift == 0:
        return "top_left"
    return "bottom_right" if shift == where.kv_len - where.q_len else shift


def real_keys(attention_mask: Tensor, where: Where) -> Tensor:
    """bool [batch, kv_len], True at keys that are there: those that attention_mask says nothing of are
    not."""
    missing = where.kv_offset + where.kv_len - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, where.kv_offset : where.kv_offset + where.kv_len].bool()


def padding(real: Tensor) -> list[Mask]:
    """The masks that keep the real keys alone.

    Which of them are needed is read from the keys, so the host waits for the GPU, once a forward. Where it
    must not (a graph is traced, or the tensor holds nothing), all three are there.
    """
    kv_len = real.shape[1]
    from_left = torch.arange(1, kv_len + 1, device=real.device)
    end = torch.where(real, from_left, 0).amax(1) if kv_len else real.new_zeros(len(real), dtype=torch.int64)
    tail = torch.where(real, from_left.flip(0), 0).amax(1) if kv_len else end  # keys from the first real one
    right, left, holes = Padding(end), Padding(tail, "left"), Dense(real[:, None, None, :])
    if torch.compiler.is_compiling() or real.is_meta:
        return [right, left, holes]
    few, late, torn = (
        torch.stack(
            [
                end.amin() < kv_len,
                tail.amin() < kv_len,
                ((end + tail - kv_len).clamp(min=0) != real.sum(1)).any(),
            ]
        ).tolist()
        if real.numel()
        else (False, False, False)
    )
    return [mask for mask, needed in ((right, few), (left, late), (holes, torn)) if needed]


warned: set[str] = set()


def warn_of(functions: tuple[Callable[..., Tensor], ...]) -> None:
    """Say once of each unknown function what it costs."""
    if torch.compiler.is_compiling():
        return
    for function in functions:
        name = getattr(function, "__qualname__", None) or repr(function)
        if name not in warned:
            warned.add(name)
            warnings.warn(
                f"tilewise does not know the mask function {name}: a bool tensor [batch, 1, q_len, kv_len] "
                "is made of it, and tiles that it masks whole are not skipped",
                stacklevel=3,
            )
