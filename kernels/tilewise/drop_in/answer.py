"""A call of PyTorch's scaled_dot_product_attention: who answers, the answer, and its entry in the report."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._dynamo.comptime import comptime
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nested._internal.nested_tensor import NestedTensor

from ..api import answer as run
from ..plan.checks import check, violations
from ..plan.implementation import implementation
from ..plan.request import Request, make_request, without_drawing
from ..pytorch.nested import Jagged, is_nested, unpack
from ..scaled_dot_product import Call, as_attention
from .entry import ANSWERED_BY, PYTORCH
from .modules import calling_module, traced_module
from .rebound import MULTI_HEAD, needs_weights, none_has, rebound
from .report import note

Tensor = torch.Tensor

PYTORCHS = F.scaled_dot_product_attention
# What a tensor may be; a subclass may mean something else by attention.
KNOWN = (Tensor, torch.nn.Parameter, NestedTensor, FakeTensor, FunctionalTensor)


class Given(NamedTuple):
    """The arguments of a call, and what the answer gets of them."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call of PyTorch's function with these arguments, which PyTorch has found to be some
    that it takes."""
    given = Given(*args, **kwargs)
    plan = plan_of(given)
    who = PYTORCH if plan.request is None else ANSWERED_BY[implementation(plan.request)]
    note_any(given, who, plan.reasons)
    if plan.request is None:
        return PYTORCHS(*args, **kwargs)
    return plan.like_query(run(plan.request, False)[0])


def attend(*args: Any, **kwargs: Any) -> Any:
    return answer(args, kwargs)


attending = rebound(MULTI_HEAD, scaled_dot_product_attention=attend, has_torch_function=none_has)


def multi_head(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call of PyTorch's multi_head_attention_forward with these arguments."""
    given = Given(*args[:3]) if len(args) >= 3 else None
    strange = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and type(x) not in KNOWN]
    if given is not None and (strange or needs_weights(args, kwargs)):
        why = (
            f"an argument is a {name_of(strange[0])}, which may have an attention of its own"
            if strange
            else "need_weights=True: a fused kernel never has the weights; give need_weights=False"
        )
        note_any(given, PYTORCH, (why,))
    # The copy asks no other mode, as torch.set_default_device has one: each would hide what is in it.
    return (MULTI_HEAD if strange else attending)(*args, **kwargs)


def name_of(x: Tensor) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


# ---- Who answers


class Plan(NamedTuple):
    request: Request | None  # None: PyTorch answers
    like_query: Any  # gives the result of `attention` the form of PyTorch's
    reasons: tuple[str, ...]


def plan_of(given: Given) -> Plan:
    """Who answers the call, and why, if it is PyTorch; nothing of it has run, and no seed is drawn, then."""
    reason = not_asked(given)
    if reason is not None:
        return Plan(None, None, (reason,))
    request = None
    try:
        call, arguments = as_call(given)
        request = make_request(call.q, call.k, call.v, **without_drawing(call.q, arguments))
        check(request)
        if request.dropout is not None:
            request = make_request(call.q, call.k, call.v, **arguments)
    except (ValueError, NotImplementedError) as error:
        return Plan(None, None, reasons_of(request, error))
    return Plan(request, call.like_q if isinstance(call, Jagged) else call.like_query, ())


def not_asked(given: Given) -> str | None:
    """Why tilewise does not even look at the call."""
    for name, x in zip(given._fields[:4], given[:4], strict=True):
        if type(x) not in KNOWN and not (name == "attn_mask" and x is None):
            return f"{name} is a {name_of(x)}, which may have an attention of its own"
    if only_math_is_allowed():
        return "torch.nn.attention.sdpa_kernel leaves PyTorch's math backend alone"
    return None


@torch.compiler.assume_constant_result
def only_math_is_allowed() -> bool:
    """In a graph: whether it was when the graph was made, as for PyTorch's own choice among its backends."""
    backends = torch.backends.cuda
    fused = (backends.flash_sdp_enabled, backends.mem_efficient_sdp_enabled, backends.cudnn_sdp_enabled)
    return backends.math_sdp_enabled() and not any([is_enabled() for is_enabled in fused])


def as_call(given: Given) -> tuple[Call | Jagged, dict[str, Any]]:
    """The call as one of `attention`: q, k and v, how to give back the result, and the other arguments."""
    call = as_attention(*given)
    if not is_nested(call.q, call.k, call.v):
        return call, call.arguments
    jagged = unpack(call.q, call.k, call.v)
    if call.q.shape[1] != call.k.shape[1] and not given.enable_gqa:
        raise ValueError(f"{call.q.shape[1]} heads over {call.k.shape[1]} are grouped by enable_gqa=True")
    return jagged, {**call.arguments, "packing": jagged.packing}


def reasons_of(request: Request | None, error: Exception) -> tuple[str, ...]:
    """All reasons against a request, of which one was raised."""
    if request is None or torch.compiler.is_dynamo_compiling():
        return (str(error),)
    return tuple([str(violation) for violation in violations(request)]) or (str(error),)


# ---- The entry in the report


def note_any(given: Given, who: str, reasons: tuple[str, ...]) -> None:
    if torch.compiler.is_dynamo_compiling():
        note_while_tracing(*given, who, reasons)
    else:
        note_call(given, who, reasons, calling_module(), torch.compiler.is_compiling())


def note_call(given: Given, who: str, reasons: tuple[str, ...], module: str | None, compiled: bool) -> None:
    q, k, v = given[:3]
    if all([isinstance(x, Tensor) for x in (q, k, v)]):  # else PyTorch raises
        words = dict(mask=mask_in_words(given), options=options_in_words(given))
        note(q, k, v, answered_by=who, reasons=reasons, compiled=compiled, module=module, **words)


def note_while_tracing(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    who: str,
    reasons: tuple[str, ...],
) -> None:
    comptime(note_traced)


def note_traced(context: Any) -> None:
    """Runs while Dynamo traces `note_while_tracing`: notes the call that its arguments make, of which Dynamo
    knows shapes and dtypes. Where lengths are open, so are the words of a reason: it is looked for again."""
    given = Given(*[as_traced(context.get_local(name)) for name in Given._fields])
    reasons = context.get_local("reasons")
    known = reasons.is_python_constant()
    why = reasons.as_python_constant() if known else plan_of(given).reasons
    note_call(given, context.get_local("who").as_python_constant(), why, traced_module(context), True)


def as_traced(variable: Any) -> Any:
    """A constant, or a stand-in with the shape and the dtype of a tensor."""
    return variable.as_python_constant() if variable.is_python_constant() else variable.as_fake()


def mask_in_words(given: Given) -> str:
    if given.attn_mask is None:
        return "causal" if given.is_causal else "no mask"
    sizes = ", ".join([str(n) if type(n) is int else "*" for n in given.attn_mask.shape])
    kind = "bool" if given.attn_mask.dtype == torch.bool else f"added {given.attn_mask.dtype}"
    return f"{kind.replace('torch.', '')} ({sizes})"


def options_in_words(given: Given) -> str:
    defaults = Given._field_defaults
    names = ("dropout_p", "scale", "enable_gqa")
    return ", ".join([f"{n}={getattr(given, n)}" for n in names if getattr(given, n) != defaults[n]])
