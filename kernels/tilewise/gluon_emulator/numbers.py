"""How does Triton's interpreter hold numbers, and what does a GPU do that it does not?

A value in registers is a `tl.tensor` around a numpy array; a bfloat16 is its raw 16 bits, as uint16. Where a
GPU rounds an fp32 to the nearest bfloat16, the interpreter truncates, and it does arithmetic on the raw bits;
the emulator rounds, and refuses the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder


def quiet() -> contextlib.AbstractContextManager[Any]:
    """NaN and infinities pass without NumPy's warnings, as on a GPU: a setting of one thread."""
    return np.errstate(over="ignore", invalid="ignore")


def numpy_dtype(dtype: tl.dtype) -> np.dtype[Any]:
    return interpreter._get_np_dtype(dtype)


def register(data: np.ndarray[Any, Any], dtype: tl.dtype) -> tl.tensor:
    """A value in registers. A scalar's data have the shape (1,), as the interpreter has it."""
    shape = list(data.shape)
    handle = TensorHandle(data if shape else data.reshape(1), dtype)
    return tl.tensor(handle, tl.block_type(dtype, shape) if shape else dtype)


def scalar(value: Any, dtype: tl.dtype = tl.int32) -> tl.tensor:
    return register(np.array(value, numpy_dtype(dtype)), dtype)


def array(value: tl.tensor) -> np.ndarray[Any, Any]:
    return value.handle.data


def integer(value: Any) -> int:
    """The number in a register, or one that is known when the kernel is compiled."""
    return int(array(value).item()) if isinstance(value, tl.tensor) else int(value)


def poison(shape: list[int], dtype: tl.dtype) -> np.ndarray[Any, Any]:
    """Memory that nobody has written: NaN; integers are the largest."""
    kind = numpy_dtype(dtype)
    if dtype == tl.bfloat16:
        return np.full(shape, 0x7FC0, kind)
    if dtype.is_floating() and kind.kind == "f":
        return np.full(shape, np.nan, kind)
    return np.full(shape, True if kind.kind == "b" else np.iinfo(kind).max, kind)


def to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An fp32's nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), nearest >> np.uint32(16)).astype(np.uint16)


def to_float32(x: np.ndarray[Any, Any], dtype: tl.dtype) -> np.ndarray[Any, Any]:
    if dtype == tl.bfloat16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def _truncate(source: TensorHandle, to: tl.dtype) -> TensorHandle:
    """In place of the interpreter's conversion to a narrower float."""
    if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
    with np.errstate(over="ignore"):  # to infinity, as on a GPU
        return interpreter_builder.cast_impl(source, to)


def _binary(left: TensorHandle, right: TensorHandle, operation: Any) -> TensorHandle:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise NotImplementedError(
            f"{operation.__name__} of bfloat16: Triton's interpreter would take the raw bits; convert to "
            "float32 first (numerics.widen)"
        )
    return InterpreterBuilder.binary_op(interpreter_builder, left, right, operation)


def _of_language() -> None:
    """Its globals tell the interpreter which modules to replace: `tl` and `core`."""
    _ = tl, core


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """Inside, `triton.language` works on numpy arrays, and `@triton.jit` functions can be called. A value's
    layout, which Gluon asks its type for, is nobody's business here.

    The interpreter looks through all of `triton.language` again on every call; once is enough.
    """
    scope = interpreter._patch_lang(_of_language)
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang", lambda fn: None),
            mock.patch.object(interpreter_builder, "create_fp_trunc", _truncate),
            mock.patch.object(interpreter_builder, "binary_op", _binary),
            mock.patch.object(tl.block_type, "layout", gl.AutoLayout(), create=True),
        ):
            yield
    finally:
        scope.restore()
