"""PyTorch's own functions of Python that lead to attention, so that the attention in them is seen.

A torch function mode is asked about the outermost call alone and is off inside it. So a function of PyTorch's
that is written in Python hides what it calls: multi_head_attention_forward, of nn.MultiheadAttention, the
attention in it; backward and grad the forward that a checkpoint repeats. A mode runs copies of these, in
which a name means something else. PyTorch's own stay as they are, for all other threads.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

MULTI_HEAD = F.multi_head_attention_forward
METHOD, BACKWARD, GRAD = torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad


def rebound(function: Any, **names: Any) -> Any:
    """A copy of a function whose global names are those of the original, except for these."""
    # Without a __name__, Dynamo looks for names in the copy's own scope, not in the original's module.
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"} | names
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def none_has(*_: Any) -> bool:
    """In place of has_torch_function: the modes have been asked already."""
    return False


# For plain tensors, and to be called with the mode on again.
REPEATING = {
    METHOD: rebound(METHOD, has_torch_function_unary=none_has),
    BACKWARD: rebound(BACKWARD, has_torch_function=none_has),
    GRAD: rebound(GRAD, has_torch_function=none_has),
}


def needs_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of MULTI_HEAD asks for the weights: then it computes them, and calls no attention."""
    return bool(args[NEED_WEIGHTS] if len(args) > NEED_WEIGHTS else kwargs.get("need_weights", True))


NEED_WEIGHTS = MULTI_HEAD.__code__.co_varnames.index("need_weights")
