"""Is a second derivative right, and a tangent of forward mode? Held against float64, before they are timed.

Like gradients (answers.py): on some rows of the case itself what depends on one row of q alone, the tangents
of out and of dq; on a shortened copy of the case every element. Cases with scores, a sink, dropout or packed
sequences are not looked at: no group has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

import tilewise_reference
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import shortened
from tilewise_reference.cases import Case
from tilewise_reference.yardstick import largest_difference, math_attention

from .answers import Place, at, gradient_of_out, judge_forward, places, problem_at, request_of, whole
from .implementations.base import Implementation, Prepared
from .judgement import Judgement, Problem, judge

Tensor = torch.Tensor
Moves = tuple[Tensor, Tensor, Tensor]


def directions(inputs: Inputs, seed: int) -> Moves:
    """Along which q, k and v move: random, the same for the same seed."""
    generator = torch.Generator(inputs.q.device).manual_seed(seed + 2)
    q, k, v = (torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in inputs[:3])
    return q, k, v


def with_tangents(inputs: Inputs, seed: int) -> Inputs:
    """The inputs as dual tensors, within a level of forward mode."""
    moves = directions(inputs, seed)
    q, k, v = (forward_ad.make_dual(x, move) for x, move in zip(inputs[:3], moves, strict=True))
    return inputs._replace(q=q, k=k, v=v)


# ---- Judgements


def judge_tangent(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, seed: int = 0
) -> Judgement:
    """Hold out and its tangent against float64; the judgement that is closest to its limit."""
    q, k, v = (forward_ad.unpack_dual(x).primal for x in inputs[:3])
    bare = inputs._replace(q=q, k=k, v=v)
    moves = directions(bare, seed)
    out, tangent = forward_ad.unpack_dual(prepared.out())
    if tangent is None or not bool(torch.isfinite(tangent).all()):
        return Judgement(float("inf"), 0.0, 0.0, "the tangent of out is not there, or not finite")
    judgements = [judge_forward(implementation, case, bare, Prepared(lambda: out))]
    found = places(case, bare.q.device)
    pieces = [moved_at(case, bare, moves, place) for place in found]
    wanted = [(exact_tangent(*piece), own_tangent(*piece)) for piece in pieces]
    judgements.append(_judge("the tangent of out", [at(case, tangent, place) for place in found], wanted))
    asked = shortened(case)
    small = case_inputs(asked, bare.q.device, seed)
    moves = directions(small, seed)
    own = implementation.prepare(asked, with_tangents(small, seed), "forward mode")
    tangent = forward_ad.unpack_dual(own.out()).tangent
    problem = whole(request_of(small), None)
    wanted = [(exact_tangent(problem, moves), own_tangent(problem, moves))]
    judgements.append(_judge("the tangent of out", [tangent], wanted))
    return max(judgements, key=lambda judgement: judgement.excess)


def judge_double_backward(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, seed: int = 0
) -> Judgement:
    """Hold out and the derivatives of dq, dk and dv against float64; the judgement closest to its limit."""
    judgements = [judge_forward(implementation, case, inputs, prepared, "double backward")]
    do, moves = gradient_of_out(case, inputs, seed), directions(inputs, seed)
    second = prepared.gradients(prepared.double_backward(do, moves)())
    if not all(bool(torch.isfinite(x).all()) for x in second.values()):
        return Judgement(float("inf"), 0.0, 0.0, "a second derivative is not finite")
    found = places(case, inputs.q.device)
    wanted = []
    for place in found:
        piece, here = moved_at(case, inputs, moves, place), at(case, do, place)[None, None]
        wanted.append((exact_second(*piece, here)[0], own_second(*piece, here)[0]))
    judgements.append(_judge("the derivative of dq", [at(case, second["q"], p) for p in found], wanted))
    asked = shortened(case)
    small = case_inputs(asked, inputs.q.device, seed, gradients=True)
    do, moves = gradient_of_out(asked, small, seed), directions(small, seed)
    own = implementation.prepare(asked, small, "double backward")
    second = own.gradients(own.double_backward(do, moves)())
    problem = whole(request_of(small), None)
    exact, rounded = exact_second(problem, moves, do), own_second(problem, moves, do)
    for name, want, torchs in zip("qkv", exact, rounded, strict=True):
        judgements.append(_judge(f"the derivative of d{name}", [second[name]], [(want, torchs)]))
    return max(judgements, key=lambda judgement: judgement.excess)


def _judge(name: str, got: list[Tensor], wanted: list[tuple[Tensor, Tensor]]) -> Judgement:
    """got: in pieces. wanted: of each in float64, and as PyTorch computes it in the dtype of the case."""
    torch_error = max(largest_difference(own, exact) for exact, own in wanted)
    exact = torch.cat([want.reshape(x.shape) for x, (want, _) in zip(got, wanted, strict=True)])
    return judge(name, torch.cat(got), exact, torch_error)


def moved_at(case: Case, inputs: Inputs, moves: Moves, place: Place) -> tuple[Problem, Moves]:
    """The rows of a place against all their keys, and how they move."""
    problem = problem_at(case, inputs, place, None)
    kv_head = place.head // (case.q_heads // case.kv_heads)
    q = moves[0][place.batch, place.head][place.rows][None, None]
    k, v = (x[place.batch : place.batch + 1, kv_head : kv_head + 1] for x in moves[1:])
    return problem, (q, k, v)


# ---- In float64, and as PyTorch's math path computes it in the dtype of the case


def moved(problem: Problem, moves: Moves) -> Any:
    """The reference's arguments."""
    return problem.options | {f"{name}_tangent": x for name, x in zip("qkv", moves, strict=True)}


def exact_tangent(problem: Problem, moves: Moves) -> Tensor:
    of = (x.detach() for x in (problem.q, problem.k, problem.v))
    return tilewise_reference.tangent(*of, **moved(problem, moves))[0]


def own_tangent(problem: Problem, moves: Moves) -> Tensor:
    """Within a level of forward mode."""
    of = (x.detach() for x in (problem.q, problem.k, problem.v))
    dual = [forward_ad.make_dual(x, move) for x, move in zip(of, moves, strict=True)]
    tangent: Tensor = forward_ad.unpack_dual(math_attention(*dual, **problem.options)[0]).tangent
    return tangent


def exact_second(problem: Problem, moves: Moves, do: Tensor) -> Moves:
    q, k, v = (x.detach() for x in (problem.q, problem.k, problem.v))
    found = tilewise_reference.second(q, k, v, do, **moved(problem, moves))
    return found.q, found.k, found.v


def own_second(problem: Problem, moves: Moves, do: Tensor) -> Moves:
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = math_attention(*leaves, **problem.options)[0]
        grads = torch.autograd.grad(out, leaves, do, create_graph=True)
        q, k, v = torch.autograd.grad(grads, leaves, moves)
    return q, k, v
