"""The document mask: packed sequences in which a query sees the keys of its own document.

Ids may come in any order. The interval of a row is the hull of its document, from its first key to its last;
if the document is not interrupted in between, the hull is whole and full tiles need no mask. The hulls are
found once, on the device, when the mask is made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from ..addressing import load_within
from ..bounds import Bounds
from ..dtensors import whole_of
from ..hints import with_hint
from ..shape import INTS, Packing, Shape, check_dtype, misfits
from .mask import BoundMask, Mask, Twin


@triton.jit
def documents_interval(q_idx, batch, head, args):
    hull_ptr, hull_strides = args[0]  # [batch, q_len, 3]: first key, last key + 1, whole
    ptrs = hull_ptr + batch.to(tl.int64) * hull_strides[0] + q_idx.to(tl.int64) * 3
    first, stop = load_within(ptrs, q_idx, args[3], 0), load_within(ptrs + 1, q_idx, args[3], 0)
    return first, stop, load_within(ptrs + 2, q_idx, args[3], 0) != 0


@triton.jit
def documents_keep(q_idx, kv_idx, batch, head, args):
    q_ids_ptr, q_strides = args[1]
    kv_ids_ptr, kv_strides = args[2]
    q_ptrs = q_ids_ptr + batch.to(tl.int64) * q_strides[0] + q_idx.to(tl.int64) * q_strides[1]
    kv_ptrs = kv_ids_ptr + batch.to(tl.int64) * kv_strides[0] + kv_idx.to(tl.int64) * kv_strides[1]
    if len(args[3]) == 0:
        return tl.load(q_ptrs) == tl.load(kv_ptrs)
    else:  # a token beyond the ids is of no document
        has_q, has_kv = q_idx < args[3][0], kv_idx < args[3][1]
        same = tl.load(q_ptrs, mask=has_q, other=0) == tl.load(kv_ptrs, mask=has_kv, other=0)
        return same & has_q & has_kv


OFFSETS = "an id a token; of offsets such as cu_seqlens, give Documents.from_offsets(cu_seqlens, q_len=q_len)"
NO_DOCUMENT = (-1, -2)  # the ids of queries and of keys before the first offset or behind the last


class Documents(Mask):
    """A query sees the keys whose document id equals its own.

    ids: int32 or int64 tensor, [q_len] or [batch, q_len]. kv_ids: the same for the keys; `ids` when None.
    Documents that stand in one piece, as in packed training batches, are the fast case.
    """

    has_gaps = True
    FIELDS = ("ids", "kv_ids", "hulls", "are_alike")

    def __init__(self, ids: torch.Tensor, kv_ids: torch.Tensor | None = None) -> None:
        self.are_alike = kv_ids is None or kv_ids is ids  # query i and key i are one token
        kv_ids = ids if kv_ids is None else kv_ids
        for name, tensor in (("ids", ids), ("kv_ids", kv_ids)):
            check_dtype(name, tensor, INTS)
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name}.shape={tuple(tensor.shape)} must be [length] or [batch, length]")
        if ids.device != kv_ids.device:
            raise ValueError(f"{ids.device=} and {kv_ids.device=} must be the same")
        is_one = kv_ids is ids
        ids = whole_of(ids)
        kv_ids = ids if is_one else whole_of(kv_ids)
        self.ids, self.kv_ids = ids, kv_ids
        self.hulls = document_hulls(torch.atleast_2d(ids), torch.atleast_2d(kv_ids))

    @classmethod
    def from_offsets(
        cls,
        q_offsets: torch.Tensor,
        kv_offsets: torch.Tensor | None = None,
        *,
        q_len: int,
        kv_len: int | None = None,
    ) -> Documents:
        """One document a sequence of `packed_attention`: the queries q_offsets[i] to q_offsets[i + 1] - 1 see
        the keys kv_offsets[i] to kv_offsets[i + 1] - 1. Rows of no sequence see nothing.

        q_offsets: int32 or int64 [batch + 1], which do not decrease (elsewhere called cu_seqlens).
        kv_offsets: the same for the keys; `q_offsets` when None. q_len, kv_len: the rows of q and of k,
        kv_len as many as q_len when None. The host reads no offset.
        """
        q_offsets = whole_of(q_offsets)
        kv_offsets = None if kv_offsets is None else whole_of(kv_offsets)
        if wrong := Packing(q_offsets, kv_offsets).misfits():
            raise ValueError("; ".join(wrong))
        are_alike = kv_offsets is None or kv_offsets is q_offsets
        kv_len = q_len if kv_len is None else kv_len
        of_keys = q_offsets if kv_offsets is None else kv_offsets
        ids = (
            ids_of(offsets, length, missing)
            for offsets, length, missing in zip(
                (q_offsets, of_keys), (q_len, kv_len), NO_DOCUMENT, strict=True
            )
        )
        found = cls(*ids)
        found.are_alike = are_alike and kv_len == q_len
        return found

    def looks(self) -> Any:
        return super().looks(), self.are_alike

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"ids": self.ids, "kv_ids": self.kv_ids, "hulls": self.hulls}

    def misfits(self, shape: Shape) -> list[str]:
        q_len, kv_len = shape.fitted[2:]
        lengths = {"ids": (self.ids, q_len), "kv_ids": (self.kv_ids, kv_len)}
        found = [
            misfit
            for name, (ids, length) in lengths.items()
            for misfit in misfits(name, ids, (shape.batch, length))
        ]
        if found and self.ids.dim() == 1:  # offsets look like ids, but that there are fewer
            found[-1] = with_hint(found[-1], OFFSETS)
        return found

    def bind(self, shape: Shape) -> BoundMask:
        q_len, kv_len = shape.fitted[2:]  # of packed sequences, as long as the ids are
        hulls = self.hulls.expand(shape.batch, q_len, 3)
        q_ids = self.ids.expand(shape.batch, q_len)
        kv_ids = self.kv_ids.expand(shape.batch, kv_len)
        limits = () if shape.is_dense else (q_ids.shape[1], kv_ids.shape[1])
        args = ((hulls, hulls.stride()), (q_ids, q_ids.stride()), (kv_ids, kv_ids.stride()), limits)
        return BoundMask(documents_interval, documents_keep, args)

    def extents(self, shape: Shape) -> tuple[int, int]:
        return self.ids.shape[-1], self.kv_ids.shape[-1]

    def bounds(self, shape: Shape) -> Bounds:
        first, stop, whole = self.hulls.to("cpu", torch.int64)[:, None].unbind(3)
        return Bounds(first, stop, whole != 0)

    def twin(self, shape: Shape) -> Twin:
        return dense.documents(self.ids, self.kv_ids)


def ids_of(offsets: torch.Tensor, length: int, missing: int) -> torch.Tensor:
    """The number of the sequence that each of `length` rows is in, [length]; `missing` for a row of none. No
    host synchronisation."""
    rows = torch.arange(length, dtype=offsets.dtype, device=offsets.device)
    found = torch.searchsorted(offsets.contiguous(), rows, right=True) - 1
    return torch.where((found >= 0) & (found < offsets.shape[0] - 1), found, missing)


def document_hulls(ids: torch.Tensor, kv_ids: torch.Tensor) -> torch.Tensor:
    """ids [B, q_len], kv_ids [B, kv_len] -> int32 [B, q_len, 3]: the first key of the row's document, its
    last key + 1, and whether all keys between are of that document. No host synchronisation."""
    batch = max(ids.shape[0], kv_ids.shape[0])
    dtype = torch.promote_types(ids.dtype, kv_ids.dtype)
    ids, kv_ids = ids.to(dtype).expand(batch, -1).contiguous(), kv_ids.to(dtype).expand(batch, -1)
    if kv_ids.shape[1] == 0:
        return torch.zeros(*ids.shape, 3, dtype=torch.int32, device=ids.device)
    # In a stable sort, the keys of one document keep their order: its first and last stand at the ends.
    ordered, order = kv_ids.sort(dim=1, stable=True)
    begin = torch.searchsorted(ordered, ids)
    end = torch.searchsorted(ordered, ids, right=True)
    count = end - begin
    last_key = kv_ids.shape[1] - 1
    first = order.gather(1, begin.clamp(max=last_key))
    stop = order.gather(1, (end - 1).clamp(min=0)) + 1
    stop = torch.where(count > 0, stop, first)
    return torch.stack([first, stop, stop - first == count], dim=2).to(torch.int32)
