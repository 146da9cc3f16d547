"""Triton's interpreter without what it does in vain: the kernels' tests take a third of the time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, a call of a device function does not replace again what the launch has replaced; no sum of
    integers is computed once more in 64 bits, for an assertion that only `debug=True` makes; and what follows
    from a dtype or a shape alone is looked up, where the interpreter builds it for every value."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    replace, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    builder = interpreter.interpreter_builder
    numpy_dtypes: dict[str, Any] = {}

    def replace_once(fn: Any) -> Any:
        languages = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        return replace(fn) if any(tl.core.is_builtin(language.load) for language in languages) else None

    def known_numpy_dtype(type: Any) -> Any:
        if type.scalar.is_ptr():
            return numpy_dtype(type)
        if type.scalar.name not in numpy_dtypes:
            numpy_dtypes[type.scalar.name] = numpy_dtype(type)
        return numpy_dtypes[type.scalar.name]

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[tl.constexpr, Any]:
        return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(size) for size in shape])

    def set_fields(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes(tuple(type.shape) if type.is_block() else ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", known_numpy_dtype)
        patch.setattr(tl.tensor, "__init__", set_fields)
        yield
