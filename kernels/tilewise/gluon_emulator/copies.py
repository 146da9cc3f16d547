"""The copy engine (TMA): tiles between global and shared memory, each at a time of the schedule's choosing.

    load    global ──► shared; lands any time after it was issued, and then counts its bytes at an mbarrier
    store   shared ──► global; reads its source any time between its issue and the role's `tma.store_wait`
    add     the same, and then adds what it has read to what is there, any time before the role has waited for
            the bulk group itself; or, where nobody does, even after the program's end

A tile may reach beyond the tensor: what lies outside reads as 0 and is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from .memory import Access, MBarrier, Memory, SharedMemory
from .numbers import integer, numpy_dtype, poison, scalar
from .roles import place

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


class Descriptor:
    """A tensor in global memory and the shape of its tiles, with what Gluon's `tensor_descriptor` tells."""

    def __init__(self, host: Any) -> None:
        """host: a `TensorDescriptor` of `triton.experimental.gluon.nvidia.hopper`."""
        if host.base.device.type != "cpu":
            raise ValueError(f"a descriptor's tensor is on {host.base.device}, but must be on the CPU")
        if host.padding != "zero":
            raise NotImplementedError(f"a descriptor with {host.padding=}")
        self.dtype: tl.dtype = interpreter._implicit_cvt(host.base).dtype.element_ty
        bits = host.base.detach().as_strided(tuple(host.shape), tuple(host.strides))
        bits = bits.view(BITS[host.base.element_size()])
        self.data: np.ndarray[Any, Any] = bits.numpy().view(numpy_dtype(self.dtype))
        self.layout = host.layout
        self.block_type = tl.block_type(self.dtype, list(host.block_shape))
        self.block_shape = list(host.block_shape)
        self.shape = [scalar(int(n)) for n in host.shape]

    def window(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tile at `corner` that lies in the tensor: where it is there, and in the tile."""
        outside, inside = [], []
        for at, tile, size in zip(corner, self.block_shape, self.data.shape, strict=True):
            start = min(max(at, 0), size)
            stop = max(min(at + tile, size), start)
            outside.append(slice(start, stop))
            inside.append(slice(start - at, stop - at) if start < stop else slice(0, 0))
        return tuple(outside), tuple(inside)


class Load:
    """A copy into shared memory, from its issue to its landing."""

    outlives = False

    def __init__(
        self, memory: Memory, source: Descriptor, corner: list[int], barrier: MBarrier, to: SharedMemory
    ) -> None:
        self._memory, self._source, self._corner, self._barrier, self._to = (
            memory,
            source,
            corner,
            barrier,
            to,
        )
        self.signals = barrier
        self._name = f"the load of tile {corner} that {memory.roles.running} issued at {place()}"
        memory.check_free(to, "a TMA load")
        memory.check_seen(to, "a TMA load")
        nbytes = to.data.nbytes
        if barrier.in_flight + nbytes > barrier.bytes:
            raise memory.roles.fault(
                f"a TMA load of {nbytes} bytes, but the mbarrier expects only "
                f"{barrier.bytes - barrier.in_flight} more than are in flight: {barrier}"
            )
        barrier.in_flight += nbytes
        to.data[...] = poison(to.shape, to.dtype)
        self._access = Access(to.data, self)
        memory.filling.append(self._access)
        self._clock = memory.overwrite(to, self, barrier)

    def happen(self) -> None:
        outside, inside = self._source.window(self._corner)
        self._to.data[...] = 0
        self._to.data[inside] = self._source.data[outside]
        self._memory.filling.remove(self._access)
        self._barrier.land(self._to.data.nbytes, self._clock)

    def __str__(self) -> str:
        return self._name


class Store:
    """A copy out of shared memory, from its issue to the wait for it."""

    kind = "store"

    def __init__(self, memory: Memory, to: Descriptor, corner: list[int], source: SharedMemory) -> None:
        self._memory, self._to, self._corner, self._source = memory, to, corner, source
        self.signals = memory.roles.running
        self.has_read = self.has_happened = False
        self._name = f"the {self.kind} to tile {corner} that {memory.roles.running} issued at {place()}"
        memory.check_landed(source, f"a TMA {self.kind}")
        memory.check_seen(source, f"a TMA {self.kind}")
        self._access = Access(source.data, self)
        memory.read.append(self._access)
        memory.begin(self)

    @property
    def outlives(self) -> bool:
        return False

    def happen(self) -> None:
        outside, inside = self._to.window(self._corner)
        self._to.data[outside] = self._source.data[inside]
        self.has_read = self.has_happened = True

    def release(self) -> None:
        """The role has waited: the source may be written again."""
        self._memory.read.remove(self._access)
        self._memory.end(self)

    def __str__(self) -> str:
        return self._name


class Add(Store):
    """A copy out of shared memory that is added to what is there: it reads, and later it adds."""

    kind = "add"
    _values: np.ndarray[Any, Any]

    @property
    def outlives(self) -> bool:
        return self.has_read

    def happen(self) -> None:
        if not self.has_read:
            self._values = self._source.data.copy()
            self.has_read = True
            self._memory.roles.copies.append(self)
            return
        outside, inside = self._to.window(self._corner)
        with np.errstate(all="ignore"):
            self._to.data[outside] += self._values[inside]
        self.has_happened = True


def check_tile(
    memory: Memory, descriptor: Descriptor, corner: Sequence[Any], tile: SharedMemory
) -> list[int]:
    """The corner as numbers; the tile in shared memory must be one of the descriptor's."""
    if tile.shape != descriptor.block_shape or tile.dtype != descriptor.dtype:
        raise memory.roles.fault(
            f"{tile.name} is {tile.dtype} {tile.shape}, but the descriptor's tiles are {descriptor.dtype} "
            f"{descriptor.block_shape}"
        )
    if len(corner) != tile.rank:
        raise memory.roles.fault(f"{len(corner)} coordinates for a descriptor of rank {tile.rank}")
    return [integer(at) for at in corner]
