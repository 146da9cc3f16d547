"""The steps of an eager call as those that come again: a forward, and a backward of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from ..plan.look import around, look, of_tensor
from ..plan.passes import run_backward, run_forward
from ..plan.repeated import Repeated, repeated, where
from ..plan.request import Request
from ..plan.tape import Results
from .encoding import Encoded, decode

Tensor = torch.Tensor
TENSORS = (Tensor, torch.nn.Parameter)


def is_observed() -> bool:
    """Whether a dispatch mode or a function transform looks at what a call does; a compiler does, too."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def known_step(request: Request, return_lse: bool) -> Repeated | None:
    """The step that answers a request, for the next like it; None where it is not worth a tape."""
    if not where.holds(request.q):
        return None
    seen = request.look or look(request, return_lse)
    return None if seen is None else worthwhile(seen[0])


def known_backward(forward: Repeated, needs: tuple[bool, ...], tensors: Sequence[Tensor]) -> Repeated | None:
    """The same of a backward. Hooks may have put other tensors in the place of those that were saved."""
    if is_observed() or not all([type(x) in TENSORS for x in tensors]):
        return None
    return worthwhile((forward, needs, *[of_tensor(x) for x in tensors], *around()))


def repeat(step: Callable[..., Results], tensors: Sequence[Tensor | None], *words: Hashable) -> Results:
    """The results of `step(*words, *tensors)`, a function of a module, in eager mode repeated where it can
    be. Nothing but the words and what the tensors look like decides what it does."""
    given = [x for x in tensors if x is not None]
    if not where.holds(given[0]) or is_observed() or not all([type(x) in TENSORS for x in given]):
        return step(*words, *tensors)
    missing = tuple([x is None for x in tensors])
    again = worthwhile((step, words, missing, *[of_tensor(x) for x in given], *around()))
    if again is None:
        return step(*words, *tensors)
    if again.replay is not None and (results := again.replay(*given)) is not None:
        return results

    def run(*given: Tensor) -> Results:
        each = iter(given)
        return step(*words, *[None if is_missing else next(each) for is_missing in missing])

    found: Results = again(given, run)
    return found


def worthwhile(key: object) -> Repeated | None:
    step = repeated(key)
    return None if step.is_in_vain else step


def forward_step(encoded: Encoded, return_lse: bool, *tensors: Tensor, for_backward: bool = False) -> Results:
    """out, lse and, for the backward, statistics."""
    q, k, v, *others = tensors
    request = decode(q, k, v, encoded._replace(tensors=others))
    return run_forward(request, return_lse, for_backward)[: 3 if for_backward else 2]


def backward_step(encoded: Encoded, needs: tuple[bool, ...], *tensors: Tensor) -> Results:
    """The gradients that are needed, from what was saved and the one or two gradients that arrived."""
    count = len(needs)
    q, k, v, *others = tensors[:count]
    out, statistics, do, *dlse = tensors[count:]
    request = decode(q, k, v, encoded._replace(tensors=others))
    return tuple(run_backward(request, out, statistics, do, dlse[0] if dlse else None, list(needs)))
