"""A user's model and its inputs, from `FILE.py:FUNCTION`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

WANTED = "it must return (model, inputs), inputs a dict, a tuple or one tensor, as the model is called with"


class MakerError(ValueError):
    """The caller must change something; the message says what."""


class Made(NamedTuple):
    """A model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: str) -> Made:
        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, torch.Tensor) else x

        args, kwargs = tree_map(moved, (self.args, self.kwargs))
        return Made(self.model.to(device), args, kwargs)

    def run(self) -> None:
        self.model(*self.args, **self.kwargs)


def make(where: str) -> Made:
    """What the function at `where` makes: FILE.py:FUNCTION, or MODULE:FUNCTION. Its own errors are raised as
    they are; MakerError for all that is not what it should be."""
    file, colon, name = where.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise MakerError(f"{where}: give FILE.py:FUNCTION, for example model.py:make_model")
    module = load(file)
    maker = getattr(module, name, None)
    if not callable(maker):
        functions = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise MakerError(f"{file} has no function {name}; it has {', '.join(functions) or 'none'}")
    return as_made(maker, name)


def load(file: str) -> ModuleType:
    """The module of a file, which may import what lies beside it, or of that name."""
    if not file.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(file)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{file}.".startswith(f"{missing.name}."):
                raise
            raise MakerError(f"there is no module {file}: give FILE.py:FUNCTION or MODULE:FUNCTION") from None
    path = Path(file)
    if not path.is_file():
        raise MakerError(f"there is no file {file}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def as_made(maker: Callable[[], Any], name: str) -> Made:
    """The model that a function makes. One of Transformers may come alone: it has inputs of its own."""
    found = maker()
    if isinstance(found, nn.Module):
        inputs = getattr(found, "dummy_inputs", None)
        if not isinstance(inputs, dict):
            raise MakerError(f"{name}() returned a {type(found).__name__} alone: {WANTED}")
        found = (found, inputs)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module)):
        parts = found if isinstance(found, tuple) else (found,)
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise MakerError(f"{name}() returned {kinds}: {WANTED}")
    model, inputs = found
    if isinstance(inputs, dict):
        return Made(model, (), inputs)
    return Made(model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})
