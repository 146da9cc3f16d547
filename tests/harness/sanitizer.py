"""A sanitizer for Triton's interpreter: every address a kernel touches is checked.

`with sanitize(): ...` wraps the interpreter's loads, stores and atomics. It finds every tensor of a
launch by itself, those inside tuples too, and follows each pointer back to the tensor it came from.
It raises SanitizerError for

  bounds     a lane reads or writes outside the elements of the view its pointer came from, gaps between
             the rows of a strided view included, or between two elements
  poison     a masked lane without `other=` reached a store. Hardware leaves such lanes undefined; the
             interpreter would read 0, so here they read as a marked NaN or a large integer
  race       two programs write one address without atomics, or one reads what another writes
  collision  two lanes of one store write different values to one address
  fresh      a kernel reads an element of a tensor named in `fresh=` that no kernel has written yet

Kernels that run compiled pass through untouched: `launches` says how many launches were checked.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.runtime import interpreter

from tilewise import gluon_emulator

from . import quick

# Marked NaNs whose payload sits in the seven top mantissa bits, so that it survives every conversion
# between float types; integers repeat one byte, which no small index or length looks like.
_NAN_BITS = {
    tl.float16: 0x7F68,
    tl.bfloat16: 0x7FED,
    tl.float32: 0x7FED0000,
    tl.float64: 0x7FFDA00000000000,
    tl.float8e5: 0x7F,
    tl.float8e4nv: 0x7F,
    tl.float8e4b15: 0x7F,
    tl.float8e5b16: 0x80,
    tl.float8e4b8: 0x80,
}
_INTEGER_BYTE = 0x5B
_SEVERAL, _ATOMIC = -1, -2  # in place of a program's number: several readers; written by atomics
# The builder's operations that turn one pointer into another of the same tensor.
_POINTER_OPS = (
    "create_addptr",
    "create_bitcast",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_splat",
    "create_trans",
    "create_unsplat",
)


class SanitizerError(AssertionError):
    """A kernel broke a rule of memory access. The text names kernel, program, source line and tensor."""


class _Memory:
    """Who read and who wrote each cell of one storage during one launch; 0 means nobody."""

    def __init__(self, views: list[_View]) -> None:
        self.first = min(view.first for view in views)
        self.cell = min(view.itemsize for view in views)
        cells = -(-(max(view.first + view.extent for view in views) - self.first) // self.cell)
        self.writer = np.zeros(cells, np.int32)
        self.reader = np.zeros(cells, np.int32)

    def cells(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        index: np.ndarray = (addresses - np.uint64(self.first)) // np.uint64(self.cell)
        if itemsize > self.cell:  # one storage seen through two element sizes
            index = (index[:, None] + np.arange(itemsize // self.cell, dtype=np.uint64)).ravel()
        return index


@dataclass
class _View:
    """One tensor argument: where its elements lie, in bytes."""

    name: str
    tensor: torch.Tensor
    first: int
    itemsize: int
    extent: int  # bytes from the first element to the end of the last; 0 for an empty tensor
    gaps: np.ndarray | None  # for a view with gaps: which element offsets belong to it
    written: np.ndarray | None  # for a `fresh` tensor: which bytes of its storage were written
    memory: _Memory | None = None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, written: np.ndarray | None) -> _View:
        dims = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        dims = [(stride, n) for stride, n in dims if n > 1]
        elements = 1 + sum(stride * (n - 1) for stride, n in dims) if tensor.numel() else 0
        gaps, packed = None, 1
        for stride, n in dims:
            if elements and stride != packed:  # np.zeros maps memory lazily: gaps cost nothing
                gaps = np.zeros(elements, bool)
                shape, strides = [n for _, n in dims], [stride for stride, _ in dims]
                np.lib.stride_tricks.as_strided(gaps, shape, strides)[...] = True
                break
            packed *= n
        itemsize = tensor.element_size()
        return cls(name, tensor, tensor.data_ptr(), itemsize, elements * itemsize, gaps, written)

    def __str__(self) -> str:
        t = self.tensor
        return f"{self.name} ({str(t.dtype)[6:]}, shape {tuple(t.shape)}, strides {t.stride()})"

    def contains(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        if self.extent < itemsize:
            return np.zeros(addresses.shape, bool)
        offsets = addresses - np.uint64(self.first)  # an address below `first` wraps to a huge offset
        inside = offsets <= self.extent - itemsize
        if itemsize > 1:
            inside &= (offsets & np.uint64(itemsize - 1)) == 0
        if self.gaps is not None and itemsize == self.itemsize:
            inside[inside] = self.gaps[offsets[inside] // np.uint64(itemsize)]
        return inside


class Sanitizer:
    """State of one `sanitize()` block. `launches` counts the kernel launches that were checked."""

    def __init__(self, races: bool, fresh: Iterable[torch.Tensor]) -> None:
        self.launches = 0
        self._races = races
        self._written = {}
        for t in fresh:
            self._written[t.untyped_storage().data_ptr()] = np.zeros(t.untyped_storage().nbytes(), bool)
        self._error: SanitizerError | None = None
        self._kernel = ""
        self._views: dict[int, _View] = {}
        self._start_program(0, 0, 0, 0)

    def _start_program(self, number: int, *grid_idx: int) -> None:
        self._number, self._grid_idx = number, grid_idx
        self._poisoned_at: str | None = None  # source line of this program's first poisoned load
        self._read_nonfinite = False

    def _fail(self, check: str, text: str) -> None:
        where = f"{self._kernel}, program {self._grid_idx}, {_source_line()}"
        self._error = SanitizerError(f"{check}: {where}: {text}")
        raise self._error

    # The launch: learn the tensors, number the programs, unwrap the interpreter's own exception.

    @contextmanager
    def _launch(self, kernel: str) -> Iterator[None]:
        self.launches += 1
        self._kernel, self._error, self._views = kernel, None, {}
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._views = {}

    def _call(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        with self._launch(executor.fn.__name__):
            return original(executor, *args, **kwargs)

    def _emulate(
        self, original: Callable[..., Any], kernel: Any, grid: Any, arguments: Any, *rest: Any
    ) -> None:
        """The same for a Gluon kernel. What its copy engine moves stays inside a descriptor's tensor; its
        loads and stores by address are checked."""
        with self._launch(kernel.fn.__name__):
            for name, arg in arguments.items():
                self._learn(name, arg, arg)
            self._tie_views_of_one_storage()
            original(kernel, grid, arguments, *rest)

    def _init_args(self, original: Callable[..., Any], executor: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = original(executor, args, kwargs)  # copies of the tensors of a GPU
        device = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
        for (name, arg), host in zip(device, [*host_args, *host_kwargs.values()], strict=True):
            self._learn(name, arg, host)
        self._tie_views_of_one_storage()
        return host_args, host_kwargs

    def _tie_views_of_one_storage(self) -> None:
        by_storage: dict[int, list[_View]] = {}
        for view in self._views.values():
            if view.extent:
                by_storage.setdefault(view.tensor.untyped_storage().data_ptr(), []).append(view)
        for views in by_storage.values():
            memory = _Memory(views)
            for view in views:
                view.memory = memory

    def _learn(self, name: str, arg: Any, host: Any) -> None:
        if isinstance(arg, tuple):
            for i, (item, host_item) in enumerate(zip(arg, host, strict=True)):
                self._learn(f"{name}[{i}]", item, host_item)
        elif isinstance(arg, (interpreter.TensorDescriptor, HopperDescriptor)):
            self._learn(f"{name}.base", arg.base, host.base)
        elif hasattr(arg, "data_ptr"):
            storage = interpreter._unwrap_tensor(arg).untyped_storage().data_ptr()
            tensor = interpreter._unwrap_tensor(host)
            self._views[id(host)] = _View.of(name, tensor, self._written.get(storage))

    def _convert(self, original: Callable[..., Any], arg: Any) -> Any:
        value = original(arg)
        if id(arg) in self._views:
            value.handle.attr["view"] = self._views[id(arg)]
        return value

    def _set_grid_idx(self, original: Callable[..., Any], builder: Any, x: int, y: int, z: int) -> None:
        _, size_y, size_z = builder.grid_dim
        self._start_program((x * size_y + y) * size_z + z + 1, x, y, z)
        original(builder, x, y, z)

    def _pointer_op(self, original: Callable[..., Any], builder: Any, *args: Any) -> Any:
        out = original(builder, *args)
        for arg in args:
            view = getattr(arg, "attr", {}).get("view")
            if view is not None:
                out.attr["view"] = view
        return out

    # The accesses.

    def _load(
        self, original: Any, builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any
    ) -> Any:
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        self._access("load", ptrs, lanes)
        dtype = ptrs.get_element_ty()
        if other is None and not lanes.all():
            other = interpreter.TensorHandle(_poison(ptrs.data.shape, dtype), dtype)
            self._poisoned_at = self._poisoned_at or _source_line()
        out = original(builder, ptrs, mask, other, *rest, **named)
        self._read_nonfinite |= dtype.is_floating() and bool(_nonfinite(out.data, dtype)[lanes].any())
        return out

    def _store(self, original: Any, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        self._access("store", ptrs, lanes)
        data = np.broadcast_to(value.data, ptrs.data.shape)
        if self._poisoned_at:
            dtype = value.get_element_ty()
            marked = _bits(data) == _bits(_poison((1,), dtype))
            if dtype.is_floating() and not self._read_nonfinite:  # an exponential loses the NaN's mark
                marked |= _is_nan(data, dtype)
            if (marked & lanes).any():
                self._fail("poison", f"stores what a masked lane without other= read at {self._poisoned_at}")
        out = original(builder, ptrs, value, mask, *rest)
        memory = interpreter._interpreter.load(ptrs.data, mask.data, np.zeros_like(data), data.dtype)
        if ((_bits(memory) != _bits(data)) & lanes).any():
            self._fail("collision", "two lanes of one store write different values to one address")
        return out

    def _atomic(self, original: Any, builder: Any, op: Any, ptrs: Any, val: Any, mask: Any, *r: Any) -> Any:
        self._access("atomic", ptrs, np.broadcast_to(mask.data, ptrs.data.shape))
        return original(builder, op, ptrs, val, mask, *r)

    def _compare_and_swap(self, original: Any, builder: Any, ptrs: Any, *rest: Any) -> Any:
        self._access("atomic", ptrs, np.ones(ptrs.data.shape, bool))
        return original(builder, ptrs, *rest)

    def _access(self, kind: str, ptrs: Any, lanes: np.ndarray) -> None:
        addresses = ptrs.data[lanes]  # flat: the lanes that are not masked
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        origin = ptrs.attr.get("view")
        views = [origin] if origin is not None else list(self._views.values())
        for view in views:
            inside = view.contains(addresses, itemsize)
            if inside.all():
                self._touch(kind, view, addresses, itemsize)
                return
            if origin is None:  # a pointer of unknown origin may be any tensor's
                self._touch(kind, view, addresses[inside], itemsize)
            addresses = addresses[~inside]
        self._fail("bounds", f"{kind} of {_describe(addresses, views)}")

    def _touch(self, kind: str, view: _View, addresses: np.ndarray, itemsize: int) -> None:
        if not len(addresses):
            return
        if view.written is not None:
            start = np.uint64(view.tensor.untyped_storage().data_ptr())
            place = (addresses - start)[:, None] + np.arange(itemsize, dtype=np.uint64)
            unwritten = ~view.written[place].all(axis=1)
            if kind != "store" and unwritten.any():
                self._fail("fresh", f"{kind} of never written {_describe(addresses[unwritten], [view])}")
            view.written[place] |= kind == "store"
        if not self._races or view.memory is None:
            return
        memory, me = view.memory, self._number
        cells = memory.cells(addresses, itemsize)
        last = memory.writer[cells]
        clash = (last != 0) & (last != me)
        if kind == "atomic":
            clash &= last != _ATOMIC
        if kind != "load":
            seen = memory.reader[cells]
            clash |= (seen != 0) & (seen != me)
        if clash.any():
            lane = int(clash.argmax()) * len(addresses) // len(cells)
            deed = "reads what another program writes:" if kind == "load" else "writes what another touches:"
            self._fail("race", f"{deed} {kind} of {_describe(addresses[lane : lane + 1], [view])}")
        if kind == "load":
            seen = memory.reader[cells]
            memory.reader[cells] = np.where((seen == 0) | (seen == me), me, _SEVERAL)
        else:
            memory.writer[cells] = _ATOMIC if kind == "atomic" else me


def _bits(data: np.ndarray) -> np.ndarray:
    return data.view(f"u{data.dtype.itemsize}")


def _poison(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    numpy_dtype = interpreter._get_np_dtype(dtype)
    bits = _NAN_BITS.get(dtype, int.from_bytes(bytes([_INTEGER_BYTE]) * numpy_dtype.itemsize, "little"))
    return np.full(shape, bits, f"u{numpy_dtype.itemsize}").view(numpy_dtype)


def _is_nan(data: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype == tl.bfloat16:  # kept as bits
        return (data & 0x7FFF) > 0x7F80
    return np.isnan(data)


def _nonfinite(data: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype == tl.bfloat16:
        return (data & 0x7F80) == 0x7F80
    return ~np.isfinite(data)


def _describe(addresses: np.ndarray, views: list[_View]) -> str:
    """The first of `addresses` as an element offset of the nearest of `views`."""
    address = int(addresses[0])
    if not views:
        return f"address {address:#x}: the launch has no tensor"
    view = min(views, key=lambda v: max(v.first - address, address - v.first - v.extent, 0))
    offset = (address - view.first) / view.itemsize
    last = view.extent // view.itemsize - 1
    return f"element offset {math.floor(offset) if offset.is_integer() else offset} of {view}, " + (
        f"whose last element is at {last} ({len(addresses)} lane(s))"
    )


def _source_line() -> str:
    """File and line of the innermost frame that belongs to a kernel."""
    skip = (os.path.dirname(triton.__file__), __file__, quick.__file__)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skip):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@contextmanager
def sanitize(*, races: bool = True, fresh: Iterable[torch.Tensor] = ()) -> Iterator[Sanitizer]:
    """Check every interpreted launch inside the block; raise SanitizerError at the first fault.

    races: also report programs of one launch that meet at one address.
    fresh: tensors whose contents count as never written when the block begins.
    """
    state = Sanitizer(races, fresh)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    wrappers = [
        (executor, "__call__", state._call),
        (executor, "_init_args_hst", state._init_args),
        (gluon_emulator, "emulate", state._emulate),
        (interpreter, "_implicit_cvt", state._convert),
        (builder, "set_grid_idx", state._set_grid_idx),
        (builder, "create_masked_load", state._load),
        (builder, "create_masked_store", state._store),
        (builder, "create_atomic_rmw", state._atomic),
        (builder, "create_atomic_cas", state._compare_and_swap),
        *((builder, name, state._pointer_op) for name in _POINTER_OPS if hasattr(builder, name)),
    ]
    with ExitStack() as stack:
        for owner, name, wrapper in wrappers:
            stack.enter_context(mock.patch.object(owner, name, _bind(wrapper, getattr(owner, name))))
        yield state


def _bind(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    # A plain function, so that Python passes the builder or the executor as its first argument.
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)
