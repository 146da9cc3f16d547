"""The keys and values of a batch in generation, each sequence's in one piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cached import cached_attention
from .core import check_positive
from .sharded import write_rows


class CacheFull(RuntimeError):
    """There is no room for new rows. Nothing was written, and the cache is as it was."""


class KVCache:
    """Keys and values of one layer, with room for `capacity` rows a sequence; a model has one a layer.

    k:       [batch, kv_heads, capacity, head_dim], of which each sequence has filled its first rows.
    v:       the same with value_dim (head_dim if None).
    lens:    int32 [batch] on the device: how many rows each sequence has filled.
    longest: an int on the host that no length exceeds, so that a full cache is known of without waiting for
             the device. It is the length itself where all sequences grow alike.

    All four are plain attributes: k and v may be replaced by DTensors, cut along batch or heads; to take rows
    back, lower `lens`, and `longest` with it, or room is lost.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        check_positive(
            batch=batch, kv_heads=kv_heads, capacity=capacity, head_dim=head_dim, value_dim=value_dim
        )
        self.capacity = capacity
        self.k = torch.empty(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.empty(batch, kv_heads, capacity, value_dim, dtype=dtype, device=device)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0

    def attend(
        self, q: Tensor, new_k: Tensor, new_v: Tensor, *, max_new: int | None = None, **arguments: Any
    ) -> Any:
        """`cached_attention` of q to what is in the cache and to new_k and new_v, which are in it afterwards.

        max_new: beside q_offsets=, the most rows that one sequence has in this call; the host reads no
            offset, and counts all tokens as one sequence's if None.
        arguments: those of `cached_attention`, as mask, rotary and q_offsets; the result is as there.
        Raises CacheFull where new rows might not fit, and whatever `cached_attention` raises, before anything
        is written.
        """
        offsets = arguments.get("q_offsets")
        count = new_k.shape[-2 if offsets is None else 0]
        most = self._room_for(count if max_new is None else max_new)
        found = cached_attention(q, self.k, self.v, kv_lens=self.lens, new_k=new_k, new_v=new_v, **arguments)
        self.lens += count if offsets is None else offsets.diff().to(self.lens.dtype)
        self.longest = most
        return found

    def append(self, new_k: Tensor, new_v: Tensor) -> None:
        """Write new_k [batch, kv_heads, rows, head_dim] and new_v as they are, and attend to nothing: keys
        that are there already, such as those of a context. Raises CacheFull as `attend` does."""
        most = self._room_for(new_k.shape[2])
        rows = self.lens[:, None] + torch.arange(new_k.shape[2], device=self.lens.device)
        for x, new in ((self.k, new_k), (self.v, new_v)):
            write_rows(x, new, rows)
        self.lens += new_k.shape[2]
        self.longest = most

    def reset(self) -> None:
        """Start over with no row; the memory stays."""
        self.lens.zero_()
        self.longest = 0

    def _room_for(self, rows: int) -> int:
        """`longest` after so many more rows."""
        if self.longest + rows > self.capacity:
            raise CacheFull(
                f"{rows} more rows do not fit: the cache has room for {self.capacity} a sequence, and up to "
                f"{self.longest} are filled"
            )
        return self.longest + rows
