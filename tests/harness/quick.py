"""Triton's interpreter without what it does in vain: the kernels' tests take a fifth of the time or so.

What it computes is left alone. What follows from dtypes and shapes alone is looked up, where the interpreter
works it out for every value, with a list, a tuple of Triton's and a text made afresh each time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Two values of one of these are of that type whatever is done with them, also when one divides the other.
KEPT = frozenset(("fp32", "fp64", *tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES))
BYTES = {  # of an element in the interpreter, at most; an address has 8
    name: max(1, tl.dtype(name).primitive_bitwidth // 8)
    for name in (*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES)
}


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, a call of a device function does not replace again what the launch has replaced; no sum of
    integers is computed once more in 64 bits, for an assertion that only `debug=True` makes; and what follows
    from a dtype or a shape alone is looked up, where the interpreter builds it for every value."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    builder, semantic = interpreter.interpreter_builder, QuickSemantic(interpreter.interpreter_builder)
    replace, numpy_dtype, same_dtype = interpreter._patch_lang, interpreter._get_np_dtype, tl.dtype.__eq__
    make_block, block_to_ir = tl.block_type.__init__, tl.block_type.to_ir
    numpy_dtypes: dict[str, Any] = {}
    modules: dict[Any, list[Any]] = {}

    def replace_once(fn: Any) -> Any:
        if fn not in modules:
            modules[fn] = [each for each in fn.__globals__.values() if each is tl or each is tl.core]
        return replace(fn) if any(tl.core.is_builtin(language.load) for language in modules[fn]) else None

    def replace_attribute(where: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # which only checks that there is a semantic

        def interpreted(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(where, name, interpreted)

    def known_numpy_dtype(type: Any) -> Any:
        if type.scalar.is_ptr():
            return numpy_dtype(type)
        if type.scalar.name not in numpy_dtypes:
            numpy_dtypes[type.scalar.name] = numpy_dtype(type)
        return numpy_dtypes[type.scalar.name]

    def is_same_dtype(self: Any, other: Any) -> Any:
        return self is other or same_dtype(self, other)

    def set_block(self: Any, element: Any, shape: Any) -> None:
        known = BlockShape.BY_TUPLE.get(id(shape)) or BlockShape.of(shape)
        if known is None:  # it may not be one: the words for that are Triton's
            make_block(self, element, shape)
            known = BlockShape(self.shape, self.numel)
        self.element_ty, self.shape, self.numel = element, known.shape, known.numel
        self.name = known.name(element)

    def block_of_interpreter(self: Any, to: Any) -> Any:
        return self if to is builder and not self.element_ty.is_ptr() else block_to_ir(self, to)

    def set_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if data.itemsize > BYTES.get(dtype.name, 8):
            self.__post_init__()  # which says so

    def set_fields(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        known = BlockShape.BY_TUPLE[id(type.shape)] if type.is_block() else SCALAR
        self.numel, self.shape = known.sizes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter, "_patch_attr", replace_attribute)
        patch.setattr(interpreter, "interpreter_semantic", semantic)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", known_numpy_dtype)
        patch.setattr(tl.dtype, "__eq__", is_same_dtype)
        patch.setattr(tl.block_type, "__init__", set_block)
        patch.setattr(tl.block_type, "to_ir", block_of_interpreter)
        patch.setattr(tl.tensor, "__init__", set_fields)
        patch.setattr(interpreter.TensorHandle, "__init__", set_handle)
        yield


class BlockShape:
    """A shape that blocks of values have, in the forms in which Triton keeps it. Each form is there once, so
    that blocks of one shape share the same object."""

    BY_SIZES: ClassVar[dict[tuple[int, ...], BlockShape]] = {}
    BY_TUPLE: ClassVar[dict[int, BlockShape]] = {}  # by the identity of a tuple of Triton's, kept here

    def __init__(self, shape: Any, numel: int) -> None:
        self.shape, self.numel = shape, numel  # of a type
        self.sizes = tl.constexpr(numel), tl.core.tuple([tl.constexpr(size) for size in shape])  # of a value
        self.plain = tuple(shape)
        self.names: dict[str, str] = {}
        if self.plain:
            self.BY_SIZES[self.plain] = self.BY_TUPLE[id(shape)] = self.BY_TUPLE[id(self.sizes[1])] = self

    @classmethod
    def of(cls, shape: Any) -> BlockShape | None:
        """The one that is known of these sizes."""
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        return cls.BY_SIZES.get(sizes) if all(type(size) is int for size in sizes) else None

    def name(self, element: Any) -> str:
        """Of the type of a block of such elements."""
        if element.name not in self.names:
            self.names[element.name] = f"<{self.shape}, {element}>"
        return self.names[element.name]


SCALAR = BlockShape(tl.core.tuple([]), 1)


class QuickSemantic(TritonSemantic):  # type: ignore[type-arg]
    """The rules by which operands become alike, without the way to an answer that is known beforehand."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder)
        self.common: dict[tuple[int, int], BlockShape] = {}
        self.constants: dict[tuple[Any, ...], Any] = {}  # operands, which no operation changes
        self.computation_type_impl = functools.cache(super().computation_type_impl)

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if type(lhs) is type(rhs) is tl.tensor and lhs.dtype is rhs.dtype and lhs.dtype.name in KEPT:
            return self.broadcast_impl_value(lhs, rhs)
        at = 0 if type(lhs) is tl.tensor else 1
        value, number = (lhs, rhs)[at], (rhs, lhs)[at]
        # 0.0 and -0.0 are the same key, but not the same number.
        if type(value) is not tl.tensor or type(number) not in (int, float) or number == 0.0:
            return super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)
        key = (at, value.dtype.name, id(value.shape), type(number), number, args, *kwargs.items())
        if key in self.constants:
            return (value, self.constants[key]) if at == 0 else (self.constants[key], value)
        alike = super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)
        if alike[at] is value and len(self.constants) < 2000:
            self.constants[key] = alike[1 - at]
        return alike

    def cast(self, input: Any, dst_ty: Any, *args: Any, **kwargs: Any) -> Any:
        return input if input.dtype is dst_ty else super().cast(input, dst_ty, *args, **kwargs)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if not (left.is_block() and right.is_block()):
            alike = left.is_block() == right.is_block()
            return (lhs, rhs) if alike else super().broadcast_impl_value(lhs, rhs)
        if left.shape is right.shape:
            return lhs, rhs
        pair = id(left.shape), id(right.shape)
        if pair not in self.common:
            lhs, rhs = super().broadcast_impl_value(lhs, rhs)
            if len(left.shape) == len(right.shape):
                self.common[pair] = BlockShape.BY_TUPLE[id(lhs.type.shape)]
            return lhs, rhs
        shape = self.common[pair]
        return self.broadcast(lhs, shape), self.broadcast(rhs, shape)

    def broadcast(self, value: Any, shape: BlockShape) -> Any:
        if value.type.shape is shape.shape:
            return value
        handle = self.builder.create_broadcast(value.handle, shape.plain)
        return tl.tensor(handle, tl.block_type(value.dtype, shape.shape))
