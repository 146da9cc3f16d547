"""What a compiler does not look into: messages between ranks, and what hosts say to one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="tilewise.distributed sends messages between ranks while it computes")
def uncompiled(function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """function(*args, **arguments), outside of the graph that is being made. This module is imported only
    where one is: the import of Dynamo is slow."""
    return function(*args, **arguments)
