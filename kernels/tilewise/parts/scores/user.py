"""UserScore: a function of the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from ..shape import ANY, Shape, tensors_within
from .score import AXES, MEANINGS, STATE, BoundScore, Parameter, Score, Seconds, Twin


class UserScore(Score):
    """A modifier from the caller's own module-level `@triton.jit` functions.

    score(s, batch, head, q_idx, kv_idx, args) -> s, on tiles as described at the head of score.py.
    args: a tuple of tensors, ints and floats, handed on to every function, for none can close over values.
    twin(s, batch, head, q_idx, kv_idx, *args) -> s, optional: the same rule in plain PyTorch, needed for CPU
        tensors outside the interpreter.
    derivative(s, batch, head, q_idx, kv_idx, args) -> ∂score/∂s at the input s, needed for gradients.
    parameters: for the tensors among args that are trained, {position: (axes, derivative)}. axes names what
        each of the tensor's dimensions follows, in this order: "b" batch, "h" query head, "q" query, "k" key
        (so "h" for [q_heads]; "" for a tensor without dimensions); derivative is ∂score/∂element.
    second_derivatives: needed to derive twice and for gradients of tangents. {(a, b): function} with "s" or a
        position in `parameters` for a and b: functions of the same arguments as derivative, ∂²score/∂a∂b. A
        pair that is not named is 0, so {} says that all are.
    """

    FIELDS = ("score", "args", "derivative", "_parameters", "_seconds")

    def __init__(
        self,
        score: Any,
        args: tuple[Any, ...] = (),
        *,
        twin: Twin | None = None,
        derivative: Any = None,
        parameters: Mapping[int, tuple[str, Any]] | None = None,
        second_derivatives: Mapping[tuple[Any, Any], Any] | None = None,
    ) -> None:
        self.score, self.args, self._twin, self.derivative = score, tuple(args), twin, derivative
        self._parameters = tuple((i, axes, function) for i, (axes, function) in (parameters or {}).items())
        for position, axes, _ in self._parameters:
            if not (0 <= position < len(self.args) and isinstance(self.args[position], torch.Tensor)):
                raise ValueError(
                    f"parameters has the key {position}, which must be the position of a tensor in args"
                )
            if list(axes) != [axis for axis in AXES if axis in axes]:
                raise ValueError(
                    f"parameters[{position}]: axes {axes!r} must be letters of {AXES!r} in this order"
                )
        self._seconds = None
        if second_derivatives is not None:
            self._seconds = tuple((*pair_of(key, parameters), f) for key, f in second_derivatives.items())

    def given(self, name: str) -> Any:
        if name == "parameters":
            return {i: (axes, function) for i, axes, function in self._parameters} or None
        if name == "second_derivatives":
            return None if self._seconds is None else {(a, b): function for a, b, function in self._seconds}
        return super().given(name)

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_within("args", self.args)

    def misfits(self, shape: Shape) -> list[str]:
        found = []
        for i, axes, _ in self._parameters:
            wanted = tuple(shape.fitted[AXES.index(axis)] for axis in axes)
            given = self.args[i].shape
            sizes = zip(given, wanted, strict=False)
            if len(given) != len(wanted) or any(full not in (size, ANY) for size, full in sizes):
                found.append(f"args[{i}].shape={tuple(given)} must be {wanted}, by its axes {axes!r}")
        return found

    def looks(self) -> Any:
        positions = tuple([(i, axes) for i, axes, _ in self._parameters])
        derivatives = self.derivative is None, self._seconds is None
        return type(self), self._twin is None, *derivatives, len(self.args), positions

    def bind(self, shape: Shape) -> BoundScore:
        return BoundScore(self.score, self.args, self.derivative)

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        found = {}
        for i, axes, function in self._parameters:
            sizes = dict(zip(AXES, shape.scores, strict=True))
            if shape.packing is not None:  # along positions inside a sequence, its own
                sizes |= dict(zip(axes, self.args[i].shape, strict=True))
            found[f"args[{i}]"] = Parameter(function, tuple(sizes[a] if a in axes else 1 for a in AXES))
        return found

    def no_gradient(self) -> str | None:
        if self.derivative is not None:
            return None
        return (
            f"UserScore({self.score.__name__}) has no derivative: give UserScore(..., derivative=f) with a "
            "@triton.jit function f(s, batch, head, q_idx, kv_idx, args) -> ∂score/∂s"
        )

    def seconds(self) -> Seconds:
        return {(named(a), named(b)): function for a, b, function in self._seconds or ()}

    def no_seconds(self) -> str | None:
        if self._seconds is not None:
            return None
        return (
            f"UserScore({self.score.__name__}) has no second derivatives: give UserScore(..., "
            'second_derivatives={("s", "s"): f}) with a @triton.jit function f(s, batch, head, q_idx, '
            "kv_idx, args) -> ∂²score/∂s²; {} says that all are 0"
        )

    def twin(self, shape: Shape) -> Twin:
        if self._twin is None:
            raise ValueError(
                f"UserScore({self.score.__name__}) has no twin, which plain PyTorch needs: give "
                "UserScore(..., twin=f) with f(s, batch, head, q_idx, kv_idx, *args) -> s"
            )
        twin = self._twin
        return lambda s, batch, head, q_idx, kv_idx: twin(s, batch, head, q_idx, kv_idx, *self.args)


def named(a: str | int) -> str:
    """What `parameters` and `seconds` call a position among the args."""
    return a if isinstance(a, str) else f"args[{a}]"


def pair_of(key: Any, parameters: Mapping[int, Any] | None) -> tuple[Any, Any]:
    """A key of second_derivatives; raises ValueError for what is none."""
    known = (STATE, *(parameters or {}))
    if not (isinstance(key, tuple) and len(key) == 2 and all(a in known for a in key)):
        names = ", ".join(map(repr, known))
        raise ValueError(f"second_derivatives has the key {key!r}, which must be a pair of these: {names}")
    return key


MEANINGS.append((triton.runtime.KernelInterface, UserScore))
