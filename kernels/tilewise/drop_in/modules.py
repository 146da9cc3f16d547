"""Which module of a model makes a call? Read from the frames that are running, so a model needs no hooks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

CALL = nn.Module._call_impl.__code__  # what every call of a module runs; `self` is the module
Names = dict[int, tuple["weakref.ref[nn.Module]", str]]


def calling_module() -> str | None:
    """The module that is being called, as "Model: layers.0.attention"; None outside of modules."""
    return path(running_modules())


def traced_module(context: Any) -> str | None:
    """The same while Dynamo traces, from what torch._dynamo.comptime hands over: first the modules whose
    calls are running, then those whose calls are being traced."""
    traced = []
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    while tracer is not None:
        module = getattr(tracer.symbolic_locals.get("self"), "value", None)
        if isinstance(module, nn.Module):
            traced.append(module)
        tracer = getattr(tracer, "parent", None)
    return path([*running_modules(), *traced[::-1]])


def running_modules() -> list[nn.Module]:
    """The modules whose calls are running in this thread, from the outermost."""
    modules = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return modules[::-1]


def path(modules: Sequence[nn.Module]) -> str | None:
    """The name of the last of these modules in the first that holds it; each was called by the one before."""
    own = [module for module in modules if not isinstance(module, OptimizedModule)]
    for outer in own:
        name = name_in(outer, own[-1])
        if name is not None:
            return f"{type(outer).__name__}: {name}" if name else type(outer).__name__
    return None


_names: weakref.WeakKeyDictionary[nn.Module, Names] = weakref.WeakKeyDictionary()


def name_in(outer: nn.Module, inner: nn.Module) -> str | None:
    """The name of a module in another one, "" for itself; None if it is not there. Names are kept, and read
    anew where a module is not among them: models change."""
    found = _names.get(outer, {}).get(id(inner))
    if found is None or found[0]() is not inner:
        _names[outer] = {id(module): (weakref.ref(module), name) for name, module in outer.named_modules()}
        found = _names[outer].get(id(inner))
    return None if found is None else found[1]
