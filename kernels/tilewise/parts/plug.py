"""What a mask and a score have in common: an object on the host, with device functions and a twin in plain
PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .described import described, given
from .shape import FAR, Shape


class Plug:
    """Something that plugs into the kernels: what it reads, whether it fits a call, how it is written."""

    # The attributes that make up the object, by which `encoding` takes it apart and builds it again.
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def leaves(self) -> tuple[Plug, ...]:
        """Itself; or where it is made of others, those that are made of no others, in order."""
        return (self,)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that the device functions read, by argument name."""
        return {}

    def called(self, name: str = "") -> str:
        """What errors call it, or one of its `tensors`: by the argument that a caller wrote."""
        return f"{type(self).__name__}.{name}" if name else type(self).__name__

    def misfits(self, shape: Shape) -> list[str]:
        """Why it cannot serve a call of this shape; empty if it can."""
        return []

    def extents(self, shape: Shape) -> tuple[int, int]:
        """How many queries and keys of a packed sequence its tensors have elements for."""
        return FAR, FAR

    def looks(self) -> Any:
        """What rules look at besides the shapes, dtypes and devices of `tensors`; hashable."""
        return type(self)

    def given(self, name: str) -> Any:
        """What was given for an argument of the constructor, as `repr` shows it."""
        return given(self, name)

    def __repr__(self) -> str:
        return described(self)
