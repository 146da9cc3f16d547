"""What a compiler does not look into. Imported only where one compiles: the import of Dynamo is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="tilewise launches kernels that are not in its graphs")
def uncompiled(function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """function(*args, **arguments), outside of the graph that is being made."""
    return function(*args, **arguments)
