"""What is the derivative of attention, and of its derivatives? Four functions, by each other:

                                        reverse mode, what arrives    forward mode, along
    forward(x)        → out, lse        w: backward(x; w)             ẋ: tangent(x; ẋ)
    backward(x; w)    → gradients       u: second(x; w, u) in x,      (ẋ, ẇ): second(x; w, ẋ)
                                           tangent(x; u) in w                 + backward(x; ẇ)
    tangent(x; u)     → their tangents  w: second(x; w, u) in x,      not there
                                           backward(x; w) in u
    second(x; w, u)   → gradients       not there                     not there

x: q, k, v and what scores are made of. w: the gradients of out and lse. u: tangents of x. second(x; w, u) is
the gradient in x of <w, tangent(x; u)>, and, for the order of two derivatives does not matter, the tangent of
backward(x; w) along u. So gradients of gradients, tangents of gradients and gradients of tangents are one
thing, and one set of kernels serves them. docs/derivatives.md has the equations.

Each function is a `torch.autograd.Function` over a library op (ops.py), with rules for function transforms;
those of vmap are in mapped.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import mapped
from .ops import library

Tensor = torch.Tensor
Words = tuple[Any, ...]  # of a request: encoding.py

THIRD_ORDER = (
    "tilewise.attention has derivatives of the second order, and this is one of the third: a second "
    "derivative was differentiated again. Give impl='torch' for the plain PyTorch path, which has all, or "
    "drop create_graph=True"
)
TWICE_FORWARD = (
    "tilewise.attention has no forward-mode derivative of a forward-mode derivative: take one of the two in "
    "reverse mode (torch.func.hessian does), or give impl='torch' for the plain PyTorch path, which has both"
)


def below_autograd(name: str, *given: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.tilewise, f"attention_{name}")(*given)


class Forward(torch.autograd.Function):
    """out, lse and statistics, which have no derivative, of q, k, v, words and the other tensors."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, words: Words, *tensors: Tensor) -> Any:
        return below_autograd("forward", q, k, v, list(tensors), *words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, ctx.words, *tensors = inputs
        out, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(q, k, v, out, statistics, *tensors)
        ctx.save_for_forward(q, k, v, out, statistics, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
        if do is None and dlse is None:  # a second derivative, which takes out and is not derived by it
            return (None,) * len(ctx.needs_input_grad)
        dq, dk, dv, *others = gradients(ctx.words, needs, do, dlse, *ctx.saved_tensors)
        return dq, dk, dv, None, *others

    @staticmethod
    def jvp(ctx: Any, q: Any, k: Any, v: Any, _: None, *tensors: Any) -> tuple[Any, ...]:
        out, lse = Tangent.apply(ctx.words, *ctx.saved_tensors, q, k, v, *tensors)
        return out, lse, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, words: Words, *tensors: Any
    ) -> Any:
        return mapped.forward(Forward, info.batch_size, dims, q, k, v, words, *tensors)


def gradients(
    words: Words, needs: Sequence[bool], do: Tensor | None, dlse: Tensor | None, *saved: Tensor
) -> list[Tensor | None]:
    """Those that are needed of q, k, v and the other tensors, and None for the others. saved: q, k, v, out,
    statistics, other tensors."""
    do = torch.zeros_like(saved[3]) if do is None else do
    if torch.compiler.is_compiling():
        op = torch.ops.tilewise.attention_backward
        found = iter(op(do, dlse, *saved[:5], list(saved[5:]), *words, list(needs)))
    else:
        found = iter(Backward.apply((*words, list(needs)), do, dlse, *saved))
    return [next(found) if needed else None for needed in needs]


class Backward(torch.autograd.Function):
    """The gradients of those inputs that the last word, `needs`, names. out and statistics follow from the
    others: nothing is derived by them."""

    @staticmethod
    def forward(words: Words, do: Tensor, dlse: Tensor | None, *saved: Tensor) -> Any:
        return tuple(below_autograd("backward", do, dlse, *saved[:5], list(saved[5:]), *words))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.words, ctx.needs = inputs[0][:-1], inputs[0][-1]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        do, dlse, *saved = ctx.saved_tensors
        arrived = iter(cotangents)
        u = [next(arrived) if needed else None for needed in ctx.needs]
        if all([x is None for x in u]):
            return (None,) * (3 + len(saved))
        out, lse = Tangent.apply(ctx.words, *saved, *u)
        _, needs_do, needs_dlse, *needs = ctx.needs_input_grad
        dq, dk, dv, *others = seconds(ctx.words, without_results(needs), do, dlse, lse, *saved, u=u)
        d_out, d_lse = out if needs_do else None, lse if needs_dlse else None
        return None, d_out, d_lse, dq, dk, dv, None, None, *others

    @staticmethod
    def jvp(ctx: Any, _: None, do_dot: Any, dlse_dot: Any, q: Any, k: Any, v: Any, *moves: Any) -> Any:
        do, dlse, *saved = ctx.saved_tensors
        u = [q, k, v, *moves[2:]]
        found: list[Any] = [None] * sum(ctx.needs)
        if any([x is not None for x in u]):
            _, lse = Tangent.apply(ctx.words, *saved, *u)
            found = [x for x in seconds(ctx.words, ctx.needs, do, dlse, lse, *saved, u=u) if x is not None]
        if do_dot is not None or dlse_dot is not None:
            more = [x for x in gradients(ctx.words, ctx.needs, do_dot, dlse_dot, *saved) if x is not None]
            found = [b if a is None else a + b for a, b in zip(found, more, strict=True)]
        return tuple(found)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], words: Words, *given: Any) -> Any:
        return mapped.backward(Backward, info.batch_size, dims, words, *given)


def without_results(needs: Sequence[bool]) -> list[bool]:
    """Of those of q, k, v, out, statistics and the other tensors, those of a request's tensors."""
    return [*needs[:3], *needs[5:]]


class Tangent(torch.autograd.Function):
    """The tangents of out and lse. saved: q, k, v, out, statistics and the other tensors; then the tangents
    of all but out and statistics, None for what does not move."""

    @staticmethod
    def forward(words: Words, *given: Any) -> Any:
        saved, u = apart(given)
        q, k, v, _, statistics, *tensors = saved
        return below_autograd("tangent", q, k, v, statistics, tensors, *words, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.words = inputs[0]
        ctx.save_for_backward(*inputs[1:], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        *given, lse = ctx.saved_tensors
        saved, u = apart(given)
        needs, needs_u = apart(ctx.needs_input_grad[1:])
        if do is None and dlse is None:
            return (None,) * (1 + len(given))
        do = torch.zeros_like(saved[3]) if do is None else do
        of_x = seconds(ctx.words, without_results(needs), do, dlse, lse, *saved, u=u)
        of_u = gradients(ctx.words, needs_u, do, dlse, *saved)
        return None, *of_x[:3], None, None, *of_x[3:], *of_u

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(TWICE_FORWARD)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], words: Words, *given: Any) -> Any:
        return mapped.tangent(Tangent, info.batch_size, dims, words, *given)


def apart(given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What was saved, and the tangents, of which there are two fewer."""
    count = (len(given) + 2) // 2
    return list(given[:count]), list(given[count:])


def seconds(
    words: Words, needs: Sequence[bool], do: Tensor, dlse: Tensor | None, lse_tangent: Tensor, *saved: Tensor,
    u: Sequence[Any],
) -> list[Tensor | None]:  # fmt: skip
    """As `gradients`: those in x of <do, Ȯ> + <dlse, lsė>, where x moves along u, and lse by lse_tangent."""
    if not any(needs):
        return [None] * len(needs)
    found = iter(Second.apply((*words, list(needs)), do, dlse, lse_tangent, *saved, *u))
    return [next(found) if needed else None for needed in needs]


class Second(torch.autograd.Function):
    """What `seconds` gives of those that are needed."""

    @staticmethod
    def forward(words: Words, do: Tensor, dlse: Tensor | None, lse_tangent: Tensor, *given: Any) -> Any:
        saved, u = apart(given)
        q, k, v, _, statistics, *tensors = saved
        words, needs = words[:-1], words[-1]
        return tuple(
            below_autograd("second", do, dlse, q, k, v, statistics, tensors, *words, u, lse_tangent, needs)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(THIRD_ORDER)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], words: Words, *given: Any) -> Any:
        return mapped.second(Second, info.batch_size, dims, words, *given)


# ---- The ops' own autograd, for who calls them by name, as compiled graphs do; function transforms do not
# see it


COMPILED = (
    "torch.func transforms of tilewise.attention inside torch.compile are not there: transform without "
    "torch.compile, or give impl='torch'"
)


def forward_autograd(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], *words: Any) -> Any:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(COMPILED)
    return Forward.apply(q, k, v, words, *tensors)


def backward_autograd(*given: Any) -> list[Tensor]:
    """Arguments as in the schema; the eighth is the list of tensors."""
    return list(Backward.apply(given[8:], *given[:7], *given[7]))


library.impl("attention_forward", forward_autograd, "Autograd")
library.impl("attention_backward", backward_autograd, "Autograd")
