"""The switch `tilewise.sdpa`: while it is on, tilewise answers PyTorch's scaled_dot_product_attention.

A torch function mode sees every call of PyTorch's functions in its thread, by whatever name they were
imported. It belongs to the thread, as `torch.no_grad` does; Dynamo traces through it, and a graph is valid
only for the modes that it was made under.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from . import report as reports
from .answer import PYTORCHS, answer, multi_head
from .rebound import BACKWARD, GRAD, METHOD, MULTI_HEAD, REPEATING


class Region(TorchFunctionMode):
    """The region of a `with tilewise.sdpa():`. It has no state, and enters and exits as every mode does, by
    which Dynamo knows how to go on within it after a graph break."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is PYTORCHS or func is MULTI_HEAD:
            attend = attention if torch.compiler.is_dynamo_compiling() else attention_at_once
            return attend(func, args, kwargs)
        if func is METHOD or func is BACKWARD or func is GRAD:
            plain = all([kind is torch.Tensor or kind is torch.nn.Parameter for kind in types])
            if plain and not torch.compiler.is_dynamo_compiling():
                with self:  # a checkpoint repeats its forward in it
                    return REPEATING[func](*args, **kwargs)
        return func(*args, **kwargs)


# Between graphs, after a break, Dynamo looks at every frame of Python. This one, of all of PyTorch's
# functions, is no frame for a graph of its own; inside a graph it is traced all the same.
skip_code(Region.__torch_function__.__code__)


def attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not is_lowest():
        return func(*args, **kwargs)
    return answer(args, kwargs) if func is PYTORCHS else multi_head(args, kwargs)


attention_at_once = torch._dynamo.disable(attention)


def is_lowest() -> bool:
    """Whether no region around this one will be asked: inside a mode's function it is off, as all above it
    are. The lowest answers, so that a call is answered, and counted, once."""
    return not any([isinstance(mode, Region) for mode in _get_current_function_mode_stack()])


class Enabled(Region):
    """What `enable` leaves on until `disable`."""


class Switch:
    """`torch.nn.functional.scaled_dot_product_attention`, answered by tilewise wherever it supports the call
    and by PyTorch otherwise, in code that nobody rewrites.

        with tilewise.sdpa():
            model(x)

    nn.MultiheadAttention and nn.TransformerEncoderLayer are included. A region is of the thread that enters
    it, as torch.no_grad is; torch.compile sees it, around a compiled function and inside one.
    """

    def __call__(self) -> Region:
        """A region in which tilewise answers, for a `with` statement; regions may be nested."""
        return Region()

    def enable(self) -> None:
        """Switch on for this thread, until `disable`."""
        stack = _get_current_function_mode_stack()
        if not any([isinstance(mode, Enabled) for mode in stack]):
            # Below what is left by popping the top, so that this is not popped in its place.
            height = 1 if stack and is_default_device(stack[0]) else 0
            restack([*stack[:height], Enabled(), *stack[height:]])

    def disable(self) -> None:
        """Undo `enable`; nothing happens if it is not enabled. A `with` region around stays on."""
        restack([mode for mode in _get_current_function_mode_stack() if not isinstance(mode, Enabled)])

    def report(self) -> reports.Report:
        """How many calls went where, and why, in all threads since the start or `clear`; print it."""
        return reports.report()

    def clear(self) -> None:
        """Forget the calls that were counted."""
        reports.clear()

    def __repr__(self) -> str:
        return "tilewise.sdpa"


def is_default_device(mode: TorchFunctionMode) -> bool:
    """Whether this is the mode of torch.set_default_device, which has to be the lowest."""
    return mode is getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def restack(modes: list[TorchFunctionMode]) -> None:
    """Make these the modes of this thread, from the bottom up."""
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


sdpa = Switch()
