"""How does a mask or score read? As the call that makes it: `Window(3, 0)`, `Padding(tensor[2])`."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import torch

UNKNOWN = object()


def described(part: Any) -> str:
    """The call of its class that makes `part`; what has a default and is at it is left out. An attribute has
    the name of the argument that it comes from, with or without an underscore before it."""
    shown: list[str] = []
    seen: list[Any] = []
    for parameter in signature(type(part)).parameters.values():
        value = part.given(parameter.name)
        is_optional = parameter.default is not Parameter.empty
        is_named = is_optional or parameter.kind is Parameter.KEYWORD_ONLY
        if is_optional and (value is UNKNOWN or is_same(value, parameter.default) or any_is(value, seen)):
            continue
        shown.append(f"{parameter.name}={worded(value)}" if is_named else worded(value))
        if isinstance(value, torch.Tensor):  # one that stands for another argument too is shown once
            seen.append(value)
    return f"{type(part).__name__}({', '.join(shown)})"


def given(part: Any, name: str) -> Any:
    """What `part` keeps of its argument of this name."""
    kept = vars(part)
    return kept.get(name, kept.get(f"_{name}", UNKNOWN))


def worded(value: Any) -> str:
    """A value as it is written, a tensor by its shape, a function by its name."""
    if value is UNKNOWN:
        return "..."
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(worded, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {worded(each)}' for key, each in value.items())}}}"
    return str(getattr(value, "__name__", None) or repr(value))


def shortened(value: Any) -> str:
    """A value as an error quotes it: a tensor by its shape, and nothing that fills the screen."""
    text = worded(value) if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not callable(value) and value == default)


def any_is(value: Any, seen: list[Any]) -> bool:
    return any(value is each for each in seen)
