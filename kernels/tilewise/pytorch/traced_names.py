"""Names of functions and classes in code that Dynamo traces. Importing this imports Dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.comptime import comptime
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.variables import UserDefinedObjectVariable
from torch._dynamo.variables.functions import TritonKernelVariable
from triton.runtime.jit import KernelInterface

from . import names

# Else a compiled graph would run before the name is registered.
registered_name = torch.compiler.assume_constant_result(names.registered_name)


def traced_name(value: Any) -> str:
    """`registered_name` of a jit function in code that Dynamo traces; "" for anything else.

    To Dynamo a jit function is a variable of a kind that it can neither ask for its type nor hand to a
    function that it calls (before torch 2.13; on a machine without a GPU the kind is another). So `note`,
    which runs while it traces, looks behind the variable.
    """
    comptime(note)
    return noted_name()


_noted = [""]  # one place will do: Dynamo traces under a lock


def note(context: Any) -> None:
    """Note the name of what `value` is in the code being traced, and tie the graph to that very function."""
    variable = context.get_local("value")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    value: Any = None
    if isinstance(variable, TritonKernelVariable):
        value = variable.kernel
    elif isinstance(variable, UserDefinedObjectVariable):
        value = variable.value
    _noted[0] = ""
    if isinstance(value, KernelInterface):
        install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
        _noted[0] = registered_name(value)


@torch.compiler.assume_constant_result
def noted_name() -> str:
    return _noted[0]
