"""The sizes of one attention call, and what every argument is checked and addressed by."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Align = Literal["bottom_right", "top_left"] | int | torch.Tensor | None  # aligned.py


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PARAMETERS = (*FLOATS, torch.float64)  # what scores are made of; fp64 goes with q, k and v in fp64
INTS = (torch.int32, torch.int64)


ANY = -1  # a length that only the device knows
FAR = 1 << 30  # further than any sequence is long
POSITIONS = 1 << 29  # query 0 stands at most so far from key 0, so that sums of positions fit 32 bits


class Packing(NamedTuple):
    """Where packed sequences start: int32 or int64 [batch + 1] on the device. kv_offsets: None if the same.

    Offsets are read by the device alone, so that lengths may change under a CUDA graph.
    """

    q_offsets: torch.Tensor
    kv_offsets: torch.Tensor | None

    @property
    def batch(self) -> int:
        return self.q_offsets.shape[0] - 1

    def misfits(self) -> list[str]:
        """Why these are no offsets; empty if they are."""
        found = []
        for name, offsets in zip(self._fields, self, strict=True):
            if offsets is None and name == "kv_offsets":
                continue
            if not isinstance(offsets, torch.Tensor) or offsets.dtype not in INTS:
                given = offsets.dtype if isinstance(offsets, torch.Tensor) else repr(offsets)
                found.append(f"{name}={given} must be a tensor of dtype torch.int32 or torch.int64")
            elif offsets.dim() != 1 or offsets.shape[0] < 2:
                found.append(
                    f"{name}.shape={tuple(offsets.shape)} must be [batch + 1], with batch at least 1"
                )
        if not found and self.kv_offsets is not None and len(self.kv_offsets) != len(self.q_offsets):
            counts = f"{tuple(self.q_offsets.shape)}, kv_offsets.shape={tuple(self.kv_offsets.shape)}"
            found.append(f"q_offsets.shape={counts} must be equal")
        return found

    def offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries and of keys, each in one piece."""
        q_offsets = self.q_offsets.contiguous()
        return q_offsets, q_offsets if self.kv_offsets is None else self.kv_offsets.contiguous()


class Pages(NamedTuple):
    """Where the rows of a cache in pages are. table: int32 or int64 [batch, max_pages], the page that holds
    rows i · page_size to (i + 1) · page_size - 1 of a sequence; page_count: how many there are."""

    table: torch.Tensor
    page_size: int
    page_count: int


class Cache(NamedTuple):
    """Keys and values are those of a cache, of which kv_lens int32 or int64 [batch] rows are filled, on the
    device; split_size: the keys of one split, None: as the chip has room."""

    kv_lens: torch.Tensor
    pages: Pages | None = None
    split_size: int | None = None


class Shape(NamedTuple):
    """q [batch, q_heads, q_len, head_dim] against k, v [batch, kv_heads, kv_len, head_dim or value_dim].

    With a packing, batch is the number of sequences; q_len and kv_len are the rows of all of them together,
    which no sequence is longer than. With a cache, kv_len is its capacity, which no sequence is longer than.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    packing: Packing | None = None
    cache: Cache | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the lengths are those of every sequence."""
        return self.packing is None and self.cache is None

    @property
    def blocks(self) -> int:
        """The first dimension of q, out and whatever has a number a row."""
        return self.batch if self.packing is None else 1

    @property
    def group(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.q_heads // self.kv_heads

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """The shape that the score matrix would have."""
        return self.batch, self.q_heads, self.q_len, self.kv_len

    @property
    def fitted(self) -> tuple[int, int, int, int]:
        """What a tensor with an element a pair must broadcast to. Of packed sequences and of a cache it is
        read at the positions inside each, so it may have any length, and should have that of the longest."""
        q_len = self.q_len if self.packing is None else ANY
        return self.batch, self.q_heads, q_len, self.kv_len if self.is_dense else ANY

    @property
    def layout(self) -> tuple[Any, ...]:
        """What kernels are told of where sequences lie: sequences.py."""
        if self.is_dense:
            return (), ()
        q_side: tuple[Any, ...] = ()
        if self.packing is not None:
            q_offsets, kv_offsets = self.packing.offsets()
            q_side, kv_side = (q_offsets, self.batch), (kv_offsets, self.batch)
        if self.cache is None:
            return q_side, kv_side
        lens, pages, _ = self.cache
        if pages is None:
            return q_side, (lens, lens.stride(0), ())
        return q_side, (lens, lens.stride(0), (pages.table, pages.table.stride(), *pages[1:]))

    def shift(self, align: Align) -> int | torch.Tensor:
        """Query row i of a sequence of these lengths stands at key position i + shift."""
        if align is None or isinstance(align, str):
            return 0 if align == "top_left" else self.kv_len - self.q_len
        return align

    def shift_args(self, align: Align) -> tuple[Any, ...]:
        """The same for `sequences.row_shift`: a number, or where each sequence has its own."""
        if isinstance(align, torch.Tensor):
            return align, broadcast_strides(align, (self.batch,))[0]
        if self.is_dense or isinstance(align, int):
            return (self.shift(align),)
        alike = self.cache is None and self.packing is not None and self.packing.kv_offsets is None
        if align == "top_left" or alike:
            return (0,)
        return self.layout, self.q_len, self.kv_len

    def kv_len_args(self) -> tuple[Any, ...]:
        """kv_len for `sequences.key_count`."""
        return (self.kv_len,) if self.is_dense else (self.layout[1], self.kv_len)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, sums and lse where q, k and v have this one: fp64 where they do, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    wanted = ", ".join(map(str, dtypes))
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}={tensor!r} must be a tensor of dtype {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype={tensor.dtype} must be one of {wanted}")


def misfits(name: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> list[str]:
    """Why `tensor` does not read as `wanted` under PyTorch's broadcasting rules; empty if it does."""
    given = tuple(tensor.shape)
    if fits(given, wanted):
        return []
    sizes = ", ".join("any" if size == ANY else str(size) for size in wanted)
    return [f"{name}.shape={given} must broadcast to ({sizes}{',' * (len(wanted) == 1)})"]


def fits(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another."""
    pairs = zip(reversed(given), reversed(wanted), strict=False)
    return len(given) <= len(wanted) and all(full == ANY or size in (1, full) for size, full in pairs)


def broadcast_strides(tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides with which `tensor` reads as `shape`: 0 along every broadcast dimension."""
    if ANY not in shape:
        return tensor.expand(shape).stride()
    missing = (0,) * (len(shape) - tensor.dim())
    return (
        *missing,
        *(0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)),
    )


def common_limits(shape: tuple[int, ...], *tensors: torch.Tensor) -> tuple[int, ...]:
    """How far all of these tensors reach along queries (and keys, where `shape` has four dimensions); () if
    `shape` says how long they are. One that is broadcast reaches everywhere. Nothing lies beyond."""
    if ANY not in shape:
        return ()
    padded = [(1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape) for tensor in tensors]
    reach = [min([FAR if n == 1 else n for n in sizes]) for sizes in zip(*padded, strict=True)]
    return tuple(reach[2:])


def pair_limits(tensor: torch.Tensor) -> tuple[int, int]:
    """The same for a tensor with an element a pair, along queries and keys."""
    q_limit, kv_limit = common_limits((1, 1, ANY, ANY), tensor)
    return q_limit, kv_limit


def tensors_within(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The tensors of an argument, those in tuples within tuples too, each by its place: "args[1][0]"."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            found |= tensors_within(f"{name}[{i}]", each)
    return found


# Plain Python on purpose: Triton's functions of the same purpose cost 5 µs a call on the host.


def ceil_div(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()
