"""Launching a kernel through Triton, and once more without all that Triton does before a launch.

`kernel[grid](...)` finds out at each launch which compiled kernel these arguments mean: 15 to 20 µs, for they
are nested tuples. Whoever knows that a launch differs from an earlier one in the tensors' addresses alone may
repeat it: `Again` holds the compiled kernel and calls its launcher, as Triton itself does at the end.

This is the one file that knows Triton's insides, those of 3.6 to 3.9. What it cannot repeat in this way, a
backend or a version that it does not know, it leaves to `kernel[grid]`: the same kernel, only later.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.backends.nvidia.driver
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from ..parts.numerics import INTERPRETED
from .call import on_device_of

ALIGNMENT = 16  # of an address that Triton compiles an aligned kernel for, and the copy engine takes


class Launched(NamedTuple):
    """One launch: positional arguments first, as the kernel was given them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    arguments: dict[str, Any]
    compiled: Any  # what Triton ran; None where it interpreted the kernel


class Listener(Protocol):
    """Who is told of launches."""

    obstacle: str | None

    def launched(self, launch: Launched) -> None: ...

    def unheard(self) -> contextlib.AbstractContextManager[None]: ...


class _Of(threading.local):
    listener: Listener | None = None


_thread = _Of()


@contextlib.contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Tell `listener` of this thread's launches in the block."""
    _thread.listener, before = listener, _thread.listener
    try:
        yield
    finally:
        _thread.listener = before


def is_told() -> bool:
    """Whether this thread's launches are listened to."""
    return _thread.listener is not None


def launch(kernel: Any, grid: tuple[int, ...], near: torch.Tensor, *args: Any, **arguments: Any) -> None:
    """Run a kernel on the device of `near`. Every launch of a call goes through here, so that none is missed
    by whoever writes them down."""
    listener = _thread.listener
    if listener is None:
        with on_device_of(near):
            kernel[grid](*args, **arguments)
        return
    with listener.unheard(), on_device_of(near):
        compiled = kernel[grid](*args, **arguments)
    listener.launched(Launched(kernel, grid, args, arguments, compiled))


def cannot_repeat(why: str) -> None:
    """Tell whoever writes this step down that it does more than launches say."""
    if _thread.listener is not None:
        _thread.listener.obstacle = why


def by_position(launched: Launched) -> tuple[Any, ...]:
    """All arguments in the order of the kernel's parameters."""
    parameters = inspect.signature(launched.kernel.fn).parameters
    given = dict(zip(parameters, launched.args, strict=False)) | launched.arguments
    return tuple([given.get(name, each.default) for name, each in parameters.items()])


def surroundings() -> tuple[Any, ...]:
    """What Triton looks at in a launch beside the arguments: while it stays the same, so does the kernel. The
    device must be that of the tensors."""
    runtime, now = knobs.runtime, driver.active
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains: a profiler's functions
    return (
        now, now.get_current_device(), runtime.debug, knobs.compilation.instrumentation_mode,
        runtime.add_stages_inspection_hook, getattr(before, "calls", before) or None,
        getattr(after, "calls", after) or None,
    )  # fmt: skip


class Again:
    """A launch that can be repeated with other addresses, under the same `surroundings`:

        call(x, y, z, stream, *between, *arguments)         is_packed: arguments are one tuple

    with the arguments by position, and for each tensor its address; a descriptor stands there as its map,
    sizes and strides, which `Described` gives. describe: what makes that of a descriptor, one for each.
    """

    def __init__(self, launched: Launched) -> None:
        self.kernel, self.compiled = (
            launched.kernel,
            launched.compiled,
        )  # kept: its module is unloaded with it
        now = [(where, name, where.get(name)) for (name, _), (_, where) in globals_of(self.kernel)]
        self.globals = [(*each, getattr(each[2], "value", None)) for each in now]
        self.grid = (*launched.grid, 1, 1)[:3]
        self.describe = [partial(Described, each) for each in encodings(self.compiled)]
        self.call, self.between, self.is_packed = way(self.compiled)

    def is_current(self) -> bool:
        """Whether Triton would still launch this very kernel: nobody wants to be called before it, and the
        global variables that it was compiled with are what they were."""
        if self.kernel.pre_run_hooks:
            return False
        for where, name, thing, value in self.globals:
            if where.get(name) is not thing or getattr(thing, "value", None) is not value:
                return False
        return True


def globals_of(kernel: Any) -> Any:
    """Those that a kernel was compiled with, and what holds them now; Triton has just compared the two."""
    return kernel.used_global_vals.items()


def encodings(compiled: Any) -> list[Any]:
    """How each descriptor of a kernel is encoded."""
    return getattr(compiled.metadata, "tensordesc_meta", None) or []


def again(launched: Launched) -> Again | None:
    """None where `kernel[grid]` must be asked: nothing was compiled, hooks are wanted, or a kernel has
    descriptors and its launcher is not one that this file knows."""
    compiled = launched.compiled
    if INTERPRETED or not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return None
    if any(surroundings()[2:]) or launched.kernel.pre_run_hooks:
        return None
    if encodings(compiled) and beneath(compiled.run) is None:
        return None
    return Again(launched)


def beneath(launcher: Any) -> Any:
    """The C function that a launcher of Triton's calls, once descriptors are encoded; None for a launcher
    that does more than that, or that is not known."""
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if not all([hasattr(launcher, name) for name in names]) or getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if inspect.isfunction(launcher.launch):  # it encodes descriptors, and calls what it was made around
        return inspect.getclosurevars(launcher.launch).nonlocals.get("launcher")
    return launcher.launch


def way(compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...], bool]:
    """`Again.call`, `between` and `is_packed`: the shortest way to a launch that is known."""
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    inner, none = beneath(launcher), None
    if inner is None:  # as `JITFunction.run` does
        return launcher, (function, metadata, none, none, none), False
    modes = launcher.launch_cooperative_grid, launcher.launch_pdl
    if hasattr(launcher, "arg_annotations"):  # newer than 3.6: one function for all kernels
        signature = launcher.arg_annotations, launcher.kernel_signature
        return inner, (function, *modes, metadata, none, none, none, none, none, *signature), True
    return inner, (function, *modes, none, none, metadata, none, none, none), False


class Described:
    """A descriptor as the arguments [map, *sizes, *strides], by the tensor's address. All else in it is part
    of the launch that is repeated: so an address that another tensor has by now gives what is right for it
    too. No tensor is kept."""

    MOST = 256

    def __init__(self, encoding: Any, descriptor: Any) -> None:
        self._like, self._encoding = copy.copy(descriptor), encoding
        self._like.base = None
        self._encode = triton.backends.nvidia.driver.make_tensordesc_arg
        self._rest = (None,) * (len(inspect.signature(self._encode).parameters) - 2)
        self._known: dict[int, list[Any]] = {}

    def __call__(self, address: int) -> list[Any]:
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= self.MOST:
                self._known.clear()
            descriptor = copy.copy(self._like)
            descriptor.base = _Base(address)
            found = self._known[address] = self._encode(descriptor, self._encoding, *self._rest)
        return found


class _Base(NamedTuple):
    """As much of a tensor as encoding a descriptor asks for."""

    address: int

    def data_ptr(self) -> int:
        return self.address
