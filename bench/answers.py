"""Is an answer right? Before anything is timed, out and gradients are held against float64.

out is looked at on some rows of the case itself: the first, the middle and the last ones of a few heads and
sequences, against all keys. So is the gradient of q, a row of which depends on nothing but that row. Those of
k, v and what is learned are sums over all rows, too many for float64: the same implementation is asked for
them on a shortened copy of the case (up to 1024 rows of 8 heads, same features), where every element counts.

Packed sequences and those in a cache are held against the oracle one by one, each as a dense call of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tilewise.parts.scores.bias import Bias
from tilewise.parts.similarity import Cosine
from tilewise.plan.request import Request, make_request
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise.tools.shrink import shortened
from tilewise_reference.cases import Case
from tilewise_reference.dropout import dropout_keep, philox
from tilewise_reference.yardstick import largest_difference

from .implementations.base import Implementation, Prepared
from .judgement import Judgement, Problem, judge
from .results import Work
from .sequences import by_sequence, in_cache, join, shape_of_out, split

Tensor = torch.Tensor
CHUNK = 16  # rows looked at in one place
HEADS, ROWS = 3, 64  # heads looked at, more where they have few rows: until there are so many rows
SEQUENCES = 8  # packed ones looked at, from the shortest to the longest
DROPOUT_SEED = 1234  # of PyTorch's generator, before each call whose dropped pairs are looked for


class Place(NamedTuple):
    """Some rows of one head of one sequence."""

    batch: int
    head: int
    rows: Tensor  # int64, which


def places(case: Case, device: torch.device) -> list[Place]:
    """Where answers are looked at: first, middle and last of everything; of packed sequences and those in a
    cache the shortest, the longest and some between."""
    lengths = case.lengths or (case.q_len,) * case.batch
    order = sorted(range(case.batch), key=(case.cache or lengths).__getitem__)
    pairs, most = case.batch * case.q_heads, min(max(lengths, default=0), 3 * CHUNK)
    count = min(pairs, max(HEADS, -(-ROWS // max(1, most))))
    if case.sequences is not None:
        count = min(pairs, max(count, min(case.batch, SEQUENCES)))
    chosen = sorted({round(i * (pairs - 1) / max(1, count - 1)) for i in range(count)})
    where = [(order[i // case.q_heads], i % case.q_heads) for i in chosen]
    return [Place(batch, head, rows_of(lengths[batch], device)) for batch, head in where]


def rows_of(length: int, device: torch.device) -> Tensor:
    if length <= 3 * CHUNK:
        return torch.arange(length, device=device)
    middle = (length - CHUNK) // 2
    starts = torch.tensor([0, middle, length - CHUNK], device=device)
    return (starts[:, None] + torch.arange(CHUNK, device=device)).flatten()


def at(case: Case, x: Tensor, place: Place) -> Tensor:
    """The rows of a place in a tensor of out's or q's layout: [rows, dim]."""
    if case.lengths is None:
        return x[place.batch, place.head][place.rows]
    return split(case, x)[place.batch][0, place.head][place.rows]


# ---- The oracle's view of a case, and of some of its rows


def request_of(inputs: Inputs) -> Request:
    return make_request(inputs.q, inputs.k, inputs.v, **inputs.arguments)


def problem_at(case: Case, inputs: Inputs, place: Place, keep: Tensor | None) -> Problem:
    """What the rows of a place are held against."""
    if case.cache is not None:
        return part(request_of(in_cache(case, inputs, place.batch)), place._replace(batch=0), keep)
    if case.lengths is None:
        return part(request_of(inputs), place, keep)
    return part(request_of(by_sequence(case, inputs)[place.batch]), place._replace(batch=0), keep)


def whole(request: Request, keep: Tensor | None) -> Problem:
    """All of the case. keep: the pairs that dropout leaves, [batch, q_heads, q_len, kv_len]."""
    shape = request.shape
    options = _options(request)
    options["mask"] = [mask.twin(shape) for mask in request.masks]
    options["score"] = [score.twin(shape) for score in request.scores]
    if keep is not None and request.dropout is not None:
        options |= dict(dropout_p=request.dropout.p, dropout_keep=keep)
    return Problem(request.q, request.k, request.v, options)


def part(request: Request, place: Place, keep: Tensor | None) -> Problem:
    """The rows of one place against all their keys. The twins are asked with the indices that these rows have
    in the whole. keep: [rows, kv_len]."""
    shape, (batch, head, rows) = request.shape, place
    kv_head = head // shape.group

    def moved(twin: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: twin(*args[:-4], args[-4] + batch, args[-3] + head, rows[args[-2]], args[-1])

    options = _options(request)
    options["mask"] = [moved(mask.twin(shape)) for mask in request.masks]
    options["score"] = [moved(_score_twin(score, shape)) for score in request.scores]
    for name in ("sink", "temperature"):
        if isinstance(options[name], Tensor):
            options[name] = options[name][head : head + 1]
    if keep is not None and request.dropout is not None:
        options |= dict(dropout_p=request.dropout.p, dropout_keep=keep[None, None])
    q = request.q[batch, head][rows][None, None]
    k, v = (x[batch : batch + 1, kv_head : kv_head + 1] for x in (request.k, request.v))
    return Problem(q.detach(), k.detach(), v.detach(), options)


def _options(request: Request) -> dict[str, Any]:
    similarity = request.similarity
    return dict(
        scale=request.scale,
        similarity="cosine" if isinstance(similarity, Cosine) else similarity,
        temperature=similarity.temperature if isinstance(similarity, Cosine) else None,
        sink=request.sink,
    )


def _score_twin(score: Any, shape: Any) -> Callable[..., Tensor]:
    """Like score.twin, but for any indices: a bias' twin adds all of it."""
    if not isinstance(score, Bias):
        return score.twin(shape)
    bias = score.bias.expand(shape.scores)
    return lambda s, batch, head, q_idx, kv_idx: s + bias[batch, head, q_idx, kv_idx].to(s.dtype)


# ---- Which pairs did dropout leave?


def seeded_keep(request: Request, place: Place) -> Tensor:
    """By the case's own seed, on these rows: [rows, kv_len]."""
    assert request.dropout is not None
    p, seed = request.dropout
    kv_len, device = request.shape.kv_len, place.rows.device
    words = philox(
        seed,
        torch.arange((kv_len + 3) // 4, device=device),
        place.rows[:, None],
        torch.full((1, 1), place.head, device=device),
        torch.full((1, 1), place.batch, device=device),
    )
    word = torch.stack(words, dim=2).flatten(1)[:, :kv_len]
    return (word >> 1) >= round(p * 2**31)


def revealed_keep(
    implementation: Implementation, case: Case, inputs: Inputs, work: Work, found: Iterable[Place]
) -> list[Tensor]:
    """The pairs that a rival with a generator of its own dropped in a call after
    torch.manual_seed(DROPOUT_SEED), for each place [rows, kv_len].

    It shows them itself: where the values are rows of the identity matrix, out is P after dropout, value_dim
    keys at a time.
    """
    found = list(found)
    kept: list[list[Tensor]] = [[] for _ in found]
    for first in range(0, case.kv_len, case.value_dim):
        count = min(case.value_dim, case.kv_len - first)
        v = torch.zeros_like(inputs.v)
        v[..., torch.arange(first, first + count), torch.arange(count)] = 1
        shown = inputs._replace(v=v.requires_grad_(inputs.v.requires_grad))
        prepared = implementation.prepare(case, shown, work)
        torch.manual_seed(DROPOUT_SEED)
        out = prepared.out().detach()
        for here, place in zip(kept, found, strict=True):
            here.append(out[place.batch, place.head][place.rows][:, :count] > 0)
    return [torch.cat(here, dim=1) for here in kept]


# ---- Judgements


def judge_forward(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, work: Work = "forward"
) -> Judgement:
    """Hold out against float64 on the rows of `places`."""

    def problems() -> list[Problem]:
        found = places(case, inputs.q.device)
        keeps = _keeps(implementation, case, inputs, work, found)
        return [problem_at(case, inputs, *each) for each in zip(found, keeps, strict=True)]

    return judge_rows(case, inputs, prepared, problems)


def judge_rows(
    case: Case, inputs: Inputs, prepared: Prepared, problems_of: Callable[[], Sequence[Problem]]
) -> Judgement:
    """The same for problems that are known, one for each of the places; asked for after the answer."""
    found = places(case, inputs.q.device)
    torch.manual_seed(DROPOUT_SEED)
    out = prepared.out().detach()
    wanted = shape_of_out(case)
    if tuple(out.shape) != wanted or out.dtype != inputs.q.dtype:
        given = f"{tuple(out.shape)} of {out.dtype}"
        return Judgement(float("inf"), 0.0, 0.0, f"out is {given}, not {wanted} of {inputs.q.dtype}")
    with torch.no_grad():
        problems = problems_of()
        got = torch.cat([at(case, out, place) for place in found])
        exact = torch.cat([problem.exact()[0, 0] for problem in problems])
        torch_error = 0.0
        for problem in problems:
            for near in problem.neighbours(got.numel()):
                torch_error = max(torch_error, largest_difference(near.pytorch(), near.exact()))
    return judge("out", got, exact, torch_error)


def judge_row_gradients(
    case: Case, inputs: Inputs, do: Tensor, dq: Tensor, keeps: list[Tensor | None]
) -> Judgement:
    """Hold the gradient of q against float64 on the rows of `places`."""
    found = places(case, inputs.q.device)
    got, exact, torch_error = [], [], 0.0
    for place, keep in zip(found, keeps, strict=True):
        problem = _detached(problem_at(case, inputs, place, keep))
        here = at(case, do, place)[None, None]
        got.append(at(case, dq, place))
        for near in problem.neighbours(len(found) * got[-1].numel()):
            want, have = (_gradient(near, dtype, here) for dtype in (torch.float64, near.q.dtype))
            if near is problem:
                exact.append(want[0, 0])
            torch_error = max(torch_error, largest_difference(have, want))
    return judge("dq", torch.cat(got), torch.cat(exact), torch_error)


def judge_backward(
    implementation: Implementation, case: Case, inputs: Inputs, prepared: Prepared, work: Work, seed: int = 0
) -> Judgement:
    """Hold out and every gradient against float64; the judgement that is closest to its limit."""
    found = places(case, inputs.q.device)
    judgements = [judge_forward(implementation, case, inputs, prepared, work)]
    do = gradient_of_out(case, inputs, seed)
    torch.manual_seed(DROPOUT_SEED)
    gradients = prepared.gradients(prepared.backward(do)())
    finite = [name for name, x in gradients.items() if not bool(torch.isfinite(x).all())]
    if finite:
        return Judgement(float("inf"), 0.0, 0.0, f"the gradient of {', '.join(finite)} is not finite")
    keeps = _keeps(implementation, case, inputs, work, found)
    judgements.append(judge_row_gradients(case, inputs, do, gradients["q"], keeps))
    judgements += judge_all_gradients(implementation, shortened(case), inputs.q.device, work, seed)
    return max(judgements, key=lambda judgement: judgement.excess)


def judge_all_gradients(
    implementation: Implementation, case: Case, device: torch.device, work: Work, seed: int = 0
) -> list[Judgement]:
    """Hold every gradient against float64, on a case that is small enough."""
    inputs = case_inputs(case, device, seed, gradients=True)
    do = gradient_of_out(case, inputs, seed)
    prepared = implementation.prepare(case, inputs, work)
    torch.manual_seed(DROPOUT_SEED)
    gradients = prepared.gradients(prepared.backward(do)())
    requests, keep = [request_of(piece) for piece in by_sequence(case, inputs)], None
    if requests[0].dropout is not None:
        keep = whole_keep(implementation, case, inputs, work, requests[0])
    missing = {"q", "k", "v"} | {n for n, x in inputs.learned.items() if x.requires_grad}
    missing -= gradients.keys()
    if missing:
        return [Judgement(float("inf"), 0.0, 0.0, f"no gradient of {', '.join(sorted(missing))}")]
    wanted: dict[str, Tensor] = {}
    errors = dict.fromkeys(gradients, 0.0)
    fewest = min(x.numel() for x in gradients.values())
    pieces, neighbours = split(case, do), (whole(request, keep).neighbours(fewest) for request in requests)
    for near in zip(*neighbours, strict=True):
        each = [*zip(requests, near, pieces, strict=True)]
        exact, own = (
            _joined(case, [_all_gradients(r, problem, keep, piece, dtype) for r, problem, piece in each])
            for dtype in (torch.float64, None)
        )
        wanted = wanted or exact
        for name in errors:
            errors[name] = max(errors[name], largest_difference(own[name], exact[name]))
    return [judge(f"d{name}", x, wanted[name], errors[name]) for name, x in gradients.items()]


def _joined(case: Case, pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all sequences: of q, k and v one behind the other, of what is learned their sum."""
    if case.lengths is None:
        return pieces[0]
    of = {name: [piece[name] for piece in pieces] for name in pieces[0]}
    return {name: join(case, x) if name in ("q", "k", "v") else sum(x[1:], x[0]) for name, x in of.items()}


def whole_keep(
    implementation: Implementation, case: Case, inputs: Inputs, work: Work, request: Request
) -> Tensor:
    """The pairs that dropout leaves in all of a small case."""
    assert request.dropout is not None
    if implementation.seeded:
        p, seed = request.dropout
        return dropout_keep(seed, p, request.shape.scores, inputs.q.device)
    rows = torch.arange(case.q_len, device=inputs.q.device)
    everywhere = [Place(b, h, rows) for b in range(case.batch) for h in range(case.q_heads)]
    kept = revealed_keep(implementation, case, inputs, work, everywhere)
    return torch.stack(kept).unflatten(0, (case.batch, case.q_heads))


def _keeps(
    implementation: Implementation,
    case: Case,
    inputs: Inputs,
    work: Work,
    found: list[Place],
) -> list[Tensor | None]:
    if "dropout_p" not in inputs.arguments:
        return [None] * len(found)
    if implementation.seeded:
        request = request_of(inputs)
        return [seeded_keep(request, place) for place in found]
    with torch.enable_grad():
        return list(revealed_keep(implementation, case, inputs, work, found))


def gradient_of_out(case: Case, inputs: Inputs, seed: int) -> Tensor:
    """Random, the same for the same seed."""
    generator = torch.Generator(inputs.q.device).manual_seed(seed + 1)
    return torch.randn(shape_of_out(case), generator=generator, device=inputs.q.device, dtype=inputs.q.dtype)


def _detached(problem: Problem) -> Problem:
    """Without the gradients of what is learned, which rows do not settle."""
    options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    return replace(problem, options=options)


def _gradient(problem: Problem, dtype: torch.dtype, do: Tensor) -> Tensor:
    """Of q, in float64 or by PyTorch's way in the dtype of the case."""
    with torch.enable_grad():
        q = problem.q.detach().to(dtype, copy=True).requires_grad_()
        leaf = replace(problem, q=q)
        out = leaf.exact() if dtype == torch.float64 else leaf.pytorch()
        (gradient,) = torch.autograd.grad(out, q, do.to(out.dtype))
    return gradient


def _all_gradients(
    request: Request, problem: Problem, keep: Tensor | None, do: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Of q, k, v and what is learned, by name, on copies in this dtype (None: their own)."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        leaves[name] = x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
        return leaves[name]

    q, k, v = (leaf(name, x) for name, x in zip("qkv", (problem.q, problem.k, problem.v), strict=True))
    scores = []
    for score in request.scores:
        score = copy.copy(score)
        for name, tensor in score.tensors().items():
            setattr(score, name, leaf(name, tensor))
        scores.append(score)
    similarity = request.similarity
    if isinstance(similarity, Cosine):
        similarity = Cosine(leaf("temperature", similarity.temperature))
    sink = leaf("sink", request.sink)
    own = replace(request, q=q, k=k, v=v, scores=tuple(scores), similarity=similarity, sink=sink)
    promoted = whole(own, keep)
    out = promoted.exact() if dtype == torch.float64 else promoted.pytorch()
    got = torch.autograd.grad(out, list(leaves.values()), do.to(out.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), got, strict=True)
    }
