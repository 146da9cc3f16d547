"""What is known of rows whose keys come piece by piece: the state of their softmax, and its derivative.

Each piece gives the out of its own keys, normalised, and the two numbers a row that the kernels keep for the
backward, row_max and sum_log2 (`softmax.py`): the sum of the exponentials is exp(row_max) · 2^sum_log2. Two
pieces join as everywhere:

    m = max(m_a, m_b)    l = l_a exp(m_a - m) + l_b exp(m_b - m)    O = O_a + (O_b - O_a) l_b exp(m_b - m) / l

and the sum of all keys is what the backward of every piece is told. So P = exp(S - m) / l, dQ, dK and dV of a
piece are those of one device. Plain PyTorch differentiates its own pieces: of O = Σ w_i O_i, with the weights
w_i = exp(lse_i - lse), it is handed

    dO_i = w_i dO        dlse_i = w_i (dO · (O_i - O) + dlse)

Method: Milakov & Gimelshein (arXiv 1805.02867); for attention over a ring, Liu et al. (arXiv 2310.01889).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..parts.shape import computed_in
from ..plan.implementation import implementation
from ..plan.passes import run_backward, run_forward
from ..plan.request import Request
from ..pytorch.encoding import Encoded, decode, encode
from ..pytorch.plain import unrounded

Tensor = torch.Tensor
LOG2E = 1 / math.log(2)


class Rows:
    """out [batch, q_heads, rows, value_dim], row_max and sum_log2 [batch, q_heads, rows], in the dtype of
    scores; of rows that have seen their sink, if there is one, and then the keys of each piece. unit: what
    maxima are multiplied by to be those of scores; 1 beside a sink."""

    def __init__(self, q: Tensor, value_dim: int, sink: Tensor | None, unit: float) -> None:
        sizes, dtype = q.shape[:3], computed_in(q.dtype)
        self.out = q.new_zeros((*sizes, value_dim), dtype=dtype)
        self.row_max = q.new_full(sizes, -torch.inf, dtype=dtype)
        self.sum_log2 = q.new_zeros(sizes, dtype=dtype)
        self.unit = unit
        if sink is not None:
            self.row_max.copy_(sink[:, None].expand(sizes))

    def take(self, rows: slice, out: Tensor, row_max: Tensor, sum_log2: Tensor) -> None:
        """Join a piece to what these rows have seen."""
        own_max, own_sum = self.row_max[:, :, rows], self.sum_log2[:, :, rows]
        top = torch.maximum(own_max, row_max)
        base = top.masked_fill(top == -torch.inf, 0.0)  # never -inf - -inf
        own = torch.exp2((own_max - base) * (self.unit * LOG2E) + own_sum)
        new = torch.exp2((row_max - base) * (self.unit * LOG2E) + sum_log2)
        total = own + new
        total.masked_fill_(total == 0, 1.0)
        self.out[:, :, rows].lerp_(out, (new / total)[..., None])  # one pass over memory
        own_max.copy_(top)
        own_sum.copy_(total.log2())

    def lse(self) -> Tensor:
        """ln Σ exp(S) of each row, -inf without a key."""
        return self.row_max * self.unit + self.sum_log2 / LOG2E


def unit_of(request: Request) -> float:
    """That of the maxima that pieces of this request have."""
    unit = None if implementation(request) == "torch" else request.similarity_scores.unit
    return 1.0 if unit is None else unit


def without_sink(request: Request) -> Request:
    """The request of a piece, whose rows have seen their sink: it counts for nothing, but scores stay in the
    unit that they have beside it."""
    sink = request.sink
    return request if sink is None else replace(request, sink=torch.full_like(sink, -torch.inf))


def attend(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """out, row_max and sum_log2 of a piece, in the dtype of scores."""
    if implementation(request) == "torch":
        with torch.no_grad():
            out, lse = unrounded(request, return_lse=True)
        return out, lse, torch.zeros_like(lse)
    q, shape = request.q, request.shape
    out = torch.empty((*q.shape[:3], shape.value_dim), dtype=torch.float32, device=q.device)
    _, _, statistics = run_forward(request, return_lse=False, for_backward=True, out=out)
    assert statistics is not None
    row_max, sum_log2 = statistics.unbind(0)
    return out, row_max, sum_log2


def differentiate(
    request: Request, out: Tensor, statistics: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """The gradients of those of (q, k, v, *other tensors) that are needed, through one piece, in the dtype of
    scores; out, and statistics [2, batch, q_heads, rows] are of all keys."""
    if implementation(request) == "torch":
        return differentiate_plain(request, out, statistics, do, dlse, needs)
    return run_backward(request, out, statistics, do, dlse, needs, dtype=torch.float32)


def differentiate_plain(
    request: Request, out: Tensor, statistics: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    dtype = computed_in(request.q.dtype)
    encoded = encode(request)
    given = (request.q, request.k, request.v, *encoded.tensors)
    leaves = [
        x.detach().to(dtype).requires_grad_() if needed else x.detach()
        for x, needed in zip(given, needs, strict=True)
    ]
    with torch.enable_grad():
        own_out, own_lse = unrounded(decoded(leaves, encoded, dtype), return_lse=True)
    row_max, sum_log2 = statistics.unbind(0)
    lse = row_max + sum_log2 / LOG2E
    sees = own_lse.detach() != -torch.inf
    weight = torch.where(sees, own_lse.detach() - lse, -torch.inf).exp()
    do = do.to(dtype)
    of_lse = (do * (own_out.detach() - out.to(dtype))).sum(-1)
    of_lse = weight * (of_lse if dlse is None else of_lse + dlse)
    wanted = [x for x, needed in zip(leaves, needs, strict=True) if needed]
    arrived = weight[..., None] * do, of_lse
    return list(torch.autograd.grad((own_out, own_lse), wanted, arrived, materialize_grads=True))


def decoded(leaves: list[Tensor], encoded: Encoded, dtype: torch.dtype) -> Request:
    """The request on these tensors, all of them as wide as scores."""
    q, k, v, *others = leaves
    return decode(q.to(dtype), k.to(dtype), v.to(dtype), encoded._replace(tensors=others))
