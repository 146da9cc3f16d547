"""Which pairs count? Masks: their device functions, and the objects that a caller combines with `&`.

A mask answers on the device with one or both of

    interval(q_idx, batch, head, args) -> lo, hi, whole       per row: the keys lo..hi, and whether all count
    keep(q_idx, kv_idx, batch, head, args) -> bool tile       pair by pair, where an interval is not enough

`intervals.py` shows what the kernels make of them. Indices are int32 and always those of valid rows and keys,
so loads need no bounds check. q_idx is [TILE_Q] for an interval. For keep, q_idx and kv_idx have the tile's
two dimensions, one of them of size 1: [TILE_Q, 1] against [1, TILE_KV], and in the backward also the
transpose. `args` is the tuple that `bind` returned. Every mask names its specification, a plain PyTorch
function, as its `twin`, and says on the host what its interval says on the device: its `bounds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import triton
import triton.language as tl

import tilewise_reference.masks as dense

from .bounds import FIRST_KEY, UNLIMITED, Bounds, on_host, positions
from .problem import INTS, Align, Shape, broadcast_strides, check_align, check_dtype, misfits, tensors_within

Twin = Callable[..., torch.Tensor]


class BoundMask(NamedTuple):
    """A mask tied to the sizes of one call: its device functions (or None) and their runtime arguments."""

    interval: Any
    keep: Any
    args: tuple[Any, ...]


class Mask:
    """A rule for which query-key pairs count. Combine rules with `&`; a bool tensor may stand on either side.

    `has_gaps` says that a key between two keys seen by a tile of rows may be seen by none of them; the kernel
    then keeps such a key's value, which may be NaN, out of its sums. Intervals whose ends rise by at most one
    key a row, as those of Causal, Window, Prefix and Padding do, leave no gaps, nor do their intersections.
    """

    has_gaps = False
    # The attributes that make up the object, by which `encoding` takes it apart and builds it again.
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def parts(self) -> tuple[Mask, ...]:
        """The rules that must all hold."""
        return (self,)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the device functions read, by argument name."""
        return {}

    def misfits(self, shape: Shape) -> list[str]:
        """Why this mask cannot serve a call of this shape; empty if it can."""
        return []

    def looks(self) -> Any:
        """What rules look at besides the shapes, dtypes and devices of `tensors`; hashable."""
        return type(self)

    def bind(self, shape: Shape) -> BoundMask:
        raise NotImplementedError(f"{type(self).__name__} defines no bind()")

    def bounds(self, shape: Shape) -> Bounds | None:
        """The interval of every row, in plain PyTorch. None: there is none, or only the device knows it.
        Reads the mask's tensors, so that the host waits for the GPU: tools ask for it, calls do not."""
        return None

    def twin(self, shape: Shape) -> Twin:
        """The same rule as f(batch, head, q_idx, kv_idx) -> bool tensor, in plain PyTorch."""
        raise NotImplementedError(f"{type(self).__name__} defines no twin()")

    def __and__(self, other: Mask | torch.Tensor) -> Mask:
        return All(self, as_mask(other))

    def __rand__(self, other: torch.Tensor) -> Mask:
        return All(as_mask(other), self)


class All(Mask):
    """The pairs that every one of several masks keeps: what `a & b` builds."""

    def __init__(self, *masks: Mask) -> None:
        self._parts = tuple(part for mask in masks for part in mask.parts())

    def parts(self) -> tuple[Mask, ...]:
        return self._parts


def as_mask(given: Any) -> Mask:
    """The mask that a caller means by a Mask, a bool tensor or a `@triton.jit` keep function."""
    if isinstance(given, Mask):
        return given
    if isinstance(given, torch.Tensor):
        return Dense(given)
    if isinstance(given, triton.runtime.KernelInterface):
        return UserMask(given)
    raise ValueError(
        f"mask={given!r} must be a tilewise mask, a bool tensor or a @triton.jit function "
        "keep(q_idx, kv_idx, batch, head, args)"
    )


class _PerBatch(Mask):
    """A mask with one length for all sequences (an int), or one a sequence (an int tensor [batch])."""

    def __init__(self, name: str, lengths: int | torch.Tensor) -> None:
        self.name, self.lengths = name, lengths
        if isinstance(lengths, torch.Tensor):
            check_dtype(name, lengths, INTS)
        elif not isinstance(lengths, int) or lengths < 0:
            raise ValueError(f"{name}={lengths!r} must be an int, at least 0, or an int tensor [batch]")

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


# ---- Causal: keys up to the row's own position


@triton.jit
def causal_interval(q_idx, batch, head, args):
    return q_idx * 0, q_idx + args[0] + 1, q_idx >= 0


class Causal(Mask):
    """A query sees its own position and everything before it.

    align: "bottom_right" puts the last query at the last key (new tokens after a cache); "top_left" puts the
    first query at the first key, as PyTorch's `is_causal=True` does. The two agree where q_len = kv_len.
    """

    FIELDS = ("align",)

    def __init__(self, align: Align = "bottom_right") -> None:
        check_align(align)
        self.align = align

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(causal_interval, None, (shape.shift(self.align),))

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(FIRST_KEY, positions(shape, self.align) + 1)

    def twin(self, shape: Shape) -> Twin:
        return dense.causal(shape.q_len, shape.kv_len, self.align)


# ---- Window: keys near the row's own position


@triton.jit
def window_interval(q_idx, batch, head, args):
    shift, left, right = args
    return q_idx + shift - left, q_idx + shift + right + 1, q_idx >= 0


class Window(Mask):
    """A query sees `left` keys before its own position, that position, and `right` keys after it.

    None sets no limit on that side; Window(w - 1, 0) is a causal window of w keys. Source: Longformer
    (arXiv 2004.05150). `align` as in Causal.
    """

    FIELDS = ("left", "right", "align")

    def __init__(self, left: int | None, right: int | None, align: Align = "bottom_right") -> None:
        check_align(align)
        for name, size in (("left", left), ("right", right)):
            if size is not None and not (isinstance(size, int) and 0 <= size < UNLIMITED):
                wanted = f"None (no limit) or an int from 0 to {UNLIMITED - 1}"
                raise ValueError(f"{name}={size!r} must be {wanted}")
        self.left, self.right, self.align = left, right, align

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(window_interval, None, (shape.shift(self.align), *self.reach()))

    def bounds(self, shape: Shape) -> Bounds:
        (left, right), row = self.reach(), positions(shape, self.align)
        return Bounds(row - left, row + right + 1)

    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own position a row sees at most."""
        left, right = (UNLIMITED if size is None else size for size in (self.left, self.right))
        return left, right

    def twin(self, shape: Shape) -> Twin:
        return dense.window(self.left, self.right, shape.q_len, shape.kv_len, self.align)


# ---- Prefix: the first keys for all, the rest causal


@triton.jit
def prefix_interval(q_idx, batch, head, args):
    shift, length_args = args
    return q_idx * 0, tl.maximum(q_idx + shift + 1, row_length(batch, length_args)), q_idx >= 0


class Prefix(_PerBatch):
    """Every query sees the first `lengths` keys; the rest are causal (prefix language model, T5,
    arXiv 1910.10683). lengths: an int, or an int32 or int64 tensor [batch]. `align` as in Causal."""

    FIELDS = ("name", "lengths", "align")

    def __init__(self, lengths: int | torch.Tensor, align: Align = "bottom_right") -> None:
        check_align(align)
        super().__init__("lengths", lengths)
        self.align = align

    def bind(self, shape: Shape) -> BoundMask:
        return BoundMask(prefix_interval, None, (shape.shift(self.align), self.length_args(shape)))

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(FIRST_KEY, torch.maximum(positions(shape, self.align) + 1, self.host_lengths()))

    def twin(self, shape: Shape) -> Twin:
        return dense.prefix(self.lengths, shape.q_len, shape.kv_len, self.align)


# ---- Padding: only some of the keys are real


@triton.jit
def padding_right_interval(q_idx, batch, head, args):
    return q_idx * 0, q_idx * 0 + row_length(batch, args[1]), q_idx >= 0


@triton.jit
def padding_left_interval(q_idx, batch, head, args):
    kv_len, length_args = args
    return q_idx * 0 + (kv_len - row_length(batch, length_args)), q_idx * 0 + kv_len, q_idx >= 0


class Padding(_PerBatch):
    """Only `kv_lens` of the keys are real: the first ones with side="right", the last ones with side="left".

    kv_lens: an int, or an int32 or int64 tensor [batch]. Lengths in a tensor are not read on the host; one
    above kv_len counts as kv_len, one below 0 as 0.
    """

    FIELDS = ("name", "lengths", "side")

    def __init__(self, kv_lens: int | torch.Tensor, side: Literal["right", "left"] = "right") -> None:
        if side not in ("right", "left"):
            raise ValueError(f"{side=} must be 'right' or 'left'")
        super().__init__("kv_lens", kv_lens)
        self.side = side

    def bind(self, shape: Shape) -> BoundMask:
        interval = padding_right_interval if self.side == "right" else padding_left_interval
        return BoundMask(interval, None, (shape.kv_len, self.length_args(shape)))

    def bounds(self, shape: Shape) -> Bounds:
        if self.side == "left":
            return Bounds(shape.kv_len - self.host_lengths(), FIRST_KEY + shape.kv_len)
        return Bounds(FIRST_KEY, self.host_lengths())

    def twin(self, shape: Shape) -> Twin:
        return dense.padding(self.lengths, shape.kv_len, self.side)


# ---- Intervals: any interval a row


@triton.jit
def rows_interval(q_idx, batch, head, args):
    start_ptr, start_strides, end_ptr, end_strides = args
    b, h, row = batch.to(tl.int64), head.to(tl.int64), q_idx.to(tl.int64)
    start = tl.load(start_ptr + b * start_strides[0] + h * start_strides[1] + row * start_strides[2])
    end = tl.load(end_ptr + b * end_strides[0] + h * end_strides[1] + row * end_strides[2])
    return as_index(start), as_index(end), q_idx >= 0


class Intervals(Mask):
    """Query i sees the keys start[i] ≤ j < end[i]; none where end ≤ start.

    start, end: int32 or int64 tensors that broadcast to [batch, q_heads, q_len]. Bounds beyond 0..kv_len are
    cut to it.
    """

    has_gaps = True
    FIELDS = ("start", "end")

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        check_dtype("start", start, INTS)
        check_dtype("end", end, INTS)
        self.start, self.end = start, end

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"start": self.start, "end": self.end}

    def misfits(self, shape: Shape) -> list[str]:
        wanted = shape.scores[:3]
        return misfits("start", self.start, wanted) + misfits("end", self.end, wanted)

    def bind(self, shape: Shape) -> BoundMask:
        rows = shape.scores[:3]
        start, end = broadcast_strides(self.start, rows), broadcast_strides(self.end, rows)
        return BoundMask(rows_interval, None, (self.start, start, self.end, end))

    def bounds(self, shape: Shape) -> Bounds:
        return Bounds(on_host(self.start), on_host(self.end))

    def twin(self, shape: Shape) -> Twin:
        return dense.intervals(self.start, self.end)


# ---- Dense: a boolean tensor


@triton.jit
def dense_keep(q_idx, kv_idx, batch, head, args):
    ptr, strides = args
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return tl.load(ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]) != 0


class Dense(Mask):
    """A bool tensor that broadcasts to [batch, q_heads, q_len, kv_len], True where the pair counts. No tile
    is skipped: combine it with a structured mask (`Causal() & tensor`) where one bounds it."""

    has_gaps = True
    FIELDS = ("mask",)

    def __init__(self, mask: torch.Tensor) -> None:
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"{mask=} must be a tensor of dtype torch.bool")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask.dtype={mask.dtype} must be torch.bool; pass an additive mask as bias=")
        self.mask = mask

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mask": self.mask}

    def misfits(self, shape: Shape) -> list[str]:
        return misfits("mask", self.mask, shape.scores)

    def bind(self, shape: Shape) -> BoundMask:
        strides = broadcast_strides(self.mask, shape.scores)
        return BoundMask(None, dense_keep, (self.mask.view(torch.uint8), strides))

    def twin(self, shape: Shape) -> Twin:
        mask = self.mask.expand(shape.scores)
        return lambda batch, head, q_idx, kv_idx: mask[batch, head, q_idx, kv_idx]


# ---- UserMask: a function of the caller's own


class UserMask(Mask):
    """A mask from the caller's own module-level `@triton.jit` functions.

    keep(q_idx, kv_idx, batch, head, args) -> bool tile; indices as described at the head of this file.
    args: a tuple of tensors, ints and floats, handed on to every function.
    interval(q_idx, batch, head, args) -> lo, hi, whole, optional: keys outside lo..hi are not visited; where
        `whole` is true for all rows of a tile, `keep` is not asked inside it.
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
