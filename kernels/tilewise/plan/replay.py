"""A function from a tape: it makes the same tensors and launches the same kernels, and does nothing else.

Its text is written for the one configuration, as `create_function_from_signature` of Triton's writes its own:

    def replay(x0, x1, x2):                          # q, k and v
        p0 = x0.data_ptr()
        ...
        if (p0 | p1 | p2) & 15: return None          # a kernel of its own would be compiled for these
        if now() != then or not a0.is_current(): return None
        stream = current_stream(device)
        x3 = empty_strided(c0, c1, dtype=c2, device=c3)
        p3 = x3.data_ptr()
        c4(64, 1, 1, stream, function, ..., (((p0, p1, p2), c5, ...), ...))
        return (x3, None)

None says that the long way must be gone. Constants are what the recorded launch was given, and hold no
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from ..kernels.launch import ALIGNMENT, Launched, again, by_position, launch, surroundings
from .tape import Asked, Empty, Results, Seen, Tape, Value

Tensor = torch.Tensor
Replay = Callable[..., Results | None]
# What a launch may be given besides tensors and tuples: none of it can hold a tensor.
PLAIN = (
    int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    triton.language.constexpr, KernelInterface,
)  # fmt: skip


class CannotRepeatError(Exception):
    """Why a step cannot be repeated."""


class Program:
    """The text of a replay, and the constants that it names."""

    def __init__(self, tape: Tape, results: Results) -> None:
        self.tape = tape
        self.constants: dict[str, Any] = dict(
            empty_strided=torch.empty_strided, now=surroundings, launch=launch
        )
        self.lines: list[str] = []
        self.describing: Iterator[Any] = iter(())  # for the descriptors of a launch, in their order
        launches = [step for step in tape.steps if isinstance(step, Launched)]
        self.repeats = {id(launch): again(launch) for launch in launches}
        self.is_direct = bool(launches) and None not in self.repeats.values()
        self.results = [None if x is None else self.known(x) for x in results]
        self.used = self.use()
        # A view of all of a new tensor that nobody uses in another form is made at once.
        self.stands_for: dict[Value, Value] = {}
        for step in tape.steps:
            if isinstance(step, Empty):
                forms = [value for value in self.used if value.root is step.value]
                if len(forms) == 1 and is_whole(forms[0]):
                    self.stands_for[step.value] = forms[0]
        self.tensors = {each for value in self.used for each in self.with_bases(value)}

    def known(self, tensor: Tensor) -> Value:
        value = self.tape.value(tensor)
        if value is None:
            raise CannotRepeatError(self.tape.obstacle)
        return value

    def constant(self, thing: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = thing
        return name

    # ---- What is needed of what was made

    def use(self) -> set[Value]:
        """The values that are used as tensors; `addresses`: the roots of those of which launches are told."""
        used = {value for value in self.results if value is not None}
        self.addresses: set[Value] = set()
        for step in self.tape.steps:
            if isinstance(step, Launched):
                found = [self.known(x) for x in tensors_in((step.args, step.arguments))]
                if self.is_direct:
                    self.addresses.update([value.root for value in found])
                else:
                    used.update(found)
            elif isinstance(step, Asked):
                used.update([self.known(x) for x in tensors_in((step.args, step.arguments))])
        return used

    def with_bases(self, value: Value) -> list[Value]:
        """The value and what it is a view of."""
        if value.base is None or self.stands_for.get(value.root) is value:
            return [value]
        return [value, *self.with_bases(value.base)]

    # ---- Text

    def text(self, thing: Any, is_address: bool) -> str:
        """An expression for an argument; of a descriptor, for several."""
        if is_descriptor(thing) and is_address:
            describe = next(self.describing, None)
            if describe is None:
                raise CannotRepeatError("nothing is known of how a descriptor is encoded")
            return f"*{self.constant(describe(thing))}({self.address(self.known(thing.base))})"
        if isinstance(thing, Tensor):
            return self.address(self.known(thing)) if is_address else f"x{self.known(thing).number}"
        if type(thing) in (tuple, list) and any(True for _ in tensors_in(thing)):
            inner = "".join([f"{self.text(each, is_address)}, " for each in thing])
            return f"({inner})" if type(thing) is tuple else f"[{inner}]"
        for each in flat(thing):
            if not isinstance(each, PLAIN):
                raise CannotRepeatError(f"nothing is known of a {type(each).__name__}")
        return repr(thing) if type(thing) in (int, type(None)) else self.constant(thing)

    def given(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> str:
        """Arguments, tensors among them."""
        named = [f"{name}={self.text(each, False)}" for name, each in arguments.items()]
        return ", ".join([*[self.text(each, False) for each in args], *named])

    def address(self, value: Value) -> str:
        if value.tensor.numel() == 0:
            return "0"
        distance = value.distance
        return f"p{value.root.number}" + (f" + {distance}" if distance else "")

    def replay(self) -> Replay:
        inputs = self.tape.inputs
        pointed = [value for value in inputs if value in self.addresses]
        self.lines += [f"p{value.number} = x{value.number}.data_ptr()" for value in pointed]
        if any(value.tensor.data_ptr() % ALIGNMENT for value in pointed):
            raise CannotRepeatError("an input is not aligned")
        checks = ["now() != then"] if self.is_direct else []
        if pointed:
            checks.append(f"({' | '.join([f'p{value.number}' for value in pointed])}) & {ALIGNMENT - 1}")
        repeats = {id(each.kernel): each for each in self.repeats.values() if each is not None}
        if self.is_direct:
            checks += [f"not {self.constant(each.is_current)}()" for each in repeats.values()]
        if checks:
            self.lines.append(f"if {' or '.join(checks)}: return None")
        if self.is_direct:
            self.constants["then"] = surroundings()
            device = driver.active.get_current_device()
            if any(value.tensor.is_cuda and value.tensor.device.index != device for value in inputs):
                raise CannotRepeatError("another device is current")
            self.lines.append(f"stream = {self.constant(driver.active.get_current_stream)}({device})")
        for step in self.tape.steps:
            self.add(step)
        found = "".join([f"x{value.number}, " if value is not None else "None, " for value in self.results])
        self.lines.append(f"return ({found})")
        given = ", ".join([f"x{value.number}" for value in inputs])
        source = f"def replay({given}):\n" + "".join([f"    {line}\n" for line in self.lines])
        space = dict(self.constants)
        exec(compile(source, "<replay>", "exec"), space)
        replay: Replay = space["replay"]
        return replay

    def add(self, step: Any) -> None:
        if isinstance(step, Empty):
            self.add_empty(step.value)
        elif isinstance(step, Seen):
            value = step.value
            if value in self.tensors and self.stands_for.get(value.root) is not value:
                assert value.base is not None
                x, base = value.tensor, f"x{value.base.number}"
                sizes = f"{tuple(x.shape)}, {x.stride()}, {base}.storage_offset() + {value.offset}"
                self.lines.append(f"x{value.number} = {base}.as_strided({sizes})")
        elif isinstance(step, Asked):
            self.add_asked(step)
        elif self.is_direct:
            self.add_repeat(step)
        else:
            near = f"x{self.tape.inputs[0].number}"
            given = self.given(step.args, step.arguments)
            self.lines.append(f"launch({self.constant(step.kernel)}, {step.grid}, {near}, {given})")

    def add_empty(self, root: Value) -> None:
        value = self.stands_for.get(root, root)
        if value not in self.tensors and root not in self.addresses:
            return
        x = value.tensor
        of = f"dtype={self.constant(x.dtype)}, device={self.constant(x.device)}"
        self.lines.append(f"x{value.number} = empty_strided({tuple(x.shape)}, {x.stride()}, {of})")
        self.point(root, f"x{value.number}")

    def add_asked(self, step: Asked) -> None:
        given = self.given(step.args, step.arguments)
        name = f"x{step.result.number}"
        self.lines.append(f"{name} = {self.constant(step.operator)}({given})")
        self.point(step.result, name)

    def point(self, root: Value, name: str) -> None:
        """The address of what was just made, where one is needed."""
        if root in self.addresses:
            if root.tensor.data_ptr() % ALIGNMENT:
                raise CannotRepeatError("a tensor is not aligned")
            self.lines.append(f"p{root.number} = {name}.data_ptr()")
            self.lines.append(f"if p{root.number} & {ALIGNMENT - 1}: return None")

    def add_repeat(self, step: Launched) -> None:
        repeat = self.repeats[id(step)]
        assert repeat is not None
        self.describing = iter(repeat.describe)
        x, y, z = repeat.grid
        between = "".join([f"{None if each is None else self.constant(each)}, " for each in repeat.between])
        arguments = "".join([f"{self.text(each, True)}, " for each in by_position(step)])
        arguments = f"({arguments})" if repeat.is_packed else arguments
        self.lines.append(f"{self.constant(repeat.call)}({x}, {y}, {z}, stream, {between}{arguments})")


def is_whole(value: Value) -> bool:
    """Whether a view is one of all of its root, from its start."""
    return value.distance == 0 and value.tensor.numel() == value.root.tensor.numel()


def is_descriptor(thing: Any) -> bool:
    return hasattr(thing, "block_shape") and hasattr(thing, "base")


def flat(thing: Any) -> list[Any]:
    """What a nest of tuples, lists and dictionaries holds; of a descriptor, its tensor."""
    if isinstance(thing, (tuple, list)):
        return [each for inner in thing for each in flat(inner)]
    if isinstance(thing, dict):
        return [each for inner in thing.values() for each in flat(inner)]
    return [thing.base] if is_descriptor(thing) else [thing]


def tensors_in(thing: Any) -> list[Tensor]:
    return [each for each in flat(thing) if isinstance(each, Tensor)]


def program(tape: Tape, results: Results) -> Replay | None:
    """What repeats the recorded step; None where that cannot be done."""
    try:
        if tape.obstacle is not None:
            return None
        replay = Program(tape, results).replay()
    except CannotRepeatError:
        return None
    return replay if tape.obstacle is None else None
