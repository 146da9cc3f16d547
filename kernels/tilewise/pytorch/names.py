"""Names of functions and classes, which op schemas do not know. Two functions of one name (in a notebook, a
cell run twice) get two names."""

from __future__ import annotations

import importlib
import operator
from typing import Any

_registry: dict[str, Any] = {}


def registered_name(thing: Any) -> str:
    """A name that `_registry` has for this class or function, and for no other."""
    origin = getattr(thing, "fn", thing)  # a jit function wraps the Python function that it was
    name = f"{origin.__module__}:{origin.__qualname__}"
    while _registry.setdefault(name, thing) is not thing:
        name += "'"
    return name


def registered(name: str) -> Any:
    """What the name stands for; in a process that has only loaded a program, what its module holds."""
    if name not in _registry:
        module, _, path = name.partition(":")
        _registry[name] = operator.attrgetter(path)(importlib.import_module(module))
    return _registry[name]
