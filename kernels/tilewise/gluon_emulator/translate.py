"""How does the source of a kernel run in Python? Its functions, with other globals.

A Gluon function is a plain Python function that Triton would compile. Here Python runs its code, copied into
a function whose globals are translated when they are first needed:

    a Gluon function              the same, translated
    a function of Gluon itself    its stand-in (language.py), or NotImplementedError, naming it
    a constexpr                   its value
    a constexpr function          the plain function; Triton runs it in Python, too
    what a kernel adds to it      its stand-in by the same name
    an aggregate                  a plain class with the same `__init__` and methods
    a module                      the module, its attributes translated
    anything else                 itself; a `@triton.jit` function is one that Triton's interpreter runs

Nothing of the kernel's modules is changed.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from .roles import EMULATED

GLUON = "triton.experimental.gluon"


def unwrap(value: Any) -> Any:
    """The value of a constexpr; constexprs in tuples and lists as well."""
    if isinstance(value, tl.constexpr):
        return unwrap(value.value)
    if type(value) in (tuple, list):
        return type(value)(map(unwrap, value))
    return value


class Module:
    """A module, its attributes translated."""

    def __init__(self, module: types.ModuleType, translate: Translator) -> None:
        self._module = module
        self._translate = translate

    def __getattr__(self, name: str) -> Any:
        value = self._translate(getattr(self._module, name))
        setattr(self, name, value)
        return value


class Translator:
    """Translates values, each once, so that a function stays the same function."""

    def __init__(
        self, stand_ins: dict[int, Any], own: dict[str, Any], loop: Callable[..., Iterator[Any]]
    ) -> None:
        """stand_ins: by the id of what they stand for; own: by the name of what a kernel has added to Gluon.
        loop: in place of `range`."""
        self._known = dict(stand_ins)
        self._own = own
        self._loop = loop
        self._globals: dict[int, dict[str, Any]] = {}
        self._kept: list[Any] = []  # ids are of objects that live

    def __call__(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self, value))
        if id(value) not in self._known:
            self._kept.append(value)
            self._known[id(value)] = self._translate(value)
        return self._known[id(value)]

    def _translate(self, value: Any) -> Any:
        if isinstance(value, tl.constexpr):
            return self(unwrap(value))
        if isinstance(value, types.ModuleType):
            return Module(value, self)
        if getattr(value, "__triton_aggregate__", False) and isinstance(value, type):
            return self._aggregate(value)
        if isinstance(value, ConstexprFunction):
            return lambda *args, **kwargs: unwrap(value(*args, **kwargs))
        if isinstance(value, GluonJITFunction):
            return _missing(value) if value.fn.__module__.startswith(GLUON) else self._function(value.fn)
        if isinstance(value, JITFunction):
            raise RuntimeError(
                f"{value.fn.__module__}.{value.fn.__name__} was made without TRITON_INTERPRET=1: "
                "set it before the module is imported"
            )
        if tl.core.is_builtin(value):
            if value.__module__.startswith(GLUON):
                return _missing(value)
            return self._own.get(value.__name__, value)
        return value

    def _function(self, fn: types.FunctionType) -> types.FunctionType:
        space = self._globals.setdefault(
            id(fn.__globals__),
            {"__builtins__": builtins, "__name__": fn.__module__, EMULATED: True, "range": self._loop},
        )
        cells = tuple(types.CellType(self(cell.cell_contents)) for cell in fn.__closure__ or ())
        translated = types.FunctionType(fn.__code__, space, fn.__name__, self(fn.__defaults__), cells)
        if fn.__kwdefaults__:
            translated.__kwdefaults__ = {name: self(value) for name, value in fn.__kwdefaults__.items()}
        self._known[id(fn)] = translated
        for name in _names(fn.__code__):
            if name in fn.__globals__:
                space[name] = self(fn.__globals__[name])
        return translated

    def _aggregate(self, aggregate: Any) -> type:
        initial, *methods = aggregate.hash_attrs
        plain = type(aggregate.__name__, (), {"__doc__": aggregate.__doc__})
        self._known[id(aggregate)] = plain  # methods make new values of it
        fields = tuple(getattr(aggregate, "__aggregate_fields__", ()))
        is_written_by_triton = getattr(initial, "__triton_builtin__", False)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if is_written_by_triton:
                values = {
                    **aggregate.__aggregate_defaults__,
                    **dict(zip(fields, args, strict=False)),
                    **kwargs,
                }
                vars(self).update({name: values[name] for name in fields})
            else:
                initial(self, *args, **kwargs)
            vars(self).update({name: unwrap(value) for name, value in vars(self).items()})

        plain.__init__ = __init__  # type: ignore[misc]
        for method in methods:
            setattr(plain, method.__name__, self(method))
        return plain


def _names(code: types.CodeType) -> set[str]:
    """What the code, and functions inside it, may look up in its globals."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _missing(function: Any) -> Callable[..., Any]:
    inner = getattr(function, "fn", function)
    name = f"{inner.__module__}.{inner.__name__}"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the emulator does not know {name}")

    return refuse
