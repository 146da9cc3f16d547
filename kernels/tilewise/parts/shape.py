"""The sizes of one attention call, and what every argument is checked and addressed by."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Align = Literal["bottom_right", "top_left"]


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)


class Shape(NamedTuple):
    """q [batch, q_heads, q_len, head_dim] against k, v [batch, kv_heads, kv_len, head_dim or value_dim]."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.q_heads // self.kv_heads

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """The shape that the score matrix would have."""
        return self.batch, self.q_heads, self.q_len, self.kv_len

    def shift(self, align: Align) -> int:
        """Query row i stands at key position i + shift."""
        return self.kv_len - self.q_len if align == "bottom_right" else 0


def check_align(align: str) -> None:
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f"{align=} must be 'bottom_right' or 'top_left'")


def check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    wanted = ", ".join(map(str, dtypes))
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}={tensor!r} must be a tensor of dtype {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype={tensor.dtype} must be one of {wanted}")


def misfits(name: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> list[str]:
    """Why `tensor` does not read as `wanted` under PyTorch's broadcasting rules; empty if it does."""
    given = tuple(tensor.shape)
    return [] if fits(given, wanted) else [f"{name}.shape={given} must broadcast to {wanted}"]


def fits(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another."""
    pairs = zip(reversed(given), reversed(wanted), strict=False)
    return len(given) <= len(wanted) and all(size in (1, full) for size, full in pairs)


def broadcast_strides(tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides with which `tensor` reads as `shape`: 0 along every broadcast dimension."""
    return tensor.expand(shape).stride()


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
