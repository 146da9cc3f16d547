"""What a step did, written down: the tensors that it made, PyTorch's operators, and launches.

The host's work in a call follows from shapes, strides, dtypes and numbers alone, never from what tensors
hold. So of two calls that agree in these the second does what the first did, at other addresses. `record`
runs a step on new views of its inputs and notes what PyTorch is asked for meanwhile; replay.py makes a
function of it. What cannot be repeated is an `obstacle`: reading a tensor, or one that came from elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import Launched, told

Tensor = torch.Tensor
Results = tuple[Tensor | None, ...]

aten = torch.ops.aten
EMPTY = frozenset({
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
})  # fmt: skip


@dataclass(eq=False)
class Value:
    """A tensor of the step. base: of a view, what it is one of; offset: from there, in elements; root: the
    tensor at the end of all bases."""

    number: int
    tensor: Tensor
    base: Value | None = None
    offset: int = 0

    @property
    def root(self) -> Value:
        return self if self.base is None else self.base.root

    @property
    def distance(self) -> int:
        """Bytes from the root's address."""
        return self.tensor.data_ptr() - self.root.tensor.data_ptr()


@dataclass(eq=False)
class Empty:
    """A tensor was made, of whatever the memory held."""

    value: Value


@dataclass(eq=False)
class Seen:
    """A tensor was looked at as a view."""

    value: Value


@dataclass(eq=False)
class Asked:
    """An operator of PyTorch's ran."""

    operator: Any
    args: tuple[Any, ...]
    arguments: dict[str, Any]
    result: Value


Step = Empty | Seen | Asked | Launched


class Tape(TorchDispatchMode):
    """Notes the steps of the block that it is entered for."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.obstacle: str | None = None
        self._values: dict[int, Value] = {}  # by identity; a Value keeps its tensor, so that none is reused
        self._is_heard = True
        self.inputs = [self._new(x) for x in inputs]

    def _new(self, tensor: Tensor, base: Value | None = None) -> Value:
        offset = 0 if base is None else tensor.storage_offset() - base.tensor.storage_offset()
        value = Value(len(self._values), tensor, base, int(offset))
        self._values[id(tensor)] = value
        return value

    def value(self, tensor: Tensor) -> Value | None:
        """The value that this tensor is; None, and an obstacle, for one that came from elsewhere."""
        found = self._values.get(id(tensor))
        if found is None:
            self.obstacle = f"a tensor {tuple(tensor.shape)} is not one of the call's"
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_heard:
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        made = list(result) if isinstance(result, (list, tuple)) else [result]
        if not all(isinstance(x, Tensor) for x in made):
            self.obstacle = f"{func} reads a tensor"
        elif func in EMPTY:
            self.steps.append(Empty(self._new(result)))
        elif is_view(func) and (base := self.value(args[0])) is not None:
            for x in made:
                if id(x) not in self._values:
                    self.steps.append(Seen(self._new(x, base)))
        elif len(made) == 1:
            value = self._values.get(id(result)) or self._new(result)
            self.steps.append(Asked(func, args, kwargs, value))
        else:
            self.obstacle = f"{func} makes several tensors"

    def launched(self, launch: Launched) -> None:
        self.steps.append(launch)

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        """Not to listen: Triton's interpreter computes with PyTorch."""
        self._is_heard = False
        try:
            yield
        finally:
            self._is_heard = True


def is_view(func: Any) -> bool:
    """Whether an operator returns its first argument, looked at otherwise, in the same dtype."""
    returns = func._schema.returns
    aliases = [each.alias_info for each in returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases) and func not in CASTS


CASTS = frozenset({aten.view.dtype, aten.view_as_real.default, aten.view_as_complex.default})


def record(step: Callable[..., Results], inputs: Sequence[Tensor]) -> tuple[Results, Tape]:
    """The results of a step, and what it did. Its inputs are seen as tensors of their own, so that one given
    twice is not taken for one: another call with the same shapes may give two."""
    with torch.no_grad():
        own = [x.detach() for x in inputs]
        tape = Tape(own)
        with tape, told(tape):
            return step(*own), tape
